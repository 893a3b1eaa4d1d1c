"""The held-out texts of a tokenizer comparison, by group: a language, a domain, a file."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.config.compose import CONF
from lmlab.data.fields import BadRecordError
from lmlab.data.files import TEXT_SUFFIXES, data_suffix, find_files
from lmlab.data.formats import FormatOptions, formats, template_source
from lmlab.data.intake import Intake
from lmlab.data.mix import MixData
from lmlab.data.prepare import side_texts
from lmlab.data.sources import FileData
from lmlab.records import UserError

if TYPE_CHECKING:
    from lmlab.config.schema import RunConfig
    from lmlab.data.config import DataConfig
    from lmlab.tokenizer_lab.options import LabConfig

Compose = Callable[[Sequence[str]], "RunConfig"]
"""Overrides -> the validated config of a run."""
NOT_OF_A_SIDE = {"max_length", "packing", "cross_document_attention", "too_long", "chat_template"}
"""Keys of data that have no say in which texts are on which side, nor in the texts."""
MAX_GROUPS = 64
"""More is a field with a value of its own for every record, such as a URL."""


class _Groups:
    """Texts by group, at most ``limit`` characters of each; the text that crosses it is cut there."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.texts: dict[str, list[str]] = {}
        self.used: dict[str, int] = {}
        self.cut: set[str] = set()

    def add(self, name: str, text: str) -> None:
        used = self.used.setdefault(name, 0)
        room = self.limit - used
        if len(text) > room:
            self.cut.add(name)
        if text[:room]:
            self.texts.setdefault(name, []).append(text[:room])
        self.used[name] = used + len(text[:room])
        if len(self.used) > MAX_GROUPS:
            some = ", ".join(list(self.used)[:3])
            raise UserError(
                f"more than {MAX_GROUPS} groups of texts ({some} ...)",
                where="lab.group_by",
                fix="name a field with few values, or lab.group_by=[] for one group a file",
            )


def held_out_groups(
    lab: LabConfig, configs: Sequence[RunConfig], compose: Compose
) -> tuple[dict[str, list[str]], list[str]]:
    """(group -> its texts, what a reader must know of them).

    Args:
        configs: of the tokenizers that are compared.
        compose: for the data sets that ``lab.texts`` names.

    Raises:
        UserError: a text that cannot be read, no text at all, or too many groups.
    """
    groups, notes = _Groups(lab.max_chars), list[str]()
    if lab.texts:
        for own, given in _names(lab.texts).items():
            for name, text in _given_texts(given, own, lab.group_by, compose, alone=len(lab.texts) == 1):
                groups.add(name, text)
        notes += [
            f"{path} is among the training text of these tokenizers" for path in _trained_on(lab, configs)
        ]
    else:
        sides = _sides(configs)
        for name, text in _validation_texts(sides, lab.group_by):
            groups.add(name, text)
        notes.append(
            "measured on the validation side of data, which no tokenizer trained here has seen"
            if len(sides) == 1
            else f"measured on the validation sides of {len(sides)} settings of data: a text that one tokenizer "
            "has not seen may be among the training text of another"
        )
    if not groups.texts:
        raise UserError("no held-out text", where="lab.texts", fix="give files with text in them")
    if groups.cut:
        names = ", ".join(sorted(groups.cut))
        notes.append(f"only the first {lab.max_chars:,} characters (lab.max_chars) of {names}")
    return groups.texts, notes


def _names(texts: Sequence[str]) -> dict[str, str]:
    """Short name -> what it stands for; where two would have one name, or it is a pattern, all of the path."""
    short = {given: Path(given).name.split(".")[0] or given for given in texts}
    often = Counter(short.values())
    return {
        given if often[name] > 1 or glob.has_magic(name) else name: given for given, name in short.items()
    }


def _given_texts(
    given: str, own: str, group_by: Sequence[str], compose: Compose, *, alone: bool
) -> Iterator[tuple[str, str]]:
    """(group, text) of every record of a file, folder or glob, or of a named data set's validation side."""
    if (CONF / "data" / f"{given}.yaml").is_file() and not Path(given).exists():
        config = compose(["task=pretrain", f"data={given}"])
        for record, text in side_texts(config.data, task=config.task, side="val"):
            yield _group(own, record.fields, group_by, alone=alone), text
        return
    try:
        files = find_files(given)
    except UserError as error:
        raise UserError(error.what, where=f"lab.texts={given}", fix=error.fix) from error
    kind = "text" if all(data_suffix(file) in TEXT_SUFFIXES for file in files) else "jsonl"
    config = compose(["task=pretrain", f"data={kind}", "data.path=x"])
    for fields, text in _texts(config.data.model_copy(update={"path": given})):
        yield _group(own, fields, group_by, alone=alone), text


def _group(own: str, fields: Mapping[str, Any], group_by: Sequence[str], *, alone: bool) -> str:
    """The record's value of the first of ``group_by`` that it has, else its source; both if there are several sources."""
    value = next((fields[key] for key in group_by if isinstance(fields.get(key), str)), None)
    return own if value is None else str(value) if alone else f"{own}: {value}"


def _texts(config: DataConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """(fields, text) of every record; a bad one follows ``on_bad_record``."""
    intake = Intake(config.on_bad_record)
    options = FormatOptions(template_source(config.template), config.columns, _turns, train_all=True)
    format = formats.get(config.format_for("pretrain"))
    for record in config.records(intake, task="pretrain"):
        try:
            yield record.fields, "".join(segment.text for segment in format(record, options).segments)
        except BadRecordError as error:
            intake.bad(error.reason, where=record.where, detail=error.detail)


def _turns(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def _sides(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Of the configs one for each validation side."""
    distinct = {
        (config.task, config.data.model_dump_json(exclude=NOT_OF_A_SIDE)): config for config in configs
    }
    return list(distinct.values())


def _validation_texts(sides: Sequence[RunConfig], group_by: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(group, text) of the validation sides; a mix has a group for each of its sources at least."""
    sources = [(config.task, *source) for config in sides for source in _sources(config.data)]
    for task, name, data in sources:
        for record, text in side_texts(data, task=task, side="val"):
            group = _group(name, record.fields, group_by, alone=len(sources) == 1)
            yield f"{group} (validation)", text


def _sources(data: DataConfig) -> list[tuple[str, DataConfig]]:
    if isinstance(data, MixData):
        return [(name, part) for name, _, part in data.parts()]
    return [(_short(data), data)]


def _short(data: DataConfig) -> str:
    path = getattr(data, "path", None)
    return Path(path).name.split(".")[0] if isinstance(path, str) and path else data.kind


def _trained_on(lab: LabConfig, configs: Sequence[RunConfig]) -> list[str]:
    """Of the given texts those whose files the tokenizers were trained on."""
    parts = [part for config in configs for _, part in _sources(config.data)]
    read = {file.resolve() for part in parts if isinstance(part, FileData) for file in part.files()}
    return [given for given in lab.texts if _files(given) & read]


def _files(given: str) -> set[Path]:
    try:
        return {file.resolve() for file in find_files(given)}
    except UserError:  # a named data set
        return set()

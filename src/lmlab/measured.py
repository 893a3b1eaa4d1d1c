"""The data a model is measured on: a file, a data set of conf/data, or a run's own held-out side, as the model would read it.

Everything is read and encoded as in training (template, chat template, tokenizer, length), so that the figures of a run's
own validation come out again. What the command line sets stands above what the run was trained with, and that above
conf/data.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lmlab.config.compose import CONF, compose_config
from lmlab.data.chat import chat_document
from lmlab.data.config import DataConfig
from lmlab.data.encoding import EncodedDocument
from lmlab.data.fields import BadRecordError, text_field
from lmlab.data.files import TEXT_SUFFIXES, data_suffix, find_files
from lmlab.data.formats import FormatOptions, formats, template_source
from lmlab.data.intake import Intake
from lmlab.data.prepared import PreparedData
from lmlab.data.sources import ShardsData
from lmlab.evaluation.answers import Question
from lmlab.journal import RunDir, read_json
from lmlab.records import Document, Record, UserError
from lmlab.variants import run_folder

if TYPE_CHECKING:
    from lmlab.load import UsableModel

OWN_SIDES = ("val", "test")


@dataclass(frozen=True)
class Measured:
    """A data set ready to be measured on.

    Attributes:
        name: as given on the command line.
        prepared: its rows are those of ``side``.
        questions: prompts with references; [] for plain text.
        notes: what a person should know of it: counts, what was dropped or cut, the template.
        held_out: tells a run's own records from another's; "" for a data set that is every model's.
    """

    name: str
    prepared: PreparedData
    side: str
    questions: list[Question]
    notes: list[str]
    held_out: str = ""

    @property
    def counts(self) -> dict[str, Any]:
        """Of this side: records, tokens, supervised_tokens, supervised_bytes."""
        return self.prepared.meta["report"][self.side]


@dataclass(frozen=True)
class DataChoice:
    """What is asked for with ``--data``, checked as far as it can be without a model.

    Attributes:
        given: a path, ``val`` or ``test`` (the run's own), or a name in conf/data.
        config: None for a run's own.
        told: keys under ``data.`` that the command line sets.
        task: sft or pretrain; None for the run's own, sft for files.
        side: of a data set of conf/data: val, train, test or all.
    """

    given: str
    config: DataConfig | None
    told: frozenset[str]
    task: str | None
    side: str

    @classmethod
    def of(cls, given: str, *, settings: Sequence[str], task: str | None, side: str | None) -> DataChoice:
        """Compose the data set's config.

        Args:
            settings: ``data.key=value``.

        Raises:
            UserError: no such file or data set, or a setting that it does not have.
        """
        told = frozenset(setting.partition("=")[0] for setting in settings)
        if given in OWN_SIDES:
            if settings:
                fix = "leave --set data.* out; a run's own data stays as it was prepared"
                raise UserError("nothing to set here", where=f"--data {given}", fix=fix)
            if task is not None or side is not None:
                fix = "leave it out, or name the data set or the file"
                option = "--side" if task is None else "--task"
                raise UserError(f"{option}: a run's own data stays so", where=f"--data {given}", fix=fix)
            return cls(given, None, told, task, given)
        named = sorted(file.stem for file in (CONF / "data").glob("*.yaml"))
        if given in named and not Path(given).exists():
            return cls(given, _compose(given, settings), told, task, side or "val")
        files = find_files(given)
        kind = "text" if all(data_suffix(file) in TEXT_SUFFIXES for file in files) else "jsonl"
        config = _compose(kind, ["data.path=x", *settings]).model_copy(update={"path": given})
        task = task or "sft"
        next(config.records(Intake(config.on_bad_record), task=task), None)  # an empty or broken file: now
        return cls(given, config, told, task, side or "all")


def _compose(kind: str, settings: Sequence[str]) -> DataConfig:
    return compose_config([f"data={kind}", *settings]).data


@dataclass
class DataSets:
    """Encodes each data set once for all models that read it alike; `close` removes the files.

    Args:
        limit: records of each, the first ones; None for all. A run's own side is always taken whole.
    """

    limit: int | None
    _made: dict[tuple[Any, ...], Measured] = field(default_factory=dict)
    _folder: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="lmlab-evaluate-"))

    def get(self, choice: DataChoice, usable: UsableModel, model: str) -> Measured:
        """The data set as this model reads it.

        Args:
            model: as given on the command line; where it is a run, its settings count.
        """
        if choice.config is None:
            return own_side(choice.given, model)
        from lmlab.data.chat_templates import chat_template_source, use_chat_template
        from lmlab.start import text_encoder

        config, notes = _as_trained(choice, usable, model)
        tokenizer = usable.tokenizer
        if config.chat_template is not None:
            tokenizer = copy.deepcopy(tokenizer)
            use_chat_template(tokenizer, chat_template_source(config.chat_template))
        encoder = text_encoder(tokenizer)
        task = choice.task or usable.info.get("task") or "sft"
        key = (encoder.key, choice.given, task, config.model_dump_json())
        if key not in self._made:
            folder = Path(self._folder.name) / str(len(self._made))
            self._made[key] = self._encode(choice, config, encoder, folder, task=task, notes=notes)
        return self._made[key]

    def _encode(
        self,
        choice: DataChoice,
        config: DataConfig,
        encoder: Any,
        folder: Path,
        *,
        task: str,
        notes: list[str],
    ) -> Measured:
        from lmlab.data.prepare import encode_to_measure, prepare

        if isinstance(config, ShardsData):
            prepared = prepare(config, encoder, task=task)
            return Measured(
                choice.given, prepared, "val", [], [*notes, *_said(prepared.meta["report"], "val")]
            )
        questions: list[Question] = []

        def keep(encoded: EncodedDocument, where: str) -> None:
            document = encoded.document
            if document.prompt and document.response:
                questions.append(Question(where, document.prompt, document.response))

        prepared = encode_to_measure(
            config, encoder, folder, task=task, side=choice.side, limit=self.limit, on_document=keep
        )
        said = [*notes, *_said(prepared.meta["report"], "val")]
        return Measured(choice.given, prepared, "val", questions, said)

    def close(self) -> None:
        """Remove what was encoded."""
        self._folder.cleanup()


def _as_trained(choice: DataChoice, usable: UsableModel, model: str) -> tuple[DataConfig, list[str]]:
    """The data set's config with what the model's run was trained with, where the command line says nothing."""
    from lmlab.generation.decode import context_length

    config, info = choice.config, usable.info
    assert config is not None
    own, update, notes = _run_data(model), dict[str, Any](), list[str]()
    context = context_length(usable.model)
    if "data.max_length" not in choice.told:
        length = own.get("max_length") or config.max_length
        update["max_length"] = min(length, context or length)
    elif context is not None and config.max_length > context:
        raise UserError(
            f"data.max_length={config.max_length} is beyond the model's context of {context}",
            where=model,
            fix=f"at most {context}",
        )
    if "cross_document_attention" in own and "data.cross_document_attention" not in choice.told:
        update["cross_document_attention"] = own["cross_document_attention"]
    if "data.template" not in choice.told and info.get("template"):
        update["template"] = info["template"]
    if "data.chat_template" not in choice.told and info.get("format") == "messages":
        update["chat_template"] = info.get("chat_template")
    config = config.model_copy(update=update)
    format_name = config.format_for(choice.task or info.get("task") or "sft")
    if format_name in IN_CHAT and info.get("format") == "messages" and "data.format" not in choice.told:
        notes.append(f"{format_name} are asked as conversations, which this model was trained on")
        return config.model_copy(update={"format": IN_CHAT[format_name]}), notes
    if format_name == "triples" and "data.template" not in choice.told and not info.get("template"):
        notes.append(
            f"this model was trained with no template: prompts are in '{config.template}' (data.template)"
        )
    return config, notes


IN_CHAT = {"triples": "triples_in_chat", "completion": "completion_in_chat"}
"""Formats whose records are put to a model of conversations as one turn each."""


@formats.register("triples_in_chat")
def triples_in_chat(record: Record, options: FormatOptions) -> Document:
    """instruction and input as the user's turn, output as the assistant's."""
    instruction, output = (text_field(record, name, options.columns) for name in ("instruction", "output"))
    given = text_field(record, "input", options.columns, required=False)
    return _one_turn(f"{instruction}\n\n{given}" if given else instruction, output, options)


@formats.register("completion_in_chat")
def completion_in_chat(record: Record, options: FormatOptions) -> Document:
    """prompt as the user's turn, completion as the assistant's."""
    prompt, completion = (text_field(record, name, options.columns) for name in ("prompt", "completion"))
    return _one_turn(prompt, completion, options)


def _one_turn(question: str, answer: str, options: FormatOptions) -> Document:
    assert options.render_chat is not None  # a model of conversations has a chat template
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return chat_document(
        turns, options.render_chat, special_tokens=options.special_tokens, train_all=options.train_all
    )


def _run_data(model: str) -> dict[str, Any]:
    """The ``data`` section of the config of the run that ``model`` belongs to; {} for others.

    Raises:
        UserError: that config cannot be read, and without it the data would be read otherwise than in training.
    """
    folder = run_folder(model)
    if folder is None:
        return {}
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return dict(values["data"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            "the run's config cannot be read",
            where=str(folder / "config.yaml"),
            fix="put it back as it was, or give the weights' own folder from elsewhere",
        ) from error


def own_side(side: str, model: str) -> Measured:
    """The run's own held-out records, as they were prepared.

    Raises:
        UserError: ``model`` is no run, its prepared data is gone, or it has no such side.
    """
    folder = run_folder(model)
    if folder is None:
        raise UserError(
            f"{model} is no run", where=f"--data {side}", fix="give a data file, or a run's directory"
        )
    place = read_json(RunDir(folder).info).get("prepared")
    if not place or not (Path(place) / "meta.json").is_file():
        fix = "give the data file again: --data FILE"
        raise UserError("the run's prepared data is gone from the cache", where=f"--data {side}", fix=fix)
    prepared = PreparedData.load(Path(place))
    report = prepared.meta["report"]
    if side not in report:
        fix = "train with data.test_fraction=0.1, or use --data val"
        raise UserError(f"the run held out no {side} side", where=f"--data {side}", fix=fix)
    notes = _said(report, side)
    asked = prepared.meta["val_prompts"] if side == "val" and prepared.meta["format"] != "text" else []
    questions = [
        Question(f"{side}[{index}]", each["prompt"], each["response"])
        for index, each in enumerate(asked)
        if each["response"]
    ]
    # By size and first answers (of a text, words), which are the same with another tokenizer or template.
    told = [
        report[side]["supervised_bytes"],
        *(each["response"] or each["prompt"] for each in prepared.meta["val_prompts"]),
    ]
    content = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return Measured(side, prepared, side, questions, notes, held_out=content)


def _said(report: dict[str, Any], side: str) -> list[str]:
    """Counts of one side in a line, and what was lost on the way to it."""
    of = report[side]
    records = of.get("records")
    parts = [f"{records:,} records" if records is not None else "", f"{of['supervised_bytes']:,} bytes"]
    line = [", ".join(part for part in parts if part)]
    dropped = {reason: n for reason, n in (report.get("records_dropped") or {}).items() if n}
    if dropped:
        line.append("dropped " + ", ".join(f"{n:,} ({reason})" for reason, n in sorted(dropped.items())))
    if report.get("records_truncated"):
        line.append(f"{report['records_truncated']:,} records cut to data.max_length")
    return line


def texts_of(given: Sequence[str], *, limit: int | None = None) -> list[str]:
    """The whole texts of data sets or files, prompts in their templates; at most ``limit`` of each.

    Raises:
        UserError: as `DataChoice.of`, or a bad record.
    """
    from itertools import islice

    texts = []
    for each in given:
        if each in OWN_SIDES:
            raise UserError(
                f"--data {each} is a run's own", where="--data", fix="give a file or a data set's name"
            )
        config = DataChoice.of(each, settings=(), task="pretrain", side=None).config
        assert config is not None
        intake = Intake(config.on_bad_record)
        options = FormatOptions(
            template_source(config.template), config.columns, _plain_turns, train_all=True
        )
        format = formats.get(config.format_for("pretrain"))
        for record in islice(config.records(intake, task="pretrain"), limit):
            try:
                texts.append("".join(segment.text for segment in format(record, options).segments))
            except BadRecordError as error:
                intake.bad(error.reason, where=record.where, detail=error.detail)
    return texts


def _plain_turns(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    turns = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
    return turns + ("assistant: " if add_generation_prompt else "")

"""Read, split, format and encode a data set once, into a cache folder keyed by content.

What comes out is complete: ranks and reruns only map it. The folder holds the two splits (shards.py), ``meta.json``
(counts, prompts, the template in force) and ``mask_preview.txt``. It appears by one rename, so a kill while
preparing leaves nothing half-made under its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.data import preview
from lmlab.data.encoding import Encode, EncodedDocument, LengthPolicy, fit_document
from lmlab.data.files import Intake
from lmlab.data.formats import FIELDS, BadRecordError, FormatOptions, formats, template_source
from lmlab.data.packing import DocumentRows, StreamRows
from lmlab.data.shards import Shard, write_split
from lmlab.data.sources import DataConfig, cache_root
from lmlab.records import Document, Record, Segment, UserError

ENCODING_VERSION = {"pretrain": 1, "sft": 2}
"""Of each task; raise it whenever the same data and tokenizer would give other files."""
MAX_VAL_PROMPTS = 512


@dataclass(frozen=True)
class TextEncoder:
    """The tokenizer as data preparation needs it (built in start.py; data never imports the tokenizers package)."""

    encode: Encode
    eos_token_id: int
    vocab_size: int
    key: str
    render_chat: Callable[[list[dict[str, Any]], bool], str] | None = None


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set on disk.

    Attributes:
        folder: where it lies.
        meta: ``report`` (counts), ``stream`` (whether rows are windows of a stream), ``format``, ``template``,
            ``val_prompts`` (prompt, response and place of up to 512 validation documents).
    """

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> PreparedData:
        """Map a folder written by `prepare`."""
        return cls(folder, json.loads((folder / "meta.json").read_text(encoding="utf-8")))

    def rows(self, split: str) -> DocumentRows | StreamRows:
        """Training examples of ``train`` or ``val``; validation is never packed, so that it does not depend on packing."""
        shard = Shard(self.folder / split)
        length = self.meta["max_length"]
        if self.meta["stream"]:
            return StreamRows(shard, max_length=length)
        return DocumentRows(shard, max_length=length, packing=self.meta["packing"] and split == "train")


def split_records(
    records: list[Record], val_fraction: float, *, text_column: str | None = None
) -> tuple[list[Record], list[Record]]:
    """Train and validation by a hash of each record's group or content: adding records moves no old one.

    At least one group is held out, and one is left where there are two or more. A single record whose
    ``text_column`` is a text is cut instead: its last ``val_fraction`` is held out.
    """
    if len(records) == 1 and isinstance(records[0].fields.get(text_column or ""), str):
        return _cut_text(records[0], str(text_column), val_fraction)
    draws = [_draw(record) for record in records]
    threshold = max(val_fraction, min(draws, default=0.0))
    if all(
        draw <= threshold for draw in draws
    ):  # a handful of records that all fell below: keep the smallest only
        threshold = min(draws, default=0.0)
    train = [r for r, draw in zip(records, draws, strict=True) if draw > threshold]
    return train, [r for r, draw in zip(records, draws, strict=True) if draw <= threshold]


def _draw(record: Record) -> float:
    key = record.group if record.group is not None else json.dumps(record.fields, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _cut_text(record: Record, column: str, val_fraction: float) -> tuple[list[Record], list[Record]]:
    text = record.fields[column]
    cut = len(text) - max(1, round(len(text) * val_fraction))
    cut = max(0, min(cut, len(text.rstrip()) - 1))  # white space at the end alone is nothing to validate on
    if not text[:cut].strip():
        raise UserError(
            f"a text of {len(text)} characters is too short to hold out its last part",
            where=record.where,
            fix="give more text",
        )
    parts = [replace(record, fields={**record.fields, column: part}) for part in (text[:cut], text[cut:])]
    return parts[:1], parts[1:]


def _read_split(
    config: DataConfig, intake: Intake, *, task: str, format_name: str
) -> tuple[list[Record], list[Record]]:
    records = list(config.records(intake, task=task))
    _check_columns(config, format_name, records)
    text_column = config.columns.get("text", "text") if format_name == "text" else None
    return split_records(records, config.val_fraction, text_column=text_column)


def _check_columns(config: DataConfig, format_name: str, records: list[Record]) -> None:
    """Refuse a column that no record has: a mistyped ``input`` would otherwise be empty everywhere, without a word."""
    found = {column for record in records for column in record.fields}
    for field in FIELDS.get(format_name, ()):
        column = config.columns.get(field, field)
        absent = column not in found and not (column == "messages" and "conversations" in found)
        if records and absent and (column, field) != ("input", "input"):
            raise UserError(
                f"no record has a field '{column}', as data.format={format_name} needs it",
                where=f"data.columns.{field}",
                fix=f"name one of {', '.join(sorted(found)[:12]) or 'no fields at all'}, or choose another data.format",
            )


def training_texts(config: DataConfig, *, task: str) -> Iterator[str]:
    """The texts of the training split, for training a tokenizer that never sees the validation split."""
    intake = Intake(config.on_bad_record)
    format_name = config.format_for(task)
    options = _options(config, task=task, render_chat=_plain_chat)
    format = formats.get(format_name)
    train, _ = _read_split(config, intake, task=task, format_name=format_name)
    for record in train:
        try:
            yield "".join(segment.text for segment in format(record, options).segments)
        except BadRecordError as error:
            intake.bad(error.reason, where=record.where, detail=error.detail)


def _plain_chat(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    # The tokenizer in the making has no chat template yet; its marks will be special tokens, which are not learned.
    turns = "".join(f"{message['role']}\n{message['content']}\n" for message in messages)
    return turns + ("assistant\n" if add_generation_prompt else "")


def _options(
    config: DataConfig, *, task: str, render_chat: Callable[[list[dict[str, Any]], bool], str] | None
) -> FormatOptions:
    return FormatOptions(
        template_source(config.template), config.columns, render_chat, train_all=task == "pretrain"
    )


def data_key(config: DataConfig, encoder: TextEncoder, *, task: str) -> str:
    """Hash of everything the prepared files depend on."""
    parts = [
        ENCODING_VERSION[task],
        config.model_dump(mode="json"),
        config.content_key(),
        encoder.key,
        task,
        template_source(config.template),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def prepare(config: DataConfig, encoder: TextEncoder, *, task: str) -> PreparedData:
    """The prepared data set, from the cache or made now.

    Raises:
        UserError: no usable record, a bad one (``on_bad_record=error``), or an empty split.
    """
    key = data_key(config, encoder, task=task)
    folder = cache_root() / "prepared" / key
    if (folder / "meta.json").exists():
        return PreparedData.load(folder)
    temporary = folder.with_name(f"{key}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, config, encoder, task=task)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process was faster with the same content
                shutil.rmtree(folder)  # what somebody's clearing of the cache left of it
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return PreparedData.load(folder)


def _write(folder: Path, config: DataConfig, encoder: TextEncoder, *, task: str) -> None:
    intake = Intake(config.on_bad_record)
    format_name = config.format_for(task)
    options = _options(config, task=task, render_chat=encoder.render_chat)
    stream = task == "pretrain" or format_name == "text"
    policy = LengthPolicy(None if stream else config.max_length, config.too_long)
    sides: dict[str, list[EncodedDocument]] = {}
    split = _read_split(config, intake, task=task, format_name=format_name)
    for name, side in zip(("train", "val"), split, strict=True):
        sides[name] = list(_encoded(side, intake, format_name, options, encoder, policy))
    _check_sides(config, intake, sides)
    for split, documents in sides.items():
        start = _stream_start(encoder) if stream else []
        write_split(folder / split, [*start, *documents], vocab_size=encoder.vocab_size)
    report = _report(intake, sides)
    examples = preview.mask_preview(sides["train"][:5])
    meta = {
        "report": report,
        "stream": stream,
        "packing": config.packing,
        "max_length": config.max_length,
        "format": format_name,
        "template": options.template if format_name == "triples" else None,
        "val_prompts": _val_prompts(sides["val"]),
    }
    (folder / "mask_preview.txt").write_text(examples, encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def _check_sides(config: DataConfig, intake: Intake, sides: dict[str, list[EncodedDocument]]) -> None:
    """Both splits need a record.

    Raises:
        UserError: with what was read, dropped and left.
    """
    if all(sides.values()):
        return
    empty = "train" if not sides["train"] else "validation"
    dropped = ", ".join(f"{reason}: {n}" for reason, n in sorted(intake.dropped.items())) or "none"
    raise UserError(
        f"no {empty} record: {intake.read} read, dropped {dropped}, left {len(sides['train'])} to train on and {len(sides['val'])} to validate on",
        where=str(getattr(config, "path", None) or getattr(config, "name", None) or config.kind),
        fix="give more records; equal ones, and those of one group, stay on one side",
    )


def _encoded(
    records: Iterable[Record],
    intake: Intake,
    format_name: str,
    options: FormatOptions,
    encoder: TextEncoder,
    policy: LengthPolicy,
) -> Iterator[EncodedDocument]:
    format = formats.get(format_name)
    for record in records:
        try:
            encoded = fit_document(
                record,
                format_name,
                format,
                options,
                encoder.encode,
                eos_token_id=encoder.eos_token_id,
                policy=policy,
            )
        except BadRecordError as error:
            if error.reason in (
                "no trained token",
                "too long",
            ):  # the length policy's own doing: counted, not an error
                intake.dropped[error.reason] += 1
            else:
                intake.bad(error.reason, where=record.where, detail=error.detail)
            continue
        intake.truncated += encoded.truncated
        yield encoded


def _stream_start(encoder: TextEncoder) -> list[EncodedDocument]:
    """One untrained EOS before the first document, so that the first real token is predicted too."""
    eos = EncodedDocument(
        np.asarray([encoder.eos_token_id]), np.zeros(1, dtype=bool), [], Document((Segment("", False),))
    )
    return [eos]


def _report(intake: Intake, sides: dict[str, list[EncodedDocument]]) -> dict[str, Any]:
    lengths = np.concatenate([[len(d.ids) for d in documents] for documents in sides.values()])
    report: dict[str, Any] = {
        "records_read": intake.read,
        "records_kept": intake.kept,
        "records_dropped": dict(intake.dropped),
        "records_truncated": intake.truncated,
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(sum(d.trained.sum() for documents in sides.values() for d in documents)),
        "tokens_per_record": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
        },
    }
    for split, documents in sides.items():
        report[split] = {
            "records": len(documents),
            "tokens": int(sum(len(d.ids) for d in documents)),
            "supervised_tokens": int(sum(d.trained.sum() for d in documents)),
            "supervised_bytes": int(sum(d.trained_bytes for d in documents)),
        }
    return report


def _val_prompts(documents: list[EncodedDocument]) -> list[dict[str, str]]:
    """Prompts for samples and metrics; of plain text, the first words of a document or of evenly spaced pieces of it."""
    asked = [
        {"prompt": d.document.prompt, "response": d.document.response or ""}
        for d in documents
        if d.document.prompt
    ]
    if asked:
        return asked[:MAX_VAL_PROMPTS]
    texts = ["".join(segment.text for segment in d.document.segments) for d in documents[:MAX_VAL_PROMPTS]]
    if len(texts) == 1:
        step = max(80, len(texts[0]) // 16)
        texts = [texts[0][start:].lstrip() for start in range(0, max(1, len(texts[0]) - 80), step)]
    prompts = [text[:60].rsplit(" ", 1)[0] for text in texts]
    return [{"prompt": prompt, "response": ""} for prompt in prompts if prompt.strip()]

"""Read, split, format and encode a data set once, into a cache folder keyed by content.

What comes out is complete: ranks and reruns only map it. The folder holds a folder per side (shards.py), ``meta.json``
(counts, prompts, the templates in force), ``mask_preview.json`` and ``mask_preview.txt``. It appears by one rename, so a
kill while preparing leaves nothing half-made under its name. Records stream through: memory does not grow with them.
A mix of sources is prepared source by source; a directory of tokenize_corpus.py is used where it lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.data import preview
from lmlab.data.chat_templates import RenderChat
from lmlab.data.encoding import Encode, EncodedDocument, LengthPolicy, encode_document, fit_document
from lmlab.data.fields import BadRecordError
from lmlab.data.files import Intake
from lmlab.data.formats import FIELDS, FormatOptions, format_key, formats, template_source
from lmlab.data.mix import MixData
from lmlab.data.prepared import PreparedData, from_shards, mixed, row_meta
from lmlab.data.shards import ShardWriter, write_index, written_places
from lmlab.data.sources import DataConfig, ShardsData, cache_root
from lmlab.data.split import SIDES, SplitPlan, plan_split
from lmlab.data.tally import Tally
from lmlab.records import Document, Record, Segment, UserError

OnDocument = Callable[[EncodedDocument, str], None]
ENCODING_VERSION = {"pretrain": 4, "sft": 5}
"""Of each task; raise it whenever the same data and tokenizer would give other files."""
LONG_TEXT = 200_000
"""Characters from which a plain text is encoded in pieces: one call's offsets would take a hundred times its size."""
PIECE = 2**20


@dataclass(frozen=True)
class TextEncoder:
    """The tokenizer as data preparation needs it (built in start.py; data never imports the tokenizers package).

    Attributes:
        encode: one document, with offsets.
        encode_long: ids of a document of any size, given and returned in pieces: those of one call, with BOS and EOS.
        decode: ids to text.
        vocab_size: one more than the largest id.
        key: hash of all that decides ids and rendered texts.
        text_key: the same without the chat template, for text that was encoded before.
        render_chat: the chat template's rendering, or None without a template.
        special_tokens: texts that are one special token each.
    """

    encode: Encode
    encode_long: Callable[[Iterable[str]], Iterator[np.ndarray]]
    decode: Callable[[list[int]], str]
    eos_token_id: int
    vocab_size: int
    key: str
    text_key: str = ""
    render_chat: RenderChat | None = None
    special_tokens: Collection[str] = ()


def data_key(config: DataConfig, encoder: TextEncoder, *, task: str) -> str:
    """Hash of everything the prepared files depend on."""
    parts: list[Any] = [ENCODING_VERSION[task], config.model_dump(mode="json"), encoder.key, task]
    if isinstance(config, MixData):
        parts += [data_key(part, encoder, task=task) for _, _, part in config.parts()]
    else:
        code = format_key(config.format_for(task))
        parts += [config.content_key(), template_source(config.template), code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def prepare(config: DataConfig, encoder: TextEncoder, *, task: str) -> PreparedData:
    """The prepared data set, from the cache or made now.

    Raises:
        UserError: no usable record, a bad one (``on_bad_record=error``), an empty side, or shards of another tokenizer.
    """
    key = data_key(config, encoder, task=task)
    folder = cache_root() / "prepared" / key
    if (folder / "meta.json").exists():
        found = PreparedData.load(folder)
        if found.is_whole:
            return found
        shutil.rmtree(folder)
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


def encode_to_measure(
    config: DataConfig,
    encoder: TextEncoder,
    folder: Path,
    *,
    task: str,
    side: str = "all",
    limit: int | None = None,
    on_document: OnDocument | None = None,
) -> PreparedData:
    """Encode into ``folder`` what a model is to be measured on, as training would; its rows are the ``val`` ones.

    Args:
        side: ``all`` records, or those that the split puts on one side (train, val, test).
        limit: at most so many documents, the first ones.
        on_document: called with each encoded document and its place (of a long text, with its beginning).

    Raises:
        UserError: nothing to predict in it, a bad record, or a source that cannot be read record by record.
    """
    if isinstance(config, MixData):
        fix = "give its sources one by one"
        raise UserError("a mix of sources is not measured as one", where="--data", fix=fix)
    encoding = _Encoding(config, encoder, task=task)
    meta = encoding.write_one(folder, side, limit=limit, on_document=on_document)
    return PreparedData(folder, meta)


def _write(folder: Path, config: DataConfig, encoder: TextEncoder, *, task: str) -> None:
    folder.mkdir(parents=True)
    if isinstance(config, MixData):
        made = [(name, weight, prepare(part, encoder, task=task)) for name, weight, part in config.parts()]
        meta, examples = mixed(made)
    elif isinstance(config, ShardsData):
        meta, examples = from_shards(config, encoder.decode, tokenizer_hash=encoder.text_key)
    else:
        meta, examples = _Encoding(config, encoder, task=task).write(folder)
    (folder / "mask_preview.json").write_text(json.dumps(examples, ensure_ascii=False), encoding="utf-8")
    (folder / "mask_preview.txt").write_text(preview.mask_preview(examples), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


# --- one source of records ------------------------------------------------------------------------------------------


class _Encoding:
    """One pass over one source: format, encode, write, count."""

    def __init__(self, config: DataConfig, encoder: TextEncoder, *, task: str) -> None:
        self.config, self.encoder, self.task = config, encoder, task
        self.format_name = config.format_for(task)
        self.format = formats.get(self.format_name)
        self.options = _options(
            config, task=task, render_chat=encoder.render_chat, special_tokens=encoder.special_tokens
        )
        self.stream = task == "pretrain" or self.format_name == "text"
        self.policy = LengthPolicy(None if self.stream else config.max_length, config.too_long)
        self.intake = Intake(config.on_bad_record)
        self.tally = Tally(self.intake)

    def write(self, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The sides under ``folder``; (meta.json, the examples shown)."""
        plan = _plan(self.config, task=self.task, format_name=self.format_name)
        sides = SIDES if self.config.test_fraction else SIDES[:2]
        self._fill(folder, plan.sides(self.config.records(self.intake, task=self.task)), sides)
        _check_sides(self.config, self.tally, sides)
        meta = self._meta()
        rows = PreparedData(folder, meta).rows("train")
        meta["report"]["rows"] = {"train": len(rows)}
        if meta["packing"] and not self.stream:
            tokens = meta["report"]["train"]["tokens"]
            meta["report"]["fill"] = tokens / (len(rows) * self.config.max_length)
        return meta, self.tally.examples()

    def write_one(
        self, folder: Path, side: str, *, limit: int | None, on_document: OnDocument | None
    ) -> dict[str, Any]:
        """One side of the split, or ``all`` records, as the validation side under ``folder``; its meta.json."""
        plan = _plan(self.config, task=self.task, format_name=self.format_name)
        records = self.config.records(self.intake, task=self.task)
        if side != "all":
            records = (record for found, record in plan.sides(records) if found == side)
        chosen = (("val", record) for record in records)
        self._fill(folder, chosen, ("val",), limit=limit, on_document=on_document)
        if not self.tally.sides["val"].lengths:
            dropped = ", ".join(f"{reason}: {n}" for reason, n in sorted(self.intake.dropped.items()))
            raise UserError(
                f"nothing to measure: {self.intake.read} records read, dropped {dropped or 'none'}",
                where=_where(self.config),
                fix="give records with text to predict, or raise data.max_length"
                if side == "all"
                else f"the split has no record on its {side} side: give more records",
            )
        return self._meta()

    def _fill(
        self,
        folder: Path,
        chosen: Iterable[tuple[str, Record]],
        sides: tuple[str, ...],
        *,
        limit: int | None = None,
        on_document: OnDocument | None = None,
    ) -> None:
        """Encode and write (side, record) pairs, at most ``limit`` documents; the rest of them is not looked at."""
        writers = {
            side: ShardWriter(folder / side, vocab_size=self.encoder.vocab_size, flags=True) for side in sides
        }
        with contextlib.ExitStack() as stack:
            places = {side: stack.enter_context(written_places(folder / side)) for side in sides}
            if self.stream:
                # One untrained EOS before the first document, so that its first token is predicted too.
                for side, writer in writers.items():
                    writer.add(np.asarray([self.encoder.eos_token_id]), np.zeros(1, bool))
                    places[side]("")
            for side, record in chosen:
                try:
                    encoded = self._one(side, record, writers[side])
                except BadRecordError as error:
                    if error.reason in ("no trained token", "too long"):  # the length policy's own doing
                        self.intake.drop(error.reason, where=record.where, detail=error.detail)
                    else:
                        self.intake.bad(error.reason, where=record.where, detail=error.detail)
                    continue
                places[side](record.where)
                if on_document is not None:
                    on_document(encoded, record.where)
                if limit is not None and sum(len(s.lengths) for s in self.tally.sides.values()) >= limit:
                    break
        for side, writer in writers.items():
            write_index(folder / side, [writer.close()])

    def _one(self, side: str, record: Record, writer: ShardWriter) -> EncodedDocument:
        """Encode and write one record; what comes back of a long text is its beginning."""
        if self.format_name == "text" and len(str(record.fields.get(self._text_column) or "")) > LONG_TEXT:
            return self._long_text(side, record, writer)
        encoded = fit_document(
            record,
            self.format_name,
            self.format,
            self.options,
            self.encoder.encode,
            eos_token_id=self.encoder.eos_token_id,
            policy=self.policy,
        )
        self.intake.truncated += encoded.truncated
        writer.add(encoded.ids, encoded.trained)
        self.tally.add(side, encoded, record.where)
        return encoded

    @property
    def _text_column(self) -> str:
        return self.config.columns.get("text", "text")

    def _long_text(self, side: str, record: Record, writer: ShardWriter) -> EncodedDocument:
        """A text of any size: the same ids as `fit_document` would give, without its offsets."""
        text = self.format(record, self.options).segments[0].text
        before, trained = writer.num_tokens, writer.num_trained
        head = self._encoded(text[:2000])
        pieces = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
        for number, ids in enumerate(self.encoder.encode_long(pieces)):
            flags = np.ones(len(ids), bool)
            flags[:1] = number > 0 or head.trained[0]  # a BOS stands for no character
            writer.append(ids, flags)
        writer.end_document()
        self.tally.add(
            side,
            head,
            record.where,
            tokens=writer.num_tokens - before,
            supervised=writer.num_trained - trained,
            supervised_bytes=len(text.encode("utf-8")),
        )
        return head

    def _encoded(self, text: str) -> EncodedDocument:
        document = Document((Segment(text, True),), ends=False)
        return encode_document(document, self.encoder.encode, self.encoder.eos_token_id)

    def _meta(self) -> dict[str, Any]:
        return {
            "report": self.tally.report(),
            "parts": [{"folder": ".", "name": self.config.kind, "weight": 1.0}],
            **row_meta(self.config, stream=self.stream),
            "format": self.format_name,
            "template": self.options.template if self.format_name == "triples" else None,
            "val_prompts": self.tally.val_prompts(),
        }


def _plan(config: DataConfig, *, task: str, format_name: str) -> SplitPlan:
    """One look at all records: how they are split, and whether the columns are there."""
    text_column = config.columns.get("text", "text") if format_name == "text" else None
    records = config.records(Intake(config.on_bad_record), task=task)
    plan = plan_split(records, config.val_fraction, config.test_fraction, text_column=text_column)
    _check_columns(config, format_name, plan)
    return plan


def _check_columns(config: DataConfig, format_name: str, plan: SplitPlan) -> None:
    """Refuse a column that no record has: a mistyped ``input`` would otherwise be empty everywhere, without a word."""
    for field in FIELDS.get(format_name, ()):
        column = config.columns.get(field, field)
        absent = column not in plan.columns and not (column == "messages" and "conversations" in plan.columns)
        if plan.num_records and absent and (column, field) != ("input", "input"):
            raise UserError(
                f"no record has a field '{column}', as data.format={format_name} needs it",
                where=f"data.columns.{field}",
                fix=f"name one of {', '.join(sorted(plan.columns)[:12]) or 'no fields at all'}, or choose another data.format",
            )


def training_texts(config: DataConfig, *, task: str) -> Iterator[str]:
    """The texts of the training side, for training a tokenizer that never sees the others."""
    return (text for _, text in side_texts(config, task=task, side="train"))


def side_texts(config: DataConfig, *, task: str, side: str) -> Iterator[tuple[Record, str]]:
    """The records of one side (``train``, ``val`` or ``test``) with the texts they become."""
    if isinstance(config, MixData):
        for _, _, part in config.parts():
            yield from side_texts(part, task=task, side=side)
        return
    intake = Intake(config.on_bad_record)
    format_name = config.format_for(task)
    options = _options(config, task=task, render_chat=_plain_chat)
    format = formats.get(format_name)
    plan = _plan(config, task=task, format_name=format_name)
    for of_side, record in plan.sides(config.records(intake, task=task)):
        if of_side != side:
            continue
        try:
            yield record, "".join(segment.text for segment in format(record, options).segments)
        except BadRecordError as error:
            intake.bad(error.reason, where=record.where, detail=error.detail)


def _plain_chat(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    # The tokenizer in the making has no chat template yet; its marks will be special tokens, which are not learned.
    turns = "".join(f"{message['role']}\n{message['content']}\n" for message in messages)
    return turns + ("assistant\n" if add_generation_prompt else "")


def _options(
    config: DataConfig, *, task: str, render_chat: RenderChat | None, special_tokens: Collection[str] = ()
) -> FormatOptions:
    return FormatOptions(
        template_source(config.template),
        config.columns,
        render_chat,
        train_all=task == "pretrain",
        special_tokens=special_tokens,
    )


def _where(config: DataConfig) -> str:
    return str(getattr(config, "path", None) or getattr(config, "name", None) or config.kind)


def _check_sides(config: DataConfig, tally: Tally, sides: tuple[str, ...]) -> None:
    """Every side needs a record.

    Raises:
        UserError: with what was read, dropped and left.
    """
    counts = {side: len(tally.sides[side].lengths) for side in sides}
    if all(counts.values()):
        return
    names = {"train": "train", "val": "validation", "test": "test"}
    empty = next(names[side] for side, count in counts.items() if not count)
    dropped = ", ".join(f"{reason}: {n}" for reason, n in sorted(tally.intake.dropped.items())) or "none"
    raise UserError(
        f"no {empty} record: {tally.intake.read} read, dropped {dropped}, "
        f"left {counts['train']} to train on and {counts['val']} to validate on",
        where=_where(config),
        fix="give more records; equal ones, and those of one group, stay on one side",
    )

"""A prepared data set as training sees it: rows to map, the order they come in, and what was counted.

Besides one encoded source (prepare.py) it may be a mix of several, drawn by weight, or a directory of
tokenize_corpus.py, used where it lies.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.data.corpus import CorpusIndex
from lmlab.data.corpus_copy import corpus_folder, fetch_shards
from lmlab.data.order import EndlessOrder, MixedOrder
from lmlab.data.packing import DocumentRows, MixedRows, StreamRows
from lmlab.data.shards import INDEX, Shards
from lmlab.data.sources import DataConfig
from lmlab.data.split import SIDES
from lmlab.data.tally import length_figures
from lmlab.records import UserError

Rows = DocumentRows | StreamRows | MixedRows


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set on disk.

    Attributes:
        folder: where it lies.
        meta: ``report`` (counts), ``parts`` (folder, name and weight of each source), ``stream`` (whether rows are
            windows of a stream), ``format``, ``template``, ``val_prompts`` (prompt and response of validation documents).
    """

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> PreparedData:
        """Map a folder written by `prepare`."""
        return cls(folder, json.loads((folder / "meta.json").read_text(encoding="utf-8")))

    @property
    def examples(self) -> list[dict[str, Any]]:
        """What a person is shown of it (preview.py)."""
        return json.loads((self.folder / "mask_preview.json").read_text(encoding="utf-8"))

    @property
    def is_whole(self) -> bool:
        """Whether all it names is still there: parts lie in folders of their own, which somebody may have cleared."""
        folders = [self.folder / part["folder"] for part in self.meta["parts"]]
        return all((folder / side / INDEX).is_file() for folder in folders for side in SIDES[:2])

    @property
    def packed(self) -> bool:
        """Whether a row holds documents that must not see one another, which takes the flat layout."""
        return self.meta["apart"] if self.meta["stream"] else self.meta["packing"]

    @property
    def wants_flat(self) -> bool:
        """Whether the flat layout is of use: rows of unequal lengths, or documents apart. Windows have one width."""
        return self.meta["apart"] or not self.meta["stream"]

    def rows(self, split: str) -> Rows:
        """Examples of ``train``, ``val`` or ``test``; only training rows are packed, so that no figure depends on packing."""
        parts = [self._rows(self.folder / part["folder"] / split, split) for part in self.meta["parts"]]
        return parts[0] if len(parts) == 1 else MixedRows(parts)

    def _rows(self, folder: Path, split: str) -> DocumentRows | StreamRows:
        shards, length = Shards(folder), self.meta["max_length"]
        if self.meta["stream"]:
            return StreamRows(shards, max_length=length, apart=self.meta["apart"])
        return DocumentRows(shards, max_length=length, packing=self.meta["packing"] and split == "train")

    def order(self, rows: Rows, *, seed: int) -> EndlessOrder | MixedOrder:
        """The endless order over training rows: shuffled epochs, or sources drawn by their weights."""
        if not isinstance(rows, MixedRows):
            return EndlessOrder(len(rows), seed=seed)
        weights = [part["weight"] for part in self.meta["parts"]]
        return MixedOrder([len(part) for part in rows.parts], weights, seed=seed)


def row_meta(config: DataConfig, *, stream: bool) -> dict[str, Any]:
    """How rows are cut from the sides."""
    return {
        "stream": stream,
        "packing": config.packing,
        "apart": not config.cross_document_attention,
        "max_length": config.max_length,
    }


def mixed(made: list[tuple[str, float, PreparedData]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Meta and examples of several prepared sources with their names and weights.

    Raises:
        UserError: texts and records with a response together, outside pretraining.
    """
    metas = [prepared.meta for _, _, prepared in made]
    if len({meta["stream"] for meta in metas}) > 1:
        kinds = ", ".join(f"{name}: {prepared.meta['format']}" for name, _, prepared in made)
        raise UserError(
            f"texts and records with a response cannot be mixed ({kinds})",
            where="data.sources",
            fix="use task=pretrain, where all of it is text, or sources of one kind",
        )
    first = metas[0]
    if not first["stream"]:
        _refuse_different_prompts(made)
    report = merged_report([(name, weight, prepared.meta["report"]) for name, weight, prepared in made])
    report["rows"] = {"train": sum(meta["report"]["rows"]["train"] for meta in metas)}
    # Of shards made before the folder is their own, elsewhere.
    folders = [prepared.folder / prepared.meta["parts"][0]["folder"] for _, _, prepared in made]
    lengths = [
        Shards(folder / side).lengths()[1 if first["stream"] else 0 :]
        for folder in folders
        for side in SIDES
        if (folder / side).is_dir()
    ]
    report.update(length_figures(np.concatenate(lengths)))
    prompts = [meta["val_prompts"] for meta in metas]
    longest = max(len(each) for each in prompts)
    meta = {
        **first,
        "report": report,
        "parts": [
            {"folder": str(folder), "name": name, "weight": weight}
            for (name, weight, _), folder in zip(made, folders, strict=True)
        ],
        "val_prompts": [each[i] for i in range(longest) for each in prompts if i < len(each)],
    }
    shown = [prepared.examples for _, _, prepared in made]
    return meta, [each[i] for i in range(5) for each in shown if i < len(each)][:5]


def _refuse_different_prompts(made: list[tuple[str, float, PreparedData]]) -> None:
    """Generation has one way to put a question: that of training, so all sources must have put theirs alike."""
    ways = {
        (
            prepared.meta["format"] == "messages",
            prepared.meta["template"],
        ): f"{name}: {prepared.meta['format']}"
        for name, _, prepared in made
        if prepared.meta["format"] in ("messages", "triples")
    }
    if len(ways) > 1:
        raise UserError(
            f"sources that put their questions in different ways cannot be mixed ({', '.join(ways.values())})",
            where="data.sources",
            fix="give them one data.template, or make all of them triples or all messages",
        )


def merged_report(parts: list[tuple[str, float, dict[str, Any]]]) -> dict[str, Any]:
    """The data report of a mix: sums over its sources, and a row for each under ``sources``."""
    reports = [report for _, _, report in parts]
    counts = ("records_read", "records_kept", "records_truncated", "tokens", "supervised_tokens")
    merged: dict[str, Any] = {name: sum(report[name] for report in reports) for name in counts}
    reasons = sorted({reason for report in reports for reason in report["records_dropped"]})
    merged["records_dropped"] = {
        reason: sum(report["records_dropped"].get(reason, 0) for report in reports) for reason in reasons
    }
    merged["dropped_examples"] = [row for report in reports for row in report["dropped_examples"]][:20]
    for side in SIDES:
        present = [report[side] for report in reports if side in report]
        if present:
            merged[side] = {name: sum(each[name] for each in present) for name in present[0]}
    for name, choose in (("longest", max), ("shortest", min)):
        ends = [report[name] for report in reports if name in report]
        if ends:
            merged[name] = choose(ends, key=lambda row: row["tokens"])
    merged["sources"] = [
        {"name": name, "weight": weight, **{k: report[k] for k in counts}} for name, weight, report in parts
    ]
    return merged


def from_shards(
    config: Any, decode: Callable[[list[int]], str], *, tokenizer_hash: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Meta of a corpus of tokenize_corpus.py: of a directory nothing is copied or loaded, of a URL all shards.

    Raises:
        UserError: made with another tokenizer.
    """
    folder = corpus_folder(config.path)
    index = CorpusIndex.load(folder)
    if config.test_fraction:
        raise UserError(
            f"data.test_fraction={config.test_fraction} of shards, which have no test side",
            where="data.test_fraction",
            fix="data.test_fraction=0; their validation side was drawn when they were made",
        )
    if index.tokenizer_hash != tokenizer_hash:
        raise UserError(
            "the shards were made with another tokenizer than this run's",
            where=str(folder),
            fix=f"tokenizer=file tokenizer.path={folder / 'tokenizer'}",
        )
    fetch_shards(config.path)
    val = Shards(folder / "val")
    prompts = []
    for document in range(1, min(val.num_documents, 513)):
        start, end = val.span(document)
        text = decode(val.read(start, min(end, start + 64))[0].tolist())
        prompts.append({"prompt": text[:60].rsplit(" ", 1)[0], "response": ""})
    train = Shards(folder / "train")
    examples = []
    for document in range(1, min(train.num_documents, 6)):
        start, end = train.span(document)
        text = decode(train.read(start, min(end, start + 256))[0].tolist())
        examples.append(
            {
                "where": f"train document {document}",
                "tokens": end - start,
                "supervised_tokens": end - start,
                "truncated": False,
                "spans": [[text, True]],
            }
        )
    lengths = [Shards(folder / side).lengths()[1:] for side in ("train", "val")]
    report = {**index.report, **length_figures(np.concatenate(lengths))}
    meta = {
        "report": report,
        "parts": [{"folder": str(folder), "name": "shards", "weight": 1.0}],
        **row_meta(config, stream=True),
        "format": "text",
        "template": None,
        "val_prompts": [p for p in prompts if p["prompt"].strip()],
    }
    rows = StreamRows(train, max_length=config.max_length)
    meta["report"]["rows"] = {"train": len(rows)}
    return meta, examples

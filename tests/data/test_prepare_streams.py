"""Texts of any size, documents kept apart, a test side: what preparing does beyond single records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab.data import prepare as module
from lmlab.data.packing import StreamRows
from lmlab.data.prepare import TextEncoder, prepare
from lmlab.data.shards import Shards
from lmlab.records import IGNORE_INDEX

Make = Callable[..., Any]
Write = Callable[..., Path]


@pytest.mark.parametrize("tokenizer", ["bpe", "stories"])
def test_a_long_text_gets_the_ids_of_one_call(
    tmp_path: Path,
    make_config: Make,
    make_encoder: Callable[[Any], TextEncoder],
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tokenizer: str,
) -> None:
    text = "".join(f"Line {i}:  über 中日 of the  book.\n\n" for i in range(900))
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "b.txt").write_text(text[::-1], encoding="utf-8")
    encoder = make_encoder(request.getfixturevalue(tokenizer))
    config = make_config("text", path=str(folder))
    whole = prepare(config, encoder, task="pretrain")
    monkeypatch.setattr(module, "LONG_TEXT", 100)
    monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(module, "data_key", lambda *a, **k: "in-pieces")
    pieces = prepare(config, encoder, task="pretrain")
    for side in ("train", "val"):
        one, many = Shards(whole.folder / side), Shards(pieces.folder / side)
        assert one.num_documents == many.num_documents == 2
        for a, b in zip(one.read(0, one.num_tokens), many.read(0, many.num_tokens), strict=True):
            assert a.tolist() == b.tolist()
    for key in ("tokens", "supervised_tokens", "train", "val", "length_histogram"):
        assert pieces.meta["report"][key] == whole.meta["report"][key]
    first = pieces.examples[0]
    assert first["tokens"] == pieces.meta["report"]["train"]["tokens"]


def test_the_test_side_holds_the_rest(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(200)]
    config = make_config("jsonl", path=str(write_jsonl(*rows)), val_fraction=0.1, test_fraction=0.2)
    made = prepare(config, encoder, task="sft")
    report = made.meta["report"]
    assert sum(report[side]["records"] for side in ("train", "val", "test")) == report["records_kept"] == 200
    assert len(made.rows("test")) == report["test"]["records"] > 20
    without = prepare(
        make_config("jsonl", path=str(write_jsonl(*rows)), val_fraction=0.1), encoder, task="sft"
    )
    assert "test" not in without.meta["report"]
    assert without.meta["report"]["val"] == report["val"]


def test_documents_of_a_text_are_kept_apart_on_demand(
    write_jsonl: Write, make_config: Make, bpe: Any, encoder: TextEncoder, own_cache: Path
) -> None:
    file = str(write_jsonl(*[{"text": f"Text {i} of many."} for i in range(40)]))
    common = {"path": file, "max_length": 32, "val_fraction": 0.2}
    together = prepare(make_config("text", **common), encoder, task="pretrain")
    apart = prepare(make_config("text", cross_document_attention=False, **common), encoder, task="pretrain")
    assert (together.packed, together.wants_flat) == (False, False)
    assert (apart.packed, apart.wants_flat) == (True, True)
    rows, plain = apart.rows("train"), together.rows("train")
    assert isinstance(rows, StreamRows)
    assert len(rows) == len(plain)
    starts = 0
    for index in range(len(rows)):
        assert rows[index].labels.equal(plain[index].labels)
        assert IGNORE_INDEX not in rows[index].labels
        assert plain[index].lengths == (len(plain[index].input_ids),)
        place = 0
        for length in rows[index].lengths:
            segment = bpe.decode(rows[index].input_ids[place : place + length])
            starts += segment.startswith("<|endoftext|>")
            assert "<|endoftext|>" not in segment[1:]  # nothing of the document before
            place += length
    assert starts == apart.meta["report"]["train"]["records"]

"""The validation split: stable, whole groups, never empty, and the last part of a text that is one document."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab.data.files import Intake
from lmlab.data.prepare import TextEncoder, prepare, training_texts
from lmlab.data.shards import Shards
from lmlab.data.split import plan_split
from lmlab.records import Record, UserError

Make = Callable[..., Any]
Write = Callable[..., Path]
TRIPLE = {"instruction": "Say 0.", "input": "0", "output": "It is 0."}


def records(*texts: str, group: Callable[[int], str] | None = None) -> list[Record]:
    return [Record({"text": t, "n": 0}, f"x:{i}", group(i) if group else None) for i, t in enumerate(texts)]


def split_records(
    made: list[Record], val_fraction: float, test_fraction: float = 0.0, *, text_column: str | None = None
) -> tuple[list[Record], list[Record]]:
    """(train, validation) of records in memory."""
    plan = plan_split(made, val_fraction, test_fraction, text_column=text_column)
    sides: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    for side, record in plan.sides(made):
        sides[side].append(record)
    return sides["train"], sides["val"]


def decoded(bpe: Any, folder: Path, **options: Any) -> str:
    shards = Shards(folder)
    return str(bpe.decode(shards.read(0, shards.num_tokens)[0], **options))


def test_adding_records_moves_no_old_one() -> None:
    old = records(*(f"text {i}" for i in range(400)))
    train, val = split_records(old, 0.1)
    assert len(train) + len(val) == 400
    assert 20 <= len(val) <= 60
    grown = records(*(f"new {i}" for i in range(300))) + old
    more_train, more_val = split_records(grown[::-1], 0.1)
    assert [r for r in more_val[::-1] if r in val] == val
    assert [r for r in more_train[::-1] if r in train] == train
    wider = split_records(old, 0.3)[1]
    assert [r for r in wider if r in val] == val  # a larger share only adds to it


def test_a_group_is_never_on_both_sides() -> None:
    made = records(*(f"text {i}" for i in range(300)), group=lambda i: f"book {i % 30}")
    train, val = split_records(made, 0.2)
    assert not {r.group for r in train} & {r.group for r in val}
    assert len({r.group for r in train} | {r.group for r in val}) == 30
    assert val


def test_a_few_records_give_both_sides() -> None:
    draw = random.Random(0)
    for number in (2, 3, 4):
        for fraction in (0.001, 0.05, 0.5, 0.999):
            for _ in range(30):
                made = records(*(str(draw.random()) for _ in range(number)))
                train, val = split_records(made, fraction)
                assert train
                assert val
                assert sorted(r.where for r in train + val) == [r.where for r in made]
                assert split_records(made, fraction) == (train, val)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_records_all_alike_cannot_be_split(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path, number: int
) -> None:
    file = write_jsonl(*[TRIPLE] * number)
    expected = (
        f"no train record: {number} read, dropped none, left 0 to train on and {number} to validate on ({file}): "
        "give more records; equal ones, and those of one group, stay on one side"
    )
    with pytest.raises(UserError) as caught:
        prepare(make_config("jsonl", path=str(file)), encoder, task="sft")
    assert str(caught.value) == expected
    assert not list(own_cache.rglob("*.tokens"))


def test_nothing_left_says_where_it_went(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    file = write_jsonl(
        b"{", {"instruction": "x"}, {"instruction": "x", "output": "y"}, {"instruction": 3, "output": "y"}
    )
    config = make_config("jsonl", path=str(file), on_bad_record="skip")
    expected = "no validation record: 4 read, dropped broken JSON: 1, instruction is not text: 1, no output: 1, left 1 to train on and 0"
    with pytest.raises(UserError, match=expected):
        prepare(config, encoder, task="sft")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_one_text_gives_its_last_part(
    tmp_path: Path,
    make_config: Make,
    bpe: Any,
    encoder: TextEncoder,
    own_cache: Path,
    kind: str,
    newline: str,
) -> None:
    text = newline.join(f"Line {i} of the only text." for i in range(100))
    if kind == "text":
        file = tmp_path / "book.txt"
        file.write_bytes(text.encode())
        config = make_config("text", path=str(file), val_fraction=0.2)
    else:
        file = tmp_path / "book.jsonl"
        file.write_text(json.dumps({"id": 1, "body": text}))
        config = make_config(
            "jsonl", path=str(file), val_fraction=0.2, format="text", columns={"text": "body"}
        )
    made = prepare(config, encoder, task="pretrain")
    train, val = (decoded(bpe, made.folder / split) for split in ("train", "val"))
    eos = "<|endoftext|>"
    assert train.removeprefix(eos).removesuffix(eos) + val.removeprefix(eos).removesuffix(eos) == text
    assert len(val) - 2 * len(eos) == round(0.2 * len(text))
    assert list(training_texts(config, task="pretrain")) == [train[len(eos) : -len(eos)]]
    assert made.meta["report"]["records_read"] == made.meta["report"]["records_kept"] == 1


def test_white_space_at_a_texts_end_is_no_validation_set(
    tmp_path: Path, make_config: Make, bpe: Any, encoder: TextEncoder, own_cache: Path
) -> None:
    file = tmp_path / "short.txt"
    file.write_text("A short text." + "\n" * 9)
    made = prepare(make_config("text", path=str(file)), encoder, task="pretrain")
    assert decoded(bpe, made.folder / "val", skip_special_tokens=True) == "." + "\n" * 9
    file.write_text("A\n")
    with pytest.raises(UserError, match="a text of 2 characters is too short to hold out its last part"):
        prepare(make_config("text", path=str(file)), encoder, task="pretrain")


def test_whole_books_are_held_out(real_data: Path, make_config: Make) -> None:
    config = make_config("text", path=str(real_data / "clm" / "books"))
    books = list(config.records(Intake("error"), task="pretrain"))
    assert len(books) == 3
    train, val = split_records(books, 0.05, text_column="text")
    assert (len(train), len(val)) == (2, 1)
    assert split_records(books[::-1], 0.05, text_column="text") == (train[::-1], val)


def test_a_test_set_takes_nothing_from_validation() -> None:
    made = records(*(f"text {i}" for i in range(400)))
    plan, without = plan_split(made, 0.1, 0.2), plan_split(made, 0.1)
    sides = {side: [r for s, r in plan.sides(made) if s == side] for side in ("train", "val", "test")}
    assert 40 <= len(sides["test"]) <= 120
    assert sides["val"] == [r for s, r in without.sides(made) if s == "val"]
    assert sorted(r.where for side in sides.values() for r in side) == sorted(r.where for r in made)
    wider = plan_split(made, 0.3, 0.2)
    assert [r for s, r in wider.sides(made) if s == "test"] == sides["test"]


def test_one_text_gives_validation_and_test_from_its_end() -> None:
    text = "".join(f"{i} " for i in range(1000))
    plan = plan_split([Record({"text": text}, "book")], 0.1, 0.05, text_column="text")
    parts = {side: r.fields["text"] for side, r in plan.sides([Record({"text": text}, "book")])}
    assert parts["train"] + parts["val"] + parts["test"] == text
    assert (len(parts["val"]), len(parts["test"])) == (round(0.1 * len(text)), round(0.05 * len(text)))


def test_white_space_at_a_texts_end_is_no_side() -> None:
    for tail in ("\n" * 50, " " * 500):
        record = Record({"text": "A text of some words." * 5 + tail}, "book")
        for test_fraction in (0.0, 0.1):
            plan = plan_split([record], 0.1, test_fraction, text_column="text")
            parts = [r.fields["text"] for _, r in plan.sides([record])]
            assert "".join(parts) == record.fields["text"]
            assert len(parts) == (3 if test_fraction else 2)
            assert all(part.strip() for part in parts)

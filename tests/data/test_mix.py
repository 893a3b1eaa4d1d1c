"""Several sources by weight, and shards made before: their config, their errors, and what training gets of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lmlab.data.corpus import CorpusOptions, build_corpus
from lmlab.data.packing import MixedRows, StreamRows
from lmlab.data.prepare import TextEncoder, prepare, training_texts
from lmlab.data.prepared import PreparedData
from lmlab.records import UserError
from lmlab.tokenizers import tokenizer_hash
from lmlab.tokenizers.fast import FastEncoder

Make = Callable[..., Any]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """Triples in .jsonl and .csv, and two texts."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "one.jsonl").write_text(
        "".join(json.dumps({"instruction": f"Say {i}.", "output": f"One {i}."}) + "\n" for i in range(60))
    )
    (folder / "two.csv").write_text("q,a\n" + "".join(f"Ask {i},Two {i}.\n" for i in range(30)))
    (folder / "book.txt").write_text("".join(f"Sentence {i} of the book. " for i in range(200)))
    (folder / "more.txt").write_text("".join(f"Another line, {i}.\n" for i in range(300)))
    return {file.stem: str(file) for file in folder.iterdir()}


def test_a_mix_of_records_is_drawn_by_weight(
    sources: dict[str, str], make_config: Make, encoder: TextEncoder, own_cache: Path, bpe: Any
) -> None:
    two = {"path": sources["two"], "weight": 1, "columns": {"instruction": "q", "output": "a"}}
    config = make_config("mix", sources=[{"path": sources["one"], "weight": 3}, two], val_fraction=0.2)
    made = prepare(config, encoder, task="sft")
    report = made.meta["report"]
    assert report["records_read"] == report["records_kept"] == 90
    assert [(row["name"], row["weight"], row["records_kept"]) for row in report["sources"]] == [
        ("one", 0.75, 60),
        ("two", 0.25, 30),
    ]
    assert sum(report["length_histogram"]["counts"]) == 90
    rows = made.rows("train")
    assert isinstance(rows, MixedRows)
    assert len(rows) == report["rows"]["train"] == report["train"]["records"]
    order = made.order(rows, seed=1)
    said = Counter(
        "One" in bpe.decode(rows[order[i]].input_ids) for i in range(400)
    )  # the csv's answers say "Two"
    assert abs(said[True] - 300) <= 3
    val = made.rows("val")
    assert len(val) == report["val"]["records"]
    kinds = {prompt["response"][:3] for prompt in made.meta["val_prompts"][:2]}
    assert kinds == {"One", "Two"}  # samples show both
    assert made.meta["val_prompts"][0]["prompt"]
    assert len(made.examples) == 5
    again = PreparedData.load(made.folder)
    assert again.rows("train")[0].input_ids.equal(rows[0].input_ids)


def test_a_mix_of_texts_is_windows_of_each(
    sources: dict[str, str], make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    parts = [{"kind": "text", "path": sources[name], "weight": 1} for name in ("book", "more")]
    config = make_config("mix", sources=parts, max_length=32, val_fraction=0.1)
    made = prepare(config, encoder, task="pretrain")
    rows = made.rows("train")
    assert isinstance(rows, MixedRows)
    assert all(isinstance(part, StreamRows) for part in rows.parts)
    assert made.meta["stream"]
    texts = "".join(training_texts(config, task="pretrain"))
    assert texts.startswith("Sentence 0 of the book.")
    assert "Another line, 0." in texts


def test_texts_and_answers_do_not_mix_in_fine_tuning(
    sources: dict[str, str], make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    parts = [{"path": sources["one"], "weight": 1}, {"kind": "text", "path": sources["book"], "weight": 1}]
    config = make_config("mix", sources=parts)
    with pytest.raises(UserError, match=r"cannot be mixed \(one: triples, book: text\) \(data.sources\)"):
        prepare(config, encoder, task="sft")
    assert prepare(config, encoder, task="pretrain").meta["stream"]


FILE = {"path": "a.jsonl"}
WRONG = [
    ([], "a mix of no sources (data.sources): 'data.sources=[{path"),
    (["a.jsonl"], "'a.jsonl' is no source (data.sources[0]): write {path: FILE, weight: NUMBER}"),
    ([FILE], "a source without a weight (data.sources[0]): add weight: 1, or another number above 0"),
    ([FILE | {"weight": 0}], "0 is not allowed (data.sources[0].weight): must be a number above 0"),
    ([FILE | {"weight": "3"}], "'3' is not allowed (data.sources[0].weight): must be a number above 0"),
    ([{"weight": 1}], "a source without kind, path or name (data.sources[0]): name its kind, or give path"),
    ([FILE | {"weight": 1, "kind": "mix"}], "a mix inside a mix (data.sources[0]): list its sources here"),
    ([FILE | {"weight": 1, "kind": "text_"}], "'text_' is not allowed (data.sources[0].kind): did you mean 'text'?"),
    ([FILE | {"weight": 1, "colums": {}}], "unknown key (data.sources[0].colums): did you mean 'columns'?"),
    ([FILE | {"weight": 1, "max_length": 9}], "max_length is one for the whole mix (data.sources[0].max_length): set data.max_length instead"),
    ([FILE | {"weight": 1, "chat_template": "vicuna"}], "chat_template is one for the whole mix (data.sources[0].chat_template)"),
    ([FILE | {"weight": 1, "columns": {"imput": "context"}}], "unknown field (data.sources[0].columns.imput): did you mean 'input'?"),
    ([{"kind": "text", "weight": 1}], "a value is missing (data.sources[0].path): add path: ..."),
    ([FILE | {"weight": 1, "too_long": "cut"}], "'cut' is not allowed (data.sources[0].too_long): must be"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "line"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_mix_is_one_line(given: list[Any], line: str, make_config: Make) -> None:
    with pytest.raises(UserError) as caught:
        make_config("mix", sources=given)
    assert str(caught.value).startswith(line)


def test_sources_are_a_list(make_config: Make) -> None:
    with pytest.raises(ValidationError, match="valid list"):
        make_config("mix", sources="a.jsonl")


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(sources: dict[str, str], bpe: Any, tmp_path: Path) -> Path:
    """What tokenize_corpus.py makes of the two texts and a folder of small ones."""
    file = tmp_path / "small.jsonl"
    file.write_text("".join(json.dumps({"text": f"Small text number {i}."}) + "\n" for i in range(80)))
    folder = tmp_path / "corpus"
    options = CorpusOptions(
        val_fraction=0.2, column="text", shard_bytes=2000, on_bad_record="error", limit_documents=None
    )
    files = [Path(sources["book"]), Path(sources["more"]), file]
    build_corpus(
        files,
        folder,
        FastEncoder(bpe),
        options,
        tokenizer_hash=tokenizer_hash(bpe, with_chat=False),
        save_tokenizer=bpe.save_pretrained,
        workers=1,
    )
    return folder


def test_shards_are_used_where_they_lie(
    corpus: Path, make_config: Make, encoder: TextEncoder, own_cache: Path, bpe: Any
) -> None:
    made = prepare(make_config("shards", path=str(corpus), max_length=64), encoder, task="pretrain")
    assert not [file for file in own_cache.rglob("*.tokens")]
    report = made.meta["report"]
    assert report["records_read"] == 82
    assert report["train"]["records"] + report["val"]["records"] == 82
    said = ""
    for side in ("train", "val"):
        rows = made.rows(side)
        labels = [label for i in range(len(rows)) for label in rows[i].labels.tolist()]
        assert len(labels) == report[side]["tokens"] == report[side]["supervised_tokens"]
        said += bpe.decode(labels)
    assert Counter(said.split("<|endoftext|>"))["Small text number 7."] == 1
    assert "Sentence 199 of the book. " in said
    assert made.meta["val_prompts"]
    assert made.examples


def test_shards_of_another_tokenizer_are_refused(
    corpus: Path, make_config: Make, make_encoder: Callable[[Any], TextEncoder], own_cache: Path, stories: Any
) -> None:
    config = make_config("shards", path=str(corpus))
    expected = rf"the shards were made with another tokenizer than this run's \({corpus}\): tokenizer=file tokenizer.path={corpus}/tokenizer"
    with pytest.raises(UserError, match=expected):
        prepare(config, make_encoder(stories), task="pretrain")
    with pytest.raises(UserError, match="no shards: No such file or directory"):
        prepare(
            make_config("shards", path=str(corpus.parent / "none")), make_encoder(stories), task="pretrain"
        )


def test_shards_are_a_source_of_a_mix(
    corpus: Path, sources: dict[str, str], make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    parts = [
        {"kind": "shards", "path": str(corpus), "weight": 1},
        {"kind": "text", "path": sources["book"], "weight": 3},
    ]
    made = prepare(make_config("mix", sources=parts, max_length=32), encoder, task="pretrain")
    rows = made.rows("train")
    assert isinstance(rows, MixedRows)
    assert [len(part) > 0 for part in rows.parts] == [True, True]
    assert sum(made.meta["report"]["length_histogram"]["counts"]) == 82 + 2  # the book was cut in two
    assert len(made.rows("val")) > 0


def test_shards_have_no_test_side(
    corpus: Path, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    config = make_config("shards", path=str(corpus), test_fraction=0.1)
    with pytest.raises(UserError, match=r"data.test_fraction=0.1 of shards, which have no test side"):
        prepare(config, encoder, task="pretrain")


def test_questions_put_in_different_ways_are_refused(
    sources: dict[str, str], make_config: Make, encoder: TextEncoder, own_cache: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": turns, "id": i}) + "\n" for i in range(20)))
    one = {"path": sources["one"], "weight": 1}
    for other in ({"path": str(chats), "weight": 1}, one | {"template": "brief"}):
        config = make_config("mix", sources=[one, other])
        with pytest.raises(
            UserError, match="sources that put their questions in different ways cannot be mixed"
        ):
            prepare(config, encoder, task="sft")


def test_a_bos_of_shards_is_read_and_not_trained(
    sources: dict[str, str],
    make_config: Make,
    make_encoder: Callable[[Any], TextEncoder],
    own_cache: Path,
    stories: Any,
    tmp_path: Path,
) -> None:
    file = tmp_path / "small.jsonl"
    file.write_text("".join(json.dumps({"text": f"Small text number {i}."}) + "\n" for i in range(80)))
    folder = tmp_path / "corpus"
    build_corpus(
        [file],
        folder,
        FastEncoder(stories),
        CorpusOptions(0.2, "text", 2000, "error", None),
        tokenizer_hash=tokenizer_hash(stories, with_chat=False),
        save_tokenizer=stories.save_pretrained,
        workers=1,
    )
    encoder = make_encoder(stories)
    shards = prepare(make_config("shards", path=str(folder), max_length=64), encoder, task="pretrain")
    texts = prepare(make_config("text", path=str(file), max_length=64), encoder, task="pretrain")
    for key in ("tokens", "supervised_tokens"):
        assert shards.meta["report"][key] == texts.meta["report"][key]
    for side in ("train", "val"):
        rows = shards.rows(side)
        labels = [label for i in range(len(rows)) for label in rows[i].labels.tolist()]
        assert stories.bos_token_id not in labels
        assert sum(label >= 0 for label in labels) == shards.meta["report"][side]["supervised_tokens"]

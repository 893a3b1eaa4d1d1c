"""From files to prepared folders: what is counted, the cache, kills, previews and prompts."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmlab.data import prepare as module
from lmlab.data.packing import DocumentRows, StreamRows
from lmlab.data.prepare import TextEncoder, prepare, training_texts
from lmlab.data.prepared import PreparedData
from lmlab.data.shards import Shards
from lmlab.records import IGNORE_INDEX, UserError

from .conftest import random_text

Make = Callable[..., Any]
Write = Callable[..., Path]


def rows(number: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Say {i}.", "input": "" if i % 3 else f"{i}", "output": f"It is {i}."}
        for i in range(number)
    ]


def test_prepared_rows_hold_every_record(
    write_jsonl: Write, make_config: Make, bpe: Any, encoder: TextEncoder, own_cache: Path
) -> None:
    source = rows(60)
    config = make_config("jsonl", path=str(write_jsonl(*source)), template="brief", val_fraction=0.2)
    made = prepare(config, encoder, task="sft")
    spoken = []
    for split in ("train", "val"):
        split_rows = made.rows(split)
        for i in range(len(split_rows)):
            labels = split_rows[i].labels
            spoken.append(bpe.decode(labels[labels != IGNORE_INDEX]))
    assert sorted(spoken) == sorted(f"{row['output']}<|endoftext|>" for row in source)
    report = made.meta["report"]
    assert (report["records_read"], report["records_kept"], report["records_dropped"]) == (60, 60, {})
    assert report["train"]["records"] + report["val"]["records"] == 60
    assert report["supervised_tokens"] == sum(
        len(bpe(text, add_special_tokens=False).input_ids) for text in spoken
    )
    val = made.rows("val")
    assert report["val"]["supervised_tokens"] == sum(
        int((val[i].labels != IGNORE_INDEX).sum()) for i in range(len(val))
    )
    held = sum(len(p["response"].encode()) for p in made.meta["val_prompts"])
    assert report["val"]["supervised_bytes"] == held
    assert {"tokens", "tokens_per_record", "records_truncated"} <= set(report)


def test_validation_is_never_packed(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    file = write_jsonl(*rows(60))
    packed = prepare(
        make_config("jsonl", path=str(file), packing=True, val_fraction=0.2), encoder, task="sft"
    )
    train, val = packed.rows("train"), packed.rows("val")
    assert len(train) < packed.meta["report"]["train"]["records"]
    assert len(val) == packed.meta["report"]["val"]["records"]
    assert all(val[i].lengths == (len(val[i].input_ids),) for i in range(len(val)))
    plain = prepare(make_config("jsonl", path=str(file), val_fraction=0.2), encoder, task="sft").rows("val")
    assert all(val[i].labels.equal(plain[i].labels) for i in range(len(plain)))


@pytest.mark.parametrize("too_long", ["truncate_prompt", "truncate_response", "drop"])
def test_everything_is_counted(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path, too_long: str
) -> None:
    draw = random.Random(too_long)
    lines: list[Any] = []
    for i in range(150):
        fields = {
            "instruction": random_text(draw, 30),
            "input": random_text(draw, 60),
            "output": random_text(draw, 30),
        }
        bad = [b"{", b"[]", b"\xff", {**fields, "output": 1}, {**fields, "instruction": "\ud800"}]
        lines.append(draw.choice(bad) if i % 5 == 4 else fields)
    file = write_jsonl({"instruction": "first", "output": "line"}, *lines)
    config = make_config("jsonl", path=str(file), too_long=too_long, on_bad_record="skip", max_length=64, template="brief", val_fraction=0.3)  # fmt: skip
    made = prepare(config, encoder, task="sft")
    report, shards = made.meta["report"], [Shards(made.folder / split) for split in ("train", "val")]
    dropped = report["records_dropped"]
    assert report["records_read"] == 151
    assert report["records_kept"] + sum(dropped.values()) == 151
    assert report["records_kept"] == sum(shard.num_documents for shard in shards)
    assert (
        sum(
            dropped.get(reason, 0)
            for reason in ("broken JSON", "not an object", "not UTF-8", "output is not text")
        )
        > 5
    )
    assert max(int(shard.lengths().max()) for shard in shards) <= 64
    assert (report["records_truncated"] > 0) == (too_long != "drop")
    assert (dropped.get("too long", 0) > 0) == (too_long == "drop")
    assert report["tokens"] == sum(shard.num_tokens for shard in shards)
    for shard in shards:
        for document in range(shard.num_documents):
            assert shard.read(*shard.span(document))[1].any()


def test_an_error_names_the_record(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    file = write_jsonl(*rows(4), {"instruction": "x", "output": None})
    with pytest.raises(UserError) as caught:
        prepare(make_config("jsonl", path=str(file)), encoder, task="sft")
    assert str(caught.value).startswith(
        f"no output: field 'output' is missing or null ({file}:5): mend it, or "
    )
    assert not list(own_cache.rglob("*.tokens"))
    assert not list(own_cache.rglob("*.tmp"))


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_a_mistyped_column_is_an_error(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path, field: str
) -> None:
    config = make_config(
        "jsonl", path=str(write_jsonl(*rows(4))), format="triples", columns={field: "colour"}
    )
    expected = (
        "no record has a field 'colour', as data.format=triples needs it "
        f"(data.columns.{field}): name one of input, instruction, output, or choose another data.format"
    )
    with pytest.raises(UserError) as caught:
        prepare(config, encoder, task="sft")
    assert str(caught.value) == expected


def test_an_input_that_only_some_records_have(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    for columns in ({}, {"input": "context"}):
        source = [{"instruction": f"i{n}", "output": "o"} for n in range(5)]
        source[1][columns.get("input", "input")] = "given"
        file = write_jsonl(*source, name=f"{len(columns)}.jsonl")
        made = prepare(make_config("jsonl", path=str(file), columns=columns), encoder, task="sft")
        assert made.meta["report"]["records_kept"] == 5
    none = write_jsonl(*[{"instruction": f"i{n}", "output": "o"} for n in range(5)])
    assert (
        prepare(make_config("jsonl", path=str(none)), encoder, task="sft").meta["report"]["records_kept"] == 5
    )


def test_the_cache_is_not_made_twice(
    write_jsonl: Write,
    make_config: Make,
    encoder: TextEncoder,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config("jsonl", path=str(write_jsonl(*rows(20))), format="triples")
    first = prepare(config, encoder, task="sft")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", lambda *a, **k: pytest.fail("prepared again"))
        patch.setattr(type(config), "records", lambda *a, **k: pytest.fail("read again"))
        again = prepare(config, encoder, task="sft")
        assert (again.folder, again.meta) == (first.folder, first.meta)
    write_jsonl(*rows(21))
    changed = prepare(config, encoder, task="sft")
    assert changed.folder != first.folder
    assert changed.meta["report"]["records_read"] == 21
    assert PreparedData.load(first.folder).meta["report"]["records_read"] == 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("template", "brief"),
        ("max_length", 99),
        ("packing", True),
        ("val_fraction", 0.4),
        ("too_long", "drop"),
    ],
)
def test_every_setting_has_its_own_folder(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path, key: str, value: Any
) -> None:
    file = str(write_jsonl(*rows(20)))
    assert prepare(make_config("jsonl", path=file), encoder, task="sft").folder != prepare(make_config("jsonl", path=file, **{key: value}), encoder, task="sft").folder  # fmt: skip


KILLED = """
import os, signal, sys
from pathlib import Path
from lmlab.data import prepare
folder = Path(sys.argv[1])
prepare._write = lambda temporary, *a, **k: (temporary.mkdir(parents=True), (temporary / "meta.json").write_text("{"), os.kill(os.getpid(), signal.SIGKILL))
class Config:
    kind = "any"
prepare.data_key = lambda *a, **k: sys.argv[2]
prepare.prepare(Config(), None, task="sft")
"""


def test_a_kill_while_preparing_is_harmless(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    config = make_config("jsonl", path=str(write_jsonl(*rows(20))))
    key = module.data_key(config, encoder, task="sft")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(own_cache), key], env=dict(os.environ), timeout=60
    )
    assert done.returncode == -9
    left = list((own_cache / "prepared").iterdir())
    assert [path.suffix for path in left] == [".tmp"]
    # The same process id again, and a folder that somebody cleared in part.
    (own_cache / "prepared" / f"{key}.{os.getpid()}.tmp").mkdir()
    (own_cache / "prepared" / key / "train").mkdir(parents=True)
    made = prepare(config, encoder, task="sft")
    assert made.folder.name == key
    assert made.meta["report"]["records_kept"] == 20
    assert len(made.rows("train")) + len(made.rows("val")) == 20
    assert sorted(path.name for path in (own_cache / "prepared").iterdir()) == sorted([key, left[0].name])


def test_a_failure_while_preparing_leaves_nothing(
    write_jsonl: Write,
    make_config: Make,
    encoder: TextEncoder,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.preview, "mask_preview", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(make_config("jsonl", path=str(write_jsonl(*rows(20)))), encoder, task="sft")
    assert list((own_cache / "prepared").iterdir()) == []


def test_another_process_may_be_faster(
    write_jsonl: Write,
    make_config: Make,
    encoder: TextEncoder,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config("jsonl", path=str(write_jsonl(*rows(20))))
    write = module._write

    def raced(folder: Path, *args: Any, **kwargs: Any) -> None:
        write(folder, *args, **kwargs)
        other = folder.with_name(folder.name.split(".")[0])
        write(other, *args, **kwargs)
        (other / "theirs").touch()

    monkeypatch.setattr(module, "_write", raced)
    made = prepare(config, encoder, task="sft")
    assert (made.folder / "theirs").exists()
    assert len(list((own_cache / "prepared").iterdir())) == 1


def test_preview_and_prompts_of_triples(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    source = rows(700)
    config = make_config("jsonl", path=str(write_jsonl(*source)), template="brief", val_fraction=0.9)
    made = prepare(config, encoder, task="sft")
    shown = (made.folder / "mask_preview.txt").read_text(encoding="utf-8")
    assert shown.count("--- example ") == 5
    assert shown.count("### Response:\n⟦It is ") == shown.count(".<EOS>⟧\n") == 5
    prompts = made.meta["val_prompts"]
    assert len(prompts) == 512  # enough for samples and metrics, whatever the size of the split
    by_answer = {row["output"]: row for row in source}
    for asked in prompts[:40]:
        row = by_answer[asked["response"]]
        given = f"### Input:\n{row['input']}\n" if row["input"] else ""
        assert asked["prompt"] == f"### Instruction:\n{row['instruction']}\n{given}### Response:\n"
    assert made.meta["template"]
    assert made.meta["format"] == "triples"


def test_prompts_of_plain_text(
    tmp_path: Path, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"Sentence number {i} of a longer text. " for i in range(400)), encoding="utf-8")
    made = prepare(make_config("text", path=str(file), val_fraction=0.2), encoder, task="pretrain")
    prompts = [p["prompt"] for p in made.meta["val_prompts"]]
    held = file.read_text(encoding="utf-8")[-round(0.2 * file.stat().st_size) :]
    assert len(set(prompts)) == len(prompts) >= 10
    assert all(prompt in held and 20 < len(prompt) <= 60 for prompt in prompts)
    assert all(p["response"] == "" for p in made.meta["val_prompts"])
    assert made.meta["template"] is None


def test_a_stream_predicts_every_document_whole(
    write_jsonl: Write, make_config: Make, bpe: Any, encoder: TextEncoder, own_cache: Path
) -> None:
    texts = [f"Text {i} é 😀." for i in range(40)]
    config = make_config(
        "text", path=str(write_jsonl(*[{"text": t} for t in texts])), max_length=16, val_fraction=0.2
    )
    made = prepare(config, encoder, task="pretrain")
    said = ""
    for split in ("train", "val"):
        stream = made.rows(split)
        assert isinstance(stream, StreamRows)
        labels = [label for i in range(len(stream)) for label in stream[i].labels.tolist()]
        assert IGNORE_INDEX not in labels
        assert len(labels) == made.meta["report"][split]["supervised_tokens"]
        said += bpe.decode(labels)
    assert sorted(said.split("<|endoftext|>")) == sorted(["", *texts])
    total = sum(made.meta["report"][split]["supervised_bytes"] for split in ("train", "val"))
    assert total == sum(len(text.encode()) for text in texts)


def test_messages_without_a_chat_template(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    config = make_config("jsonl", path=str(write_jsonl(*[{"messages": turns, "id": i} for i in range(6)])))
    assert isinstance(prepare(config, encoder, task="sft").rows("train"), DocumentRows)
    bare = replace(encoder, key="bare", render_chat=None)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        prepare(config, bare, task="sft")
    # A tokenizer trained on this data has no template yet; it learns from the same turns.
    assert set(training_texts(config, task="sft")) == {"user\nHi.\nassistant\nHello."}


def test_a_tokenizer_never_sees_the_validation_split(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    config = make_config("jsonl", path=str(write_jsonl(*rows(80))), val_fraction=0.3)
    seen = set(training_texts(config, task="sft"))
    made = prepare(config, encoder, task="sft")
    assert len(seen) == made.meta["report"]["train"]["records"]
    assert not seen & {p["prompt"] + p["response"] for p in made.meta["val_prompts"]}


def test_another_encoding_version_of_a_task_is_another_key(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("text", path=str(write_jsonl({"text": "a"})))
    before = {task: module.data_key(config, encoder, task=task) for task in ("pretrain", "sft")}
    monkeypatch.setitem(module.ENCODING_VERSION, "sft", 99)
    assert module.data_key(config, encoder, task="pretrain") == before["pretrain"]
    assert module.data_key(config, encoder, task="sft") != before["sft"]


def test_an_edited_format_of_a_plugin_is_another_key(
    write_jsonl: Write,
    make_config: Make,
    encoder: TextEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "from lmlab.data.formats import formats, text\nformats.register('mine')(lambda r, o: text(r, o))\n"
    (tmp_path / "my_format.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_format")
    config = make_config("text", path=str(write_jsonl({"text": "a"})), format="mine")
    before = module.data_key(config, encoder, task="sft")
    assert module.data_key(config, encoder, task="sft") == before
    (tmp_path / "my_format.py").write_text(code + "# another\n")
    assert module.data_key(config, encoder, task="sft") != before


def test_what_was_cleared_from_the_cache_is_made_again(
    write_jsonl: Write, make_config: Make, encoder: TextEncoder, own_cache: Path
) -> None:
    parts = [{"path": str(write_jsonl(*rows(20), name=f"{i}.jsonl")), "weight": 1} for i in range(2)]
    config = make_config("mix", sources=parts)
    made = prepare(config, encoder, task="sft")
    shutil.rmtree(made.meta["parts"][1]["folder"])
    again = prepare(config, encoder, task="sft")
    assert len(again.rows("train")) == again.meta["report"]["rows"]["train"]

"""The corpus builder: units, bad input, the split, resuming, and the same bytes whoever did the work."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmlab.data.corpus import CorpusIndex, CorpusOptions, build_corpus
from lmlab.data.crew import Crew, Tick
from lmlab.data.documents import Part, part_hash, plan_units, read_documents
from lmlab.data.files import Intake, find_files
from lmlab.data.shards import Shards
from lmlab.data.store import FolderStore
from lmlab.data.units import UnitJob, encode_unit
from lmlab.records import RunFailedError, UserError

OPTIONS = CorpusOptions(
    val_fraction=0.2, column="text", shard_bytes=600, on_bad_record="error", limit_documents=None
)


class ByteEncoder:
    """Bytes as ids, with EOS 256: a real encoder small enough to read the ids back. `tokenizers/` has the others."""

    vocab_size = 257
    eos_token_id: int | None = 256
    bos_token_id: int | None = None

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.append(np.frombuffer(t.encode("utf-8"), np.uint8), 256).astype(np.uint32) for t in texts]

    def document_stream(self, pieces: Iterator[str]) -> Iterator[np.ndarray]:
        for piece in pieces:
            yield np.frombuffer(piece.encode("utf-8"), np.uint8).astype(np.uint32)
        yield np.asarray([256], np.uint32)


Build = Callable[..., CorpusIndex]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmlab.data.documents.SMALLEST_UNIT", 100)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def run(
        *paths: Path, to: str = "corpus", options: CorpusOptions = OPTIONS, **changed: Any
    ) -> CorpusIndex:
        files = [file for path in paths for file in find_files(str(path))]
        told: dict[str, Any] = {
            "tokenizer_hash": "bytes",
            "save_tokenizer": lambda folder: folder.mkdir(parents=True, exist_ok=True),
            "workers": 1,
        }
        return build_corpus(files, tmp_path / to, ByteEncoder(), options, **{**told, **changed})

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Texts and records of several sizes and kinds, with characters of 1 to 4 bytes."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(
            f"text {number}: " + "né 😀 " * (number * 9 + 1), encoding="utf-8"
        )
    rows = [{"text": f"row {number} " + "日本 " * (number % 7), "other": number} for number in range(60)]
    lines = "".join(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, row in enumerate(rows))
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "list.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]), encoding="utf-8")
    return folder


def texts_in(folder: Path) -> dict[str, list[str]]:
    """Every document on disk as text, without its EOS and without the EOS at a split's start."""
    found = {}
    for split in ("train", "val"):
        shards = Shards(folder / split)
        documents = [shards.read(*shards.span(i))[0] for i in range(shards.num_documents)]
        assert documents[0].tolist() == [256], "the start of the stream"
        assert all(ids[-1] == 256 for ids in documents)
        found[split] = [bytes(ids[:-1].tolist()).decode("utf-8") for ids in documents[1:]]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def expected_texts(source: Path) -> list[str]:
    lines = (source / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [file.read_text(encoding="utf-8") for file in sorted(source.glob("*.txt"))]
    return [*texts, "one", "two", *(json.loads(line)["text"] for line in lines)]


# --- what is written --------------------------------------------------------------------------------------------------


def test_every_document_is_there_once_in_order(build: Build, source: Path, tmp_path: Path) -> None:
    index = build(source)
    found = texts_in(tmp_path / "corpus")
    assert found["train"]
    assert found["val"]
    held_out = set(found["val"])
    texts = expected_texts(source)
    assert found["train"] == [text for text in texts if text not in held_out]
    assert found["val"] == [text for text in texts if text in held_out]
    report = index.report
    assert report["records_read"] == report["records_kept"] == len(texts)
    sizes = {split: sum(len(text.encode("utf-8")) for text in found[split]) for split in found}
    for split, size in sizes.items():
        assert report[split]["supervised_bytes"] == size
        assert report[split]["tokens"] == size + len(found[split])
        assert report[split]["records"] == len(found[split])
    assert report["tokens"] == sum(report[split]["tokens"] for split in found)
    assert len(json.loads((tmp_path / "corpus/train/index.json").read_text())["shards"]) > 4


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    build: Build, source: Path, tmp_path: Path, workers: int
) -> None:
    build(source, to="one")
    build(source, to="many", workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_adding_a_file_moves_no_document_to_the_other_side(
    build: Build, source: Path, tmp_path: Path
) -> None:
    build(source)
    before = texts_in(tmp_path / "corpus")
    (source / "aa.txt").write_text("something new", encoding="utf-8")
    build(source, to="more")
    after = texts_in(tmp_path / "more")
    assert all(set(before[split]) <= set(after[split]) for split in before)


def test_a_single_text_gives_its_last_part(build: Build, tmp_path: Path) -> None:
    text = "né 😀 " * 50 + "the end  \n\n"
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    build(tmp_path / "one.txt")
    found = texts_in(tmp_path / "corpus")
    assert found["train"][0] + found["val"][0] == text
    assert len(found["val"][0]) == round(len(text) * OPTIONS.val_fraction)
    build(tmp_path / "one.txt", to="tiny", options=replace(OPTIONS, val_fraction=0.01))
    assert texts_in(tmp_path / "tiny")["val"][0].strip(), "not white space alone"


def test_where_no_draw_is_low_enough_the_lowest_is_held_out(
    build: Build, source: Path, tmp_path: Path
) -> None:
    build(source, options=replace(OPTIONS, val_fraction=1e-9))
    assert len(texts_in(tmp_path / "corpus")["val"]) == 1
    build(source, to="high", options=replace(OPTIONS, val_fraction=1 - 1e-9))
    assert len(texts_in(tmp_path / "high")["val"]) == 1, "one is held out, and not all"


@pytest.mark.parametrize("limit", [7])
def test_a_limit_takes_the_first_documents(build: Build, source: Path, tmp_path: Path, limit: int) -> None:
    build(source, options=replace(OPTIONS, limit_documents=limit))
    found = texts_in(tmp_path / "corpus")
    assert sorted(found["train"] + found["val"]) == sorted(expected_texts(source)[:limit])


def test_a_large_text_is_read_in_pieces_with_its_characters_whole(build: Build, tmp_path: Path) -> None:
    text = "\ufeff" + "x" + "日本語 " * 300_000  # 3 MB, with characters across every megabyte's edge
    (tmp_path / "large.txt").write_text(text, encoding="utf-8")
    (tmp_path / "small.txt").write_text("small", encoding="utf-8")
    build(tmp_path / "large.txt", tmp_path / "small.txt")
    found = texts_in(tmp_path / "corpus")
    assert sorted(found["train"] + found["val"], key=len) == ["small", text[1:]]


def test_another_column_holds_the_text(build: Build, tmp_path: Path) -> None:
    rows = [{"content": f"number {number}"} for number in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    build(tmp_path / "a.jsonl", options=replace(OPTIONS, column="content"))
    found = texts_in(tmp_path / "corpus")
    assert len(found["train"] + found["val"]) == 9


# --- units ------------------------------------------------------------------------------------------------------------


def test_units_cover_every_byte_once_and_cut_at_line_ends(source: Path) -> None:
    files = find_files(str(source))
    units = plan_units(files, shard_bytes=600)
    parts = [part for unit in units for part in unit]
    assert len(units) > 5
    for file in files:
        mine = [part for part in parts if part.file == str(file)]
        raw = file.read_bytes()
        assert b"".join(raw[part.start : part.end] for part in mine) == raw
        assert all(raw[part.end - 1 : part.end] == b"\n" for part in mine[:-1])
        assert file.suffix == ".jsonl" or len(mine) == 1


def test_lines_longer_than_a_unit_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(json.dumps({"text": "x" * n}) + "\n" for n in (2000, 3, 1500, 4)), encoding="utf-8"
    )
    parts = [part for unit in plan_units([file], shard_bytes=300) for part in unit]
    raw = file.read_bytes()
    assert b"".join(raw[part.start : part.end] for part in parts) == raw
    texts = [d.text for part in parts for d in read_documents(part, Intake("error"), column="text")]
    assert [len(text or "") for text in texts] == [2000, 3, 1500, 4]


def test_the_hash_of_a_part_is_that_of_its_bytes(source: Path) -> None:
    import hashlib

    file = source / "rows.jsonl"
    raw = file.read_bytes()
    assert part_hash(Part(str(file), 10, 700)) == hashlib.sha256(raw[10:700]).hexdigest()


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "broken JSON": (b'{"text": "a"\n', "rows.jsonl:4"),
    "not UTF-8": (b'{"text": "\xff"}\n', "rows.jsonl:4, byte"),
    "not an object": (b"[1]\n", "rows.jsonl:4"),
    "no text": (b'{"other": 1}\n', "rows.jsonl:4"),
    "text is not text": (b'{"text": 3}\n', "rows.jsonl:4"),
    "empty text": (b'{"text": "  "}\n', "rows.jsonl:4"),
    "not Unicode text": (b'{"text": "\\ud800"}\n', "rows.jsonl:4"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_stops_with_its_place_or_is_counted(build: Build, tmp_path: Path, reason: str) -> None:
    raw, place = BAD[reason]
    good = [json.dumps({"text": f"good {number} " + "x" * 200}).encode() + b"\n" for number in range(8)]
    file = tmp_path / "rows.jsonl"
    # As the second part's first line, so that its line number takes counting what lies before.
    file.write_bytes(b"".join([*good[:3], raw, *good[3:]]))
    with pytest.raises(UserError, match=reason) as caught:
        build(file)
    assert place in str(caught.value)
    assert not (tmp_path / "corpus/train").exists(), "found before anything is encoded"
    index = build(file, options=replace(OPTIONS, on_bad_record="skip"))
    assert index.report["records_dropped"] == {reason: 1}
    assert (index.report["records_read"], index.report["records_kept"]) == (9, 8)


def test_the_first_bad_record_is_named_whoever_finds_one_first(build: Build, tmp_path: Path) -> None:
    good = json.dumps({"text": "good " + "x" * 300}) + "\n"
    (tmp_path / "a.jsonl").write_text(good * 40 + "bad one\n" + good * 40 + "bad two\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:41"):
        build(tmp_path / "a.jsonl", workers=3)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"good \xff bad", r"not UTF-8: byte 0xff \(.*a\.txt, byte 5\)"),
        (b"x" * 2**20 + b"\xe6\x97", r"not UTF-8: byte 0xe6 \(.*a\.txt, byte 1048576\)"),
        (b"a\0b", "NUL byte"),
        (b" \n ", "no text: the file is empty"),
    ],
)
def test_a_bad_text_file_stops_with_its_place_or_is_counted(
    build: Build, source: Path, raw: bytes, reason: str
) -> None:
    (source / "a.txt").write_bytes(raw)
    with pytest.raises(UserError, match=reason):
        build(source)
    index = build(source, options=replace(OPTIONS, on_bad_record="skip"))
    assert sum(index.report["records_dropped"].values()) == 1


def test_nothing_to_encode_is_said_with_the_reasons(build: Build, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"x": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"no document to encode \(dropped empty text: 1, no text: 1\)"):
        build(tmp_path / "a.jsonl", options=replace(OPTIONS, on_bad_record="skip"))


def test_a_corpus_that_cannot_be_split_is_refused(build: Build, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "same"}\n' * 3, encoding="utf-8")
    with pytest.raises(UserError, match="all documents are the same"):
        build(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="a text of 1 characters is too short"):
        build(tmp_path / "b.txt", to="other")


def test_a_tokenizer_without_eos_is_refused(
    build: Build, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteEncoder, "eos_token_id", None)
    with pytest.raises(UserError, match="no end-of-text token"):
        build(source)


# --- going on ---------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for whatever ends a run."""


def interrupted(build: Build, source: Path, *, after: int, **told: Any) -> None:
    """A run that ends when ``after`` bytes are encoded."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "encode" and done >= after:
            raise Stopped

    with pytest.raises(Stopped):
        build(source, progress=progress, **told)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    build: Build, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(source, to="whole")
    interrupted(build, source, after=2000)
    with pytest.raises(UserError, match=r"not finished .*run the same tokenize_corpus\.py command again"):
        CorpusIndex.load(tmp_path / "corpus")
    notes = {file: file.stat().st_mtime_ns for file in (tmp_path / "corpus/units").glob("*.json")}
    assert notes
    (tmp_path / "corpus/train/00099.tokens.1234.tmp").write_bytes(b"left by a killed worker")
    seen: list[int] = []
    run = Crew.run
    monkeypatch.setattr(
        Crew,
        "run",
        lambda self, stage, f, jobs, **told: seen.append(len(jobs)) or run(self, stage, f, jobs, **told),
    )
    build(source, workers=2)
    assert seen[1] == seen[0] - len(notes), "finished units are not made again"
    assert contents(tmp_path / "whole") == contents(tmp_path / "corpus")


@pytest.mark.parametrize(
    "damage", ["changed", *(pytest.param(d, marks=pytest.mark.slow) for d in ("short", "gone"))]
)
def test_a_damaged_unit_is_made_again(build: Build, source: Path, tmp_path: Path, damage: str) -> None:
    build(source, to="whole")
    interrupted(build, source, after=2000)
    (file, *_) = sorted((tmp_path / "corpus/train").glob("0*.tokens"))
    raw = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(raw[:-2] if damage == "short" else b"\1" + raw[1:])
    build(source, verify=damage == "changed")  # a change within the same size takes --verify to be seen
    assert contents(tmp_path / "whole") == contents(tmp_path / "corpus")


def test_a_finished_corpus_is_left_as_it_is(build: Build, source: Path, tmp_path: Path) -> None:
    first = build(source)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "corpus").rglob("*") if file.is_file()}
    assert build(source) == first
    assert times == {f: f.stat().st_mtime_ns for f in (tmp_path / "corpus").rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    ("what", "finished"),
    [
        ("setting", True),
        ("content", False),
        *(
            pytest.param(what, finished, marks=pytest.mark.slow)
            for what in ("setting", "tokenizer", "content", "new file", "renamed")
            for finished in (True, False)
        ),
    ],
)
def test_going_on_with_something_else_is_refused_and_says_what(
    build: Build, source: Path, tmp_path: Path, what: str, finished: bool
) -> None:
    if finished:
        build(source)
    else:
        interrupted(build, source, after=2000)
    before = contents(tmp_path / "corpus")
    told: dict[str, Any] = {}
    message = {
        "setting": "val_fraction was 0.2, now 0.3",
        "tokenizer": "another tokenizer",
        "content": r"3\.txt has changed",
        "new file": "parts of files, now",
        "renamed": r"file 3\.txt was there, now 3b\.txt",
    }[what]
    if what == "setting":
        told["options"] = replace(OPTIONS, val_fraction=0.3)
    elif what == "tokenizer":
        told["tokenizer_hash"] = "another"
    elif what == "content":
        raw = (source / "3.txt").read_bytes()
        (source / "3.txt").write_bytes(b"T" + raw[1:])
    elif what == "new file":
        (source / "z.txt").write_text("new", encoding="utf-8")
    else:
        (source / "3.txt").rename(source / "3b.txt")
    with pytest.raises(UserError, match=message):
        build(source, **told)
    assert contents(tmp_path / "corpus") == before, "nothing is touched"
    build(source, overwrite=True, **told)
    build(source, to="fresh", **told)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "fresh")


def test_the_same_input_elsewhere_is_the_same_input(build: Build, source: Path, tmp_path: Path) -> None:
    interrupted(build, source, after=2000)
    shutil.move(source, tmp_path / "moved")
    build(tmp_path / "moved")
    assert texts_in(tmp_path / "corpus")["train"]


def test_a_folder_with_other_things_is_not_touched(build: Build, source: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/mine.txt").write_text("mine", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty, and no corpus"):
            build(source, overwrite=overwrite)
    assert contents(tmp_path / "corpus") == {"mine.txt": b"mine"}


def test_another_s_index_is_no_corpus_to_overwrite(build: Build, source: Path, tmp_path: Path) -> None:
    for name, content in {"index.json": "[1]", "train/cat.png": "cat", "tokenizer/mine": "mine"}.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(content, encoding="utf-8")
    before = contents(tmp_path / "site")
    for text in ("[1]", '{"name": "photos"}', "", "{"):
        (tmp_path / "site/index.json").write_text(text, encoding="utf-8")
        for overwrite in (False, True):
            with pytest.raises(UserError, match="not empty, and no corpus"):
                build(source, to="site", overwrite=overwrite)
    assert contents(tmp_path / "site") == {**before, "index.json": b"{"}


def test_another_s_temporary_files_stay(build: Build, source: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/notes.tmp").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not empty, and no corpus"):
        build(source)
    assert contents(tmp_path / "corpus") == {"notes.tmp": b"mine"}


def test_what_is_dropped_at_the_end_is_dropped_before_another_may_begin(
    build: Build, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[bool] = []
    remove = FolderStore.remove

    def watched(store: FolderStore, *names: str) -> None:
        try:
            with FolderStore(store.folder).locked():
                locked.append(False)
        except UserError:
            locked.append(True)
        remove(store, *names)

    monkeypatch.setattr(FolderStore, "remove", watched)
    build(source)
    assert locked
    assert all(locked)


def test_a_place_without_locks_is_not_called_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(UserError, match="cannot be locked: No locks"), FolderStore(tmp_path).locked():
        pass


def test_two_runs_at_once_are_refused(build: Build, source: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "encode":
            build(source)

    with pytest.raises(UserError, match="another process is writing this corpus"):
        build(source, progress=progress)


def test_no_corpus_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no corpus made by tokenize_corpus\.py"):
        CorpusIndex.load(tmp_path)


# --- workers ----------------------------------------------------------------------------------------------------------


def die(job: int, tool: object, tick: Tick) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk(job: int, tool: object, tick: Tick) -> None:
    import errno

    raise OSError(errno.ENOSPC, "No space left on device", "corpus/train/00001.tokens")


def square(job: int, tool: int, tick: Tick) -> int:
    tick(2**20)
    return job * job + tool


def test_results_come_in_order_and_progress_adds_up() -> None:
    told: list[int] = []
    with Crew(5, 2, lambda stage, done, total: told.append(done)) as crew:
        assert crew.run("squares", square, range(7), total=7 * 2**20) == [n * n + 5 for n in range(7)]
        assert crew.run("again", square, [], total=0) == []
    assert told[-2] == 7 * 2**20


def test_a_killed_worker_is_said_and_not_waited_for() -> None:
    with (
        pytest.raises(RunFailedError, match=r"a worker process died with exit code -9 .*fewer --workers"),
        Crew(None, 2, lambda *about: None) as crew,
    ):
        crew.run("stage", die, [1, 2, 3], total=3)


def test_a_worker_that_dies_while_it_waits_is_said_too() -> None:
    with Crew(5, 1, lambda *about: None) as crew:
        assert crew.run("scan", square, [2], total=2**20) == [9]
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        with pytest.raises(RunFailedError, match=r"a worker process died with exit code -9 \(encode; "):
            crew.run("encode", square, [2], total=2**20)


def test_a_full_disk_is_one_line() -> None:
    with (
        pytest.raises(
            RunFailedError, match=r"No space left on device \(corpus/train/00001\.tokens\): what is finished"
        ),
        Crew(None, 1, lambda *about: None) as crew,
    ):
        crew.run("stage", fill_the_disk, [1], total=1)


def test_a_unit_that_fails_leaves_no_file(source: Path, tmp_path: Path) -> None:
    class Failing(ByteEncoder):
        def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
            raise OSError("no")

        def document_stream(self, pieces: Iterator[str]) -> Iterator[np.ndarray]:
            yield np.asarray([1], np.uint32)
            raise OSError("no")

    (source / "0.txt").write_text("x" * 2_000_000, encoding="utf-8")
    file = source / "0.txt"
    part = Part(str(file), 0, file.stat().st_size)
    job = UnitJob(0, (part,), FolderStore(tmp_path / "made"), "error", "text", None, 0.5, None)
    with pytest.raises(OSError, match="no"):
        encode_unit(job, Failing(), lambda count: None)
    assert not [path for path in (tmp_path / "made").rglob("*") if path.is_file()]

"""Run names, run directories and their lock, and the files that must survive a kill."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmlab import journal
from lmlab.journal import Journal, RunDir, check_run_name, read_json, slug, write_json
from lmlab.records import Sample, UserError


@pytest.fixture(params=["plain", "ä b/ü ñ"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> RunDir:
    return RunDir(tmp_path / request.param / "sft" / "mine")


@pytest.fixture
def living() -> Iterator[int]:
    """The pid of another process that lives."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


@pytest.fixture
def dead() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def held_by(run: RunDir, pid: Any, host: str | None = None, **more: Any) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    lock = {"host": host or socket.gethostname(), "pid": pid, **more}
    run.lock.write_text(json.dumps(lock), encoding="utf-8")


def finished(run: RunDir) -> None:
    run.create(overwrite=False, resume=False)
    run.config.write_text("seed: 1\n", encoding="utf-8")
    run.metrics.write_text('{"step": 1}\n', encoding="utf-8")
    run.release()


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../x",
            "..",
            ".",
            "a/../b",
            "/etc/x",
            "a/b",
            "a\\b",
            "a\0b",
            "a\nb",
            "a\n",
            "a b",
            "x" * 129,
            "x" * 300,
        ),
        *("", " ", "ü", "日本", ".hidden", "-rf", "_x", "a..b", "~", "$HOME", "C:", "a\x1b[2J"),
    ],
)
def test_an_unsafe_run_name_is_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_run_name(name)
    text = str(caught.value)
    assert "run_name" in text
    assert text.isprintable(), "control characters do not reach the terminal"


@pytest.mark.parametrize("name", ["a", "7", "x" * 128, "adapter=lora,seed=1", "A.b_c-d+e=f", "2026-10-20"])
def test_a_safe_run_name_is_taken_as_it_is(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "---",
        "ä/ö",
        "../../etc",
        "a b\0c",
        "x" * 500,
        "optim.lr=1e-3",
        "日本",
        "a..b",
        "..a",
        "_x",
        "=a",
    ],
)
def test_a_slug_is_always_a_safe_run_name(text: str) -> None:
    assert check_run_name(slug(text))
    assert len(slug(text, max_length=10)) <= 10


# --- directories ----------------------------------------------------------------------------------------------------


def test_a_new_directory_is_made_and_locked(run: RunDir) -> None:
    run.create(overwrite=False, resume=False)
    assert run.path.is_dir()
    assert read_json(run.lock)["pid"] == os.getpid()
    run.release()
    assert list(run.path.iterdir()) == []


def test_checking_makes_nothing(run: RunDir, tmp_path: Path) -> None:
    run.check_free(overwrite=False, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_refused(run: RunDir) -> None:
    finished(run)
    with pytest.raises(UserError, match=r"already exists.*resume=auto.*overwrite=true"):
        run.create(overwrite=False, resume=False)
    assert run.metrics.exists()


def test_overwrite_begins_with_an_empty_directory(run: RunDir) -> None:
    finished(run)
    run.create(overwrite=True, resume=False)
    assert [file.name for file in run.path.iterdir()] == [".lock"]


def test_resume_keeps_what_is_there(run: RunDir) -> None:
    finished(run)
    run.create(overwrite=False, resume=True)
    assert run.metrics.read_text(encoding="utf-8") == '{"step": 1}\n'
    assert run.lock.exists()


@pytest.mark.parametrize(("overwrite", "resume"), [(True, False), (False, True)])
def test_a_foreign_directory_is_left_alone(run: RunDir, overwrite: bool, resume: bool) -> None:
    run.path.mkdir(parents=True)
    precious = run.path / "thesis.tex"
    precious.write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="not a run directory"):
        run.create(overwrite=overwrite, resume=resume)
    assert [file.name for file in run.path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_start_left_can_be_overwritten(run: RunDir, dead: int) -> None:
    held_by(run, dead)  # killed before run.json and config.yaml were there
    run.create(overwrite=True, resume=False)
    assert read_json(run.lock)["pid"] == os.getpid()


def test_an_empty_directory_is_free(run: RunDir) -> None:
    run.path.mkdir(parents=True)
    run.create(overwrite=False, resume=False)
    assert run.lock.exists()


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_something_else_of_that_name_is_refused(run: RunDir, kind: str) -> None:
    run.path.parent.mkdir(parents=True)
    if kind == "file":
        run.path.write_text("mine", encoding="utf-8")
    else:
        run.path.symlink_to("nowhere")
    with pytest.raises(UserError, match="not a directory"):
        run.create(overwrite=True, resume=False)
    assert run.path.is_symlink() or run.path.read_text(encoding="utf-8") == "mine"


def test_an_output_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be written.*output_root"):
        RunDir(tmp_path / "file" / "sft" / "mine").check_free(overwrite=False, resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_read_only_output_root_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"cannot be written.*output_root"):
            RunDir(tmp_path / "sft" / "mine").check_free(overwrite=False, resume=False)
    finally:
        tmp_path.chmod(0o700)


def test_unknown_files_of_a_run_are_attribute_errors(run: RunDir) -> None:
    assert run.samples == run.path / "samples.jsonl"
    with pytest.raises(AttributeError):
        _ = run.sample


# --- the lock -------------------------------------------------------------------------------------------------------


def test_a_living_holder_is_respected(run: RunDir, living: int) -> None:
    held_by(run, living, started=journal._process_start(living))
    before = run.lock.read_bytes()
    for attempt in (run.take_lock, lambda: run.create(overwrite=True, resume=False)):
        with pytest.raises(UserError, match=f"another run is writing here.*pid {living} on"):
            attempt()
    run.release()  # not ours to give back
    assert run.lock.read_bytes() == before
    assert [file.name for file in run.path.iterdir()] == [".lock"]


def test_the_lock_of_a_dead_process_is_taken_over(run: RunDir, dead: int) -> None:
    held_by(run, dead)
    run.take_lock()
    assert read_json(run.lock)["pid"] == os.getpid()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_number_given_to_another_process_since_is_no_holder(run: RunDir, living: int) -> None:
    held_by(run, living, started=journal._process_start(living) - 1)  # type: ignore[operator]
    run.take_lock()
    assert read_json(run.lock)["pid"] == os.getpid()


def test_a_holder_on_another_host_is_respected(run: RunDir, dead: int) -> None:
    held_by(run, dead, host="elsewhere")
    with pytest.raises(UserError, match=rf"pid {dead} on elsewhere.*delete \.lock"):
        run.take_lock()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"pid": "x"}', '{"host": "h"}', '{"host": null, "pid": null}']
)
def test_a_broken_lock_holds_nothing(run: RunDir, content: str) -> None:
    run.path.mkdir(parents=True)
    run.lock.write_text(content, encoding="utf-8")
    run.take_lock()
    assert read_json(run.lock)["pid"] == os.getpid()


def test_locking_works_without_hard_links(run: RunDir, living: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    run.create(overwrite=False, resume=False)
    assert read_json(run.lock)["pid"] == os.getpid()
    held_by(run, living)
    with pytest.raises(UserError, match="another run is writing here"):
        run.take_lock()


def test_of_several_starts_exactly_one_gets_the_directory(tmp_path: Path) -> None:
    code = (
        "import sys; from lmlab.journal import RunDir; from lmlab.records import UserError\n"
        "input()\n"
        "try: RunDir(sys.argv[1]).create(overwrite=False, resume=True); print('got it', flush=True)\n"
        "except UserError as error: print(error, flush=True)\n"
        "input()"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "mine")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for start in starts:
        assert start.stdin is not None
        start.stdin.write("go\n")
        start.stdin.flush()
    said = [start.stdout.readline() for start in starts if start.stdout is not None]
    for start in starts:
        start.communicate("end\n")
    assert sorted(line.startswith("got it") for line in said) == [False, False, True]
    assert all("another run is writing here" in line for line in said if not line.startswith("got it"))


# --- JSON -----------------------------------------------------------------------------------------------------------


def test_json_comes_back_as_it_was(run: RunDir) -> None:
    run.path.mkdir(parents=True)
    value = {"text": "ä \u2028 日本 \ud800", "list": [1, 2.5, None, True], "path": "a"}
    write_json(run.summary, value)
    assert read_json(run.summary) == value
    assert "日本" in run.summary.read_text(encoding="utf-8")
    assert list(run.path.iterdir()) == [run.summary]


def test_non_finite_numbers_are_written_as_text(run: RunDir) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    run.path.mkdir(parents=True)
    write_json(run.summary, {"a": float("nan"), "b": [float("inf")], "c": {"d": (-float("inf"), 1.0)}})
    read = json.loads(run.summary.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == {"a": "nan", "b": ["inf"], "c": {"d": ["-inf", 1.0]}}


def test_a_failed_write_leaves_the_old_file(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.path.mkdir(parents=True)
    write_json(run.summary, {"old": 1})

    def full(self: Path, text: str, **_: Any) -> int:
        with self.open("w", encoding="utf-8") as stream:
            stream.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_json(run.summary, {"new": 2})
    monkeypatch.undo()
    assert read_json(run.summary) == {"old": 1}
    assert list(run.path.iterdir()) == [run.summary]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", b'"text"'])
def test_a_broken_json_file_reads_as_empty(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") == {}


# --- journals -------------------------------------------------------------------------------------------------------


def sample(step: int, text: str = "text") -> Sample:
    return Sample(step, 0, "prompt", "greedy", 0, text, 1, "eos")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_every_line_is_on_disk_at_once(run: RunDir) -> None:
    run.path.mkdir(parents=True)
    keeper = Journal(run)
    for step in range(3):
        keeper.log(step, {"train/loss": step / 2, "train/tokens": 7})
        keeper.sample(sample(step))
        read = rows(run.metrics)
        assert [row["step"] for row in read] == list(range(step + 1))
        assert read[-1].items() >= {"train/loss": step / 2, "train/tokens": 7}.items()
        assert read[-1]["time"] >= 0
        assert rows(run.samples)[-1] == sample(step).row()
    assert keeper.latest == {"train/loss": 1.0, "train/tokens": 7}
    keeper.close()
    keeper.close()


def test_a_non_finite_metric_is_written_as_text(run: RunDir) -> None:
    run.path.mkdir(parents=True)
    Journal(run).log(1, {"a": float("nan"), "b": float("-inf"), "c": 1.0})
    assert [rows(run.metrics)[0][name] for name in "abc"] == ["nan", "-inf", 1.0]
    assert "NaN" not in run.metrics.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["a\nb\r\nc", "\u2028\u2029\x85\x0b\x0c", "\ud800", "日本\0", '"{}'])
def test_any_text_stays_one_line_and_survives_forgetting(run: RunDir, text: str) -> None:
    run.path.mkdir(parents=True)
    keeper = Journal(run)
    keeper.sample(sample(1, text))
    keeper.forget_after(1)
    assert [row["text"] for row in rows(run.samples)] == [text]


def test_forgetting_removes_later_steps_and_goes_on(run: RunDir) -> None:
    run.path.mkdir(parents=True)
    keeper = Journal(run)
    for step in (0, 1, 2, 3):
        keeper.log(step, {"x": 1.0})
        keeper.sample(sample(step))
    keeper.forget_after(1)
    keeper.log(2, {"x": 2.0})
    keeper.sample(sample(2))
    keeper.close()
    assert [(row["step"], row["x"]) for row in rows(run.metrics)] == [(0, 1.0), (1, 1.0), (2, 2.0)]
    assert [row["step"] for row in rows(run.samples)] == [0, 1, 2]
    assert sorted(file.name for file in run.path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_layers_have_a_file_once_they_have_a_line(run: RunDir) -> None:
    run.path.mkdir(parents=True)
    keeper = Journal(run)
    assert not run.layers.exists()
    for step in (1, 2, 3):
        keeper.layers(
            step, [{"layer": "a", "update_ratio": 0.5}, {"layer": "b", "update_ratio": float("nan")}]
        )
    keeper.forget_after(2)
    keeper.layers(3, [{"layer": "a", "update_ratio": 0.7}])
    keeper.close()
    assert [(row["step"], row["layer"]) for row in rows(run.layers)] == [
        (1, "a"),
        (1, "b"),
        (2, "a"),
        (2, "b"),
        (3, "a"),
    ]
    assert rows(run.layers)[1]["update_ratio"] == "nan"
    assert keeper.latest == {}, "one layer's figure is not the run's"


@pytest.mark.parametrize("torn", [b'{"step": 2, "x"', '{"step": 2, "x": "ä'.encode()[:-1], b"7\n", b"{}\n"])
def test_a_torn_last_line_costs_that_line_only(run: RunDir, torn: bytes) -> None:
    run.path.mkdir(parents=True)
    run.metrics.write_bytes(b'{"step": 1, "x": 1.0}\n' + torn)
    keeper = Journal(run)
    keeper.log(2, {"x": 2.0})  # begins a line of its own
    assert json.loads(run.metrics.read_bytes().split(b"\n")[-2])["x"] == 2.0
    keeper.forget_after(2)
    keeper.log(3, {"x": 3.0})
    assert [row["x"] for row in rows(run.metrics)] == [1.0, 2.0, 3.0]

"""All runs below a folder: what is found, how each stands, and that nothing on the disk can break the list."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab.journal import RunDir
from lmlab.tracking import runs as runs_module
from lmlab.tracking.index import render, sparkline, write_index
from lmlab.tracking.results import write_results
from lmlab.tracking.run_row import Run, setting
from lmlab.tracking.runs import MARKS, Reader

from .pages import HOSTILE, Page, assert_only_our_script, small_run, write_json, write_lines


def started(folder: Path, moment: str) -> Path:
    write_json(folder / "run.json", {"started": moment})
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two runs alone, a sweep of two jobs and one refused, and a comparison."""
    root = tmp_path / "outputs"
    started(
        small_run(root / "sft" / "good", adapter="qlora", quant="nf4", trained=331_776),
        "2026-11-25T10:00:00+00:00",
    )
    died = started(
        small_run(root / "pretrain" / "died", task="pretrain", status="failed"), "2026-11-26T10:00:00+00:00"
    )
    summary = json.loads((died / "summary.json").read_text(encoding="utf-8"))
    write_json(died / "summary.json", summary | {"error": "CUDA out of memory in <backward>"})
    sweep = root / "sweeps" / "ablation"
    ends = {"9-adapter=none": 1.5, "10-adapter=lora": 1.25}
    for place, (name, end) in enumerate(ends.items()):
        run = small_run(sweep / name, adapter=name.partition("=")[2], losses={0: 4.0, 20: end})
        started(run, f"2026-11-24T1{place}:00:00+00:00")
    row = {
        "job": 9,
        "overrides": "adapter=none",
        "status": "finished",
        "directory": f"elsewhere/{next(iter(ends))}",
    }
    refused = {"job": 11, "overrides": "quant=nf4", "status": "refused: cannot train", "directory": ""}
    write_results(sweep, [row, refused])
    compared = root / "reports" / "20261126-a-b"
    compared.mkdir(parents=True)
    write_results(compared, [row])
    (compared / "report.html").write_text("x", encoding="utf-8")
    return root


def one(root: Path, name: str) -> Run:
    return next(run for run in Reader(root).read().all if run.name == name)


# --- what is found --------------------------------------------------------------------------------------------------


def test_runs_sweeps_and_comparisons_are_told_apart(root: Path) -> None:
    found = Reader(root).read()
    assert [run.path for run in found.alone] == ["pretrain/died", "sft/good"]
    assert [(sweep.path, [job.name for job in sweep.jobs]) for sweep in found.sweeps] == [
        ("sweeps/ablation", ["9-adapter=none", "10-adapter=lora", "quant=nf4"])
    ]
    assert [job.status for job in found.sweeps[0].jobs] == ["finished", "finished", "refused"]
    assert found.sweeps[0].lowest("val/loss") == 1.25
    assert found.comparisons == ["reports/20261126-a-b"]
    assert [thing.name for thing in found.newest_first] == ["died", "good", "ablation"]
    assert found.notices == []


def test_a_row_says_what_the_files_say(root: Path) -> None:
    run = one(root, "good")
    assert (run.task, run.status, run.adapter, run.quant) == ("sft", "finished", "qlora", "nf4")
    assert (run.step, run.curve) == (20, ((0, 4.0), (10, 2.0), (20, 1.0)))
    assert run.figures == {"val/loss": 1.0, "model/params_trainable": 331_776.0, "memory/peak_gb": 1.5}
    assert str(run.started) == "2026-11-25 10:00:00+00:00"
    died = one(root, "died")
    assert (died.status, died.reason, died.notes) == ("failed", "CUDA out of memory in <backward>", "")
    assert died.figures["perf/tokens_per_second_median"] == 1000.0, "no summary has it, so the log is counted"


def test_what_a_running_run_has_logged_so_far(tmp_path: Path) -> None:
    run = small_run(tmp_path / "sft" / "now", peak=2.5, trainer={"max_steps": 500})
    write_json(run / "summary.json", {"status": "running", "exit_code": None})
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(
            '{"step": 30, "val/loss": "nan"}\n{"step": 30, "val/bits_per_byte": 0.75}\n{"step": 31, "tr'
        )
    found = one(tmp_path, "now")
    assert (found.step, found.max_steps, found.notes) == (
        30,
        500,
        "no run.json, metrics.jsonl has 1 broken line",
    )
    assert found.figures == {"val/loss": 1.0, "val/bits_per_byte": 0.75, "memory/peak_gb": 2.5,
                             "perf/tokens_per_second_median": 1000.0}  # fmt: skip


def test_a_setting_is_read_from_its_own_block() -> None:
    text = "task: sft\nmodel:\n  kind: scratch\nadapter:\n  rank: 8\n  kind: lora\n  more:\n    kind: no\nquant:\n  kind: none\nx: null\n"
    told = [setting(text, *names) for names in (("task",), ("adapter", "kind"), ("quant", "kind"), ("x",), ("optim", "kind"))]  # fmt: skip
    assert told == ["sft", "lora", "none", "", ""]
    assert setting("adapter:\n" + "  a: b\n" * 3, "adapter", "kind") == ""
    assert setting("adapter: {kind: lora}\n", "adapter", "kind") == "", "not as lmlab writes it"


# --- how a run stands -----------------------------------------------------------------------------------------------


def test_the_lock_says_whether_it_runs(tmp_path: Path) -> None:
    run = small_run(tmp_path / "sft" / "held", status="interrupted")
    lines = "from lmlab.journal import RunDir; import sys; r = RunDir(sys.argv[1]); r.take_lock(); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", lines, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        reader = Reader(tmp_path)
        held = reader.read().alone[0]
        assert (held.status, held.reason) == ("running", f"pid {holder.pid} on {socket.gethostname()}")
        holder.kill()
        holder.wait()
        assert (RunDir(run).path / ".lock").exists(), "killed, it could not give it back"
        assert reader.read().alone[0].status == "interrupted", "no file has changed, but its process is gone"


def test_a_run_that_was_killed_is_not_called_running(tmp_path: Path) -> None:
    run = small_run(tmp_path / "sft" / "killed")
    write_json(run / "summary.json", {"status": "running", "exit_code": None})
    write_json(run / ".lock", {"host": socket.gethostname(), "pid": 2**22 + 1, "started": 1})
    found = one(tmp_path, "killed")
    assert (found.status, found.reason) == ("interrupted", "its process is gone and left no summary")


@pytest.mark.parametrize(
    ("summary", "status"),
    [({"exit_code": 143}, "interrupted"), ({"exit_code": 1}, "failed"), ({"exit_code": 0}, "finished"), ({}, "unknown")],
)  # fmt: skip
def test_an_exit_code_says_it_too(tmp_path: Path, summary: dict[str, Any], status: str) -> None:
    write_json(small_run(tmp_path / "sft" / "a") / "summary.json", summary)
    assert one(tmp_path, "a").status == status


def test_a_run_is_read_anew_only_when_its_files_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, read = Reader(root), []
    original = runs_module.read_run
    monkeypatch.setattr(
        runs_module, "read_run", lambda folder, path: read.append(path) or original(folder, path)
    )
    assert len(reader.read().all) == 5
    assert len(read) == 4
    assert reader.read().all == reader.read().all
    assert len(read) == 4
    with open(root / "sft" / "good" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 30, "val/loss": 0.5}\n')
    assert next(run for run in reader.read().all if run.name == "good").figures["val/loss"] == 0.5
    assert read[4:] == ["sft/good"]


# --- nothing breaks it ----------------------------------------------------------------------------------------------

BROKEN = [None, "", '{"step": 1, "val/loss": {', "[1]", "\x00\ufffd", "a: [*x", "[" * 100_000, '{"status": ["x"]}',
          '{"step": 1' + "0" * 5000 + "}", '{"started": 1e999, "status": 7, "exit_code": "x"}']  # fmt: skip


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "summary.json", "metrics.jsonl", ".lock"])
@pytest.mark.parametrize("content", BROKEN)
def test_any_file_may_be_torn_or_missing(root: Path, name: str, content: str | None) -> None:
    run = root / "sft" / "good"
    if content is None:
        (run / name).unlink(missing_ok=True)
    else:
        (run / name).write_text(content, encoding="utf-8")
    page = Page(render(Reader(root).read()))
    assert "good" in page.words
    if content is None and name != ".lock":
        assert f"no {name}" in page.words
    if content == "[1]" and name.endswith(".json"):
        assert f"{name} is broken" in page.words


@pytest.mark.parametrize("mark", sorted(MARKS - {"checkpoints"}))
def test_one_file_alone_is_a_row_that_says_so(tmp_path: Path, mark: str) -> None:
    (tmp_path / "sft" / "half").mkdir(parents=True)
    (tmp_path / "sft" / "half" / mark).write_text("", encoding="utf-8")
    found = one(tmp_path, "half")
    assert found.status == "unknown"
    assert "no " in found.notes
    assert "? unknown" in Page(render(Reader(tmp_path).read())).words


def test_a_file_that_is_a_directory_and_an_empty_run(tmp_path: Path) -> None:
    for name in ("summary.json", "metrics.jsonl", "config.yaml"):
        (tmp_path / "sft" / "odd" / name).mkdir(parents=True)
    (tmp_path / "sft" / "nothing").mkdir()
    (tmp_path / "sft" / "begun" / "checkpoints").mkdir(parents=True)
    found = {run.name: run for run in Reader(tmp_path).read().all}
    assert found.keys() == {"odd", "nothing", "begun"}
    assert "summary.json cannot be read (Is a directory)" in found["odd"].notes
    assert found["nothing"].notes == "an empty directory"
    Page(render(Reader(tmp_path).read()))


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "sft" / "piped"
    folder.mkdir(parents=True)
    for name in ("run.json", "summary.json", "metrics.jsonl", "config.yaml"):
        os.mkfifo(folder / name)
    notes = one(tmp_path, "piped").notes
    assert "config.yaml cannot be read (a pipe)" in notes
    assert "metrics.jsonl cannot be read (a pipe)" in notes


def test_links_and_locked_folders_are_said(root: Path, tmp_path: Path) -> None:
    os.symlink(root, root / "sft" / "loop")
    deep = root.joinpath(*"abcdefghij")
    small_run(deep / "deep")
    page = Page(render(Reader(root).read()))
    assert "Links to directories are not followed: sft/loop." in page.words
    assert "Folders more than 8 levels deep are not looked into: 1." in page.words
    (root / "sft" / "closed").mkdir(mode=0)
    if not os.access(root / "sft" / "closed", os.R_OK):  # the superuser may look everywhere
        assert (
            "Cannot be looked into: sft/closed: Permission denied." in Page(render(Reader(root).read())).words
        )


def test_numbers_too_large_for_a_plot_or_a_float(tmp_path: Path) -> None:
    run = small_run(tmp_path / "sft" / "wild")
    rows = [
        {"step": step, "val/loss": value}
        for step, value in enumerate((1e308, -1e308, 1e999, None, "x", True, [1]))
    ]
    write_lines(run / "metrics.jsonl", rows)
    write_json(
        run / "summary.json",
        {"status": "finished", "memory/peak_gb": 1e308, "model/params_trainable": -1e308},
    )
    assert one(tmp_path, "wild").curve == ((0, 1e308), (1, -1e308))
    assert "nan" not in render(Reader(tmp_path).read()).split("<tbody")[1]
    (run / "metrics.jsonl").write_text('{"step": 3, "val/loss": ' + "9" * 5000 + "}\n", encoding="utf-8")
    assert one(tmp_path, "wild").curve == ()


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_asks_for_nothing(root: Path) -> None:
    (root / "sft" / "good" / "report.html").write_text("x", encoding="utf-8")
    html = write_index(root).read_text(encoding="utf-8")
    assert_only_our_script(html)
    assert "http" not in html.replace("http-equiv", "")
    page = Page(html)
    text = " ".join(page.words.split())
    for said in ("5 runs: 1 failed, 3 finished, 1 refused; 1 sweep.", "331,776", "CUDA out of memory in <backward>",
                 "sweep of 3 jobs", "1.250lowest of 2", "cannot train", "2026-11-25 10:00"):  # fmt: skip
        assert said in text, said
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == ["./sft/good/report.html", "./reports/20261126-a-b/report.html"], "only what is there"
    heads = len(re_heads(page))
    rows = html.split("<tbody")[1:]
    assert heads == 13
    assert all(part.count("<td") % (heads - 1) == 0 for part in rows), "a cell for each column"
    assert [attrs.get("aria-sort") for tag, attrs in page.tags if tag == "th" and "aria-sort" in attrs] == [
        "descending"
    ]
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert "val/loss 4.000 at step 0 to 1.000 at step 20" in labels


def re_heads(page: Page) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in page.tags if tag == "th" and attrs.get("scope") == "col"]


def test_names_and_reasons_are_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "⧸")
    run = small_run(tmp_path / "sft" / name, task=HOSTILE, adapter=HOSTILE, status=HOSTILE)
    write_json(run / "summary.json", {"status": HOSTILE, "error": HOSTILE + "\x1b[31m\u202e"})
    sweep = tmp_path / "sweeps" / name
    small_run(sweep / "0-a")
    write_results(
        sweep, [{"job": 1, "overrides": HOSTILE, "status": f"{HOSTILE}: {HOSTILE}", "directory": ""}]
    )
    html = write_index(tmp_path).read_text(encoding="utf-8")
    assert_only_our_script(html)
    page = Page(html)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert "␛[31m\\u202e" in page.words


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    except OSError:
        pytest.skip("this file system has only names that are text")
    small_run(tmp_path / os.fsdecode(b"\xff\xfe") / "run")
    assert "run" in write_index(tmp_path).read_text(encoding="utf-8")


def test_a_long_curve_is_thinned_to_its_ends() -> None:
    drawn = sparkline([(step, 1 / (1 + step)) for step in range(1000)])
    assert drawn.count(",") == 48
    assert "at step 0 to 0.001000 at step 999" in drawn
    assert sparkline([(1, 2.0)]) == sparkline([]) == ""
    assert "22.0" not in sparkline([(0, 1.0), (1, 1.0)]), "a flat one lies within"


# --- the script -----------------------------------------------------------------------------------------------------


def test_an_index_of_somebody_else_stays(root: Path, report: Callable[..., tuple[int, str, str]]) -> None:
    page = root / "index.html"
    page.write_text("<h1>My site</h1>", encoding="utf-8")
    code, out, err = report(root)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: an index.html that is not lmlab's stands there ({page}): ")
    assert page.read_text(encoding="utf-8") == "<h1>My site</h1>"
    page.unlink()
    assert [report(root)[0] for _ in range(2)] == [0, 0], "its own is made anew"


@pytest.mark.usefixtures("undrawn")
def test_the_script_lists_a_folder(root: Path, report: Callable[..., tuple[int, str, str]]) -> None:
    assert report(root) == (0, f"{root / 'index.html'}\n", "")
    assert report(root / "sft", "--index") == (0, f"{root / 'sft' / 'index.html'}\n", "")
    assert report(root / "sft") == (0, f"{root / 'sft' / 'report.html'}\n", ""), "its runs, compared"
    assert report(root / "sweeps" / "ablation")[1].endswith("ablation/report.html\n")


@pytest.mark.parametrize("how", ["--serve", "--index"])
def test_the_script_says_what_is_wrong_in_one_line(
    root: Path, report: Callable[..., tuple[int, str, str]], how: str
) -> None:
    run = root / "sft" / "good"
    fix = "give a folder that holds runs, e.g. outputs"
    assert report(run, how) == (2, "", f"error: one run, not a folder of runs ({run}): {fix}\n")
    assert report(root / "x", how) == (2, "", f"error: no such directory ({root / 'x'}): {fix}\n")
    told = f"error: a list is of one folder, and compares nothing ({how}): report.py outputs {how}\n"
    assert report(root, run, how) == report(root, how, "--baseline", "a") == (2, "", told)
    code, _, err = report(root, "--serve", "--port", "70000")
    assert (code, err) == (2, "error: 70000 is no port (--port): 0 (any that is free) to 65535\n")

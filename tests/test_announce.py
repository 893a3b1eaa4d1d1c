"""The end of a run as it is printed: how it went, what was made, and commands that can be typed as they stand."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lmlab import announce
from lmlab.journal import RunDir, write_json
from lmlab.records import OF_A_MULTIRUN, Sample
from lmlab.tracking.transcript import Transcript

ARGV = ["train.py", "data=skills", "optim.lr=1e-3", "run_name=old", "resume=null", "samples.prompts=[a b]"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", OF_A_MULTIRUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    made = RunDir(tmp_path / "out" / "sft" / "my run")
    (made.path / "adapter").mkdir(parents=True)
    (made.best / "adapter").mkdir(parents=True)
    made.report.touch()
    write_json(made.info, {"argv": ARGV})
    return made


def ended(run: RunDir, monkeypatch: pytest.MonkeyPatch, status: str, **summary: object) -> list[str]:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    announce.end(Transcript(None), run, status, summary, seconds=83)
    return pipe.getvalue().splitlines()


def test_a_finished_run_says_where_all_is_and_what_to_type(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = {"best/val_loss": 4.6445, "best/step": 20, "memory/peak_gb": 0.816, "exit_code": 0}
    said = ended(run, monkeypatch, "finished", **summary)
    assert said[1] == "finished: best val/loss 4.6445 at step 20, peak memory 0.82 GB, 1 min 23 s"
    where = "'out/sft/my run'"
    assert f"weights: {where}/adapter (best: {where}/best/adapter)" in said
    assert f"report: {where}/report.html" in said
    commands = [shlex.split(line, comments=True) for line in said if line.startswith("  python")]
    assert [Path(words[1]).stem for words in commands] == ["generate", "chat", "evaluate", "export", "report"]
    assert all(words[2] == "out/sft/my run" for words in commands)
    assert all(Path(__file__).parents[1].joinpath(words[1]).is_file() for words in commands)


def test_a_stopped_run_says_how_to_go_on(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ended(run, monkeypatch, "interrupted", **{"memory/peak_gb": 0.5, "exit_code": 143})
    assert said[1] == "interrupted: peak memory 0.50 GB, 1 min 23 s"
    (go_on,) = [line for line in said if "resume=auto" in line]
    assert shlex.split(go_on, comments=True) == [
        "python", "train.py", "data=skills", "optim.lr=1e-3", "samples.prompts=[a b]", "run_name=my run", "resume=auto",
    ]  # fmt: skip


@pytest.mark.parametrize(("code", "saved", "goes_on"), [(1, True, True), (1, False, False), (2, True, False)])
def test_a_failed_run_goes_on_only_from_a_checkpoint(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, code: int, saved: bool, goes_on: bool
) -> None:
    if saved:
        (run.checkpoints / "step-00000010").mkdir(parents=True)
    said = ended(run, monkeypatch, "failed", exit_code=code)
    assert said[1] == "failed: 1 min 23 s"
    assert any("resume=auto" in line for line in said) == goes_on


@pytest.mark.parametrize("width", [40, 59, 60, 100])
def test_samples_are_a_list_where_a_table_would_break_words(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    stream = io.StringIO()
    transcript = Transcript(None)
    transcript.screen = Console(file=stream, width=width, force_terminal=True, color_system=None)
    text = "four five\x1b[31m [bold]six[/]"
    announce.samples(transcript, [Sample(20, 0, "Reverse.\none two", "greedy", 0, text, 3, "eos")])
    shown = stream.getvalue()
    assert "samples at step 20" in shown
    assert ("greedy: four" in shown) == (width < announce.NARROW)
    assert "\x1b[31m" not in shown
    assert "[bold]six[/]" in " ".join(shown.split())
    announce.samples(transcript, [])
    assert stream.getvalue() == shown

"""The end of a run as it is printed: how it went, what was made, and commands that can be typed as they stand."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from lmlab import announce
from lmlab.config.compose import compose_config
from lmlab.data.prepared import PreparedData
from lmlab.journal import RunDir, write_json
from lmlab.records import OF_A_MULTIRUN, Sample
from lmlab.tracking.transcript import Transcript

FIGURES = {
    "model/params_total": 3_553_728,
    "model/params_trainable": 331_776,
    "model/base_bits_per_param": 4.28,
}
NO_KEY = "no key found, so this run is recorded offline (set WANDB_API_KEY in .env to go online)"
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
    write_json(made.info, {"argv": ARGV, "flags": ["--config-dir", "my conf"]})
    return made


def started(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    *overrides: str,
    width: int,
    val_tokens: int = 20_000,
    val_rows: int = 296,
    **told: Any,
) -> list[str]:
    """What is printed at the start of a run with such a config."""
    config = compose_config(["data=skills", *overrides])
    side = {"records": 5704, "tokens": 200_000, "supervised_tokens": 22_000, "supervised_bytes": 60_000}
    report = {"train": side, "val": {**side, "records": 296, "tokens": val_tokens}, "rows": {"train": 5704}, "tokens": 215_834,
              "supervised_tokens": 22_821, "records_read": 6000, "records_kept": 6000, "records_dropped": {},
              "records_truncated": 0}  # fmt: skip
    prepared = SimpleNamespace(
        meta={"report": report, "format": "triples", "stream": False},
        packed=False,
        examples=[],
        rows=lambda side: range(val_rows),
    )
    optim = SimpleNamespace(name="adamw", lr=1e-3, schedule="cosine")
    built = SimpleNamespace(
        optim=optim, policy=[("device", "cpu, 2 threads"), ("precision", "fp32 products")]
    )
    transcript, stream = Transcript(None), io.StringIO()
    transcript.screen = Console(file=stream, width=width, force_terminal=True, color_system=None)
    given: dict[str, Any] = {"planned_gb": {"load": 0.3, "backward": 0.82}, "mirror": "offline", **told}
    announce.start(transcript, run, config, cast(PreparedData, prepared), built, 200, FIGURES, **given)
    return stream.getvalue().splitlines()


def test_the_table_at_the_start(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    said = started(
        run, monkeypatch, "adapter=qlora", "trainer.accumulate_grad_batches=2", "optim.warmup_steps=300",
        width=200, remarks=[f"W&B: {NO_KEY}", "added tokens: <x>"],
    )  # fmt: skip
    for line in (
        "task        sft, seed 1",
        "model       tiny: 3,553,728 parameters, 331,776 trained (9.34%)",
        "adapter     qlora, rank 16, over nf4 (4.28 bits per parameter)",
        "data        skills as triples: 5,704 + 296 validation records, 215,834 tokens, 11% trained",
        "steps       200 of 16 examples (8 at once, 2 times), validation every 50",
        "device      cpu, 2 threads",
        "plan        a peak of 0.82 GB, in backward (trainer.memory_plan)",
        f"logger      W&B: {NO_KEY}",
        "output      out/sft/my run",
        "added tokens: <x>",
        "note: optim.warmup_steps=300 is not over in 200 steps: the peak learning rate is never reached",
        "records     6,000 read, 6,000 kept, 0 dropped, 0 truncated",
    ):
        assert said.count(line) == 1, (line, said)


def test_the_table_of_a_run_without_adapter_plan_or_mirror(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["adapter=none", "logger=none"]
    said = started(run, monkeypatch, *told, width=200, planned_gb={}, mirror="disabled")
    assert "adapter     none: every weight is trained (4.28 bits per parameter)" in said
    assert "logger      none" in said
    assert not any(line.startswith("plan ") for line in said)
    assert "logger      wandb, online, project lmlab" in started(run, monkeypatch, width=200, mirror="online")


def test_a_validation_that_takes_longer_than_the_training_is_told_of(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["trainer.val_every_n_steps=100", "trainer.batch_size=57"]
    note = "note: each validation reads 1,000,000 tokens, 5 times what the 100 steps between two train on: "
    note += "trainer.max_val_rows=64 would measure 64 rows spread over them"
    assert note in started(run, monkeypatch, *told, width=200, val_tokens=1_000_000)
    said = started(run, monkeypatch, *told, width=200, val_tokens=1_000_000, val_rows=60)
    assert not any("each validation reads" in line for line in said)
    said = started(run, monkeypatch, *told, width=200, val_tokens=1_000_000, val_rows=4_321)
    assert any("trainer.max_val_rows=900 would measure 900 rows" in line for line in said)
    for other, tokens in ([], 999_999), (["trainer.val_every_n_steps=200"], 1_000_000):
        said = started(run, monkeypatch, *told, *other, width=200, val_tokens=tokens)
        assert not any("each validation reads" in line for line in said)
    said = started(run, monkeypatch, *told, "trainer.max_val_rows=100", width=200, val_tokens=1_000_000)
    assert "steps       200 of 57 examples, validation every 100 on 100 of 296 rows" in said
    assert not any("each validation reads" in line for line in said)


def test_a_whole_model_can_be_tuned_next(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.path / "adapter").rename(run.path / "model")
    said = ended(run, monkeypatch, "finished", exit_code=0)
    command = (
        "  python train.py model=pretrained model.name_or_path='out/sft/my run' data=jsonl data.path=FILE"
    )
    assert any(line.startswith(command) for line in said)


@pytest.mark.parametrize("width", [40, 60])
def test_the_table_in_a_narrow_terminal(run: RunDir, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    said = started(run, monkeypatch, width=width, remarks=[f"W&B: {NO_KEY}"])
    words = " ".join(said).split()
    for figure in ("3,553,728", "331,776", "(9.34%)", "215,834", "WANDB_API_KEY"):
        assert figure in words
    assert max(map(len, said)) <= width


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
        "python", "train.py", "--config-dir", "my conf",
        "data=skills", "optim.lr=1e-3", "samples.prompts=[a b]", "run_name=my run", "resume=auto",
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

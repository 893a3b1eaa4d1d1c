"""What W&B gets of the data before the first step, read back from the files an offline run writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import wandb

from lmlab.tracking.wandb import EXAMPLE_COLUMNS, LoggerConfig, WandbTracker

Make = Callable[..., WandbTracker]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make_tracker(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))

    def make(mode: str = "offline") -> WandbTracker:
        config = LoggerConfig(
            mode=mode,  # type: ignore[arg-type]
            project="lmlab",
            entity=None,
            group=None,
            tags=[],
            notes=None,
            init_timeout=20,
            finish_timeout=30,
        )
        return WandbTracker(
            config,
            run_dir=tmp_path,
            run_id="abc123",
            settings={"data": {"kind": "jsonl"}},
            tags=["adapter:lora"],
            job_type="sft",
            say=said.append,
        )

    return make


def inspect(run_dir: Path, *options: str) -> str:
    (file,) = run_dir.glob("wandb/*offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads(inspect(run_dir, "--summary"))["summary"]


def history_of(run_dir: Path) -> list[dict[str, Any]]:
    """Logged rows; ``data/lengths.bins`` is told as ``{"data/lengths": {"bins": ...}}``."""
    rows: list[dict[str, Any]] = []
    for record in map(json.loads, inspect(run_dir).splitlines()):
        if record["type"] != "history":
            continue
        rows.append({})
        for key, value in record["history"]["item"].items():
            name, _, part = key.partition(".")
            rows[-1] |= {name: value} if not part else {name: {**rows[-1].get(name, {}), part: value}}
    return rows


def test_counts_histogram_examples_and_page_are_mirrored_at_step_0(
    tmp_path: Path, make_tracker: Make, data_report: dict[str, Any], examples: list[dict[str, Any]]
) -> None:
    tracker = make_tracker()
    tracker.data(data_report, examples)
    tracker.log(0, {"val/loss": 2.0})
    tracker.finish(0)

    summary = summary_of(tmp_path)
    for name in ("records_read", "records_kept", "records_truncated", "tokens", "supervised_tokens", "fill"):
        assert summary[f"data/{name}"] == data_report[name]
    assert summary["data/records_dropped/empty output"] == 3
    assert summary["data/train/tokens"] == 2400
    assert summary["data/tokens_per_record/median"] == 45

    (row,) = [row for row in history_of(tmp_path) if "data/lengths" in row]
    assert row["trainer/step"] == 0
    assert row["data/lengths"]["bins"] == data_report["length_histogram"]["edges"]
    assert row["data/lengths"]["values"] == data_report["length_histogram"]["counts"]

    (folder,) = tmp_path.glob("wandb/*offline-run-*/files")
    table = json.loads((folder / row["data/examples"]["path"]).read_text(encoding="utf-8"))
    assert tuple(table["columns"]) == EXAMPLE_COLUMNS
    assert table["data"][0] == ["a.jsonl:1", 40, 10, False, "Q: 1 + 1\nA:⟦ 2<EOS>⟧"]
    assert table["data"][2] == ["a.jsonl:5", 40, 10, True, "Tell a story.\n⟦Once upon⟧"]
    assert len(table["data"]) == 5
    page = (folder / row["data/mask_preview"]["path"]).read_text(encoding="utf-8")
    assert "Q: 1 + 1\nA:<mark> 2</mark><mark>&lt;EOS&gt;</mark>" in page
    assert "<script" not in page
    assert "told: <script>alert(1)</script>" in unescape(page)
    assert "://" not in page  # nothing from outside, not W&B's own style sheet either


def test_half_a_surrogate_pair_does_not_end_the_mirroring(
    tmp_path: Path, make_tracker: Make, said: list[str], examples: list[dict[str, Any]]
) -> None:
    tracker = make_tracker()
    tracker.data({"records_read": 1}, [{**examples[0], "spans": [["a\ud800", True]]}])
    tracker.finish(0)
    assert not [line for line in said if "stopped" in line]
    (file,) = tmp_path.glob("wandb/*offline-run-*/files/media/table/data/*.table.json")
    assert json.loads(file.read_text(encoding="utf-8"))["data"][0][-1] == "⟦a\\ud800⟧"


def test_an_older_report_is_mirrored_as_far_as_it_goes(tmp_path: Path, make_tracker: Make) -> None:
    tracker = make_tracker()
    tracker.data({"records_read": 7, "length_histogram": "none"}, [])
    tracker.finish(0)
    summary = summary_of(tmp_path)
    assert summary["data/records_read"] == 7
    assert not [name for name in summary if name in ("data/lengths", "data/examples", "data/mask_preview")]


def test_disabled_writes_nothing(
    tmp_path: Path, make_tracker: Make, data_report: dict[str, Any], examples: list[dict[str, Any]]
) -> None:
    make_tracker("disabled").data(data_report, examples)
    assert not (tmp_path / "wandb").exists()


def test_a_failure_is_one_line_and_never_the_runs(
    make_tracker: Make,
    said: list[str],
    data_report: dict[str, Any],
    examples: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("No space left on device\nand more")

    tracker = make_tracker()
    monkeypatch.setattr(wandb, "Html", fail)
    tracker.data(data_report, examples)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish(0)
    (line,) = [line for line in said if "stopped" in line]
    assert line == "W&B: stopped mirroring (No space left on device); every number is in metrics.jsonl"

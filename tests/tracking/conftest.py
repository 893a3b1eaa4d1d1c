"""What runs leave: a data report and a mask preview with texts that must be neither obeyed nor lost, and a small ablation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab.tracking import group_plots, plots
from lmlab.tracking.groups import Entry

from .pages import script, small_run

HOSTILE = '<script>alert(1)</script> & "q" [bold red]not markup[/] \x1b[31mred\x07 \u202eturned\u202c שלום 😀'


@pytest.fixture
def data_report() -> dict[str, Any]:
    """Counts of 100 records, 4 of them dropped."""
    side = {"records": 48, "tokens": 2400, "supervised_tokens": 600, "supervised_bytes": 2000}
    return {
        "records_read": 100,
        "records_kept": 96,
        "records_dropped": {"broken JSON": 1, "empty output": 3},
        "dropped_examples": [
            {"reason": "empty output", "where": "a.jsonl:7", "detail": "output is ''"},
            {"reason": "broken JSON", "where": "a.jsonl:9", "detail": "[/] <b> \x1b[0m"},
            {"reason": "empty output", "where": "a.jsonl:30", "detail": ""},
        ],
        "records_truncated": 2,
        "tokens": 4800,
        "supervised_tokens": 1200,
        "tokens_per_record": {"mean": 50.0, "median": 45.0, "shortest": 10, "longest": 169},
        "length_histogram": {"edges": [10, 50, 90, 130, 170], "counts": [60, 35, 0, 1]},
        "longest": {"where": "a.jsonl:12", "tokens": 169, "text": "### Instruction:\n" + HOSTILE},
        "shortest": {"where": "a.jsonl:3", "tokens": 10, "text": "Q: short\nA: yes"},
        "train": side,
        "val": side,
        "rows": {"train": 20},
        "fill": 0.97,
    }


@pytest.fixture
def examples() -> list[dict[str, Any]]:
    """Five examples: plain, hostile, cut, long, and a conversation of 60 turns."""
    texts: list[tuple[str, list[list[Any]], bool]] = [
        ("a.jsonl:1", [["Q: 1 + 1\nA:", False], [" 2", True], ["<EOS>", True]], False),
        ("a.jsonl:2", [[HOSTILE + "\n", False], ["told: " + HOSTILE, True], ["<EOS>", True]], False),
        ("a.jsonl:5", [["Tell a story.\n", False], ["Once upon", True]], True),
        ("a.jsonl:12", [["first words " + "middle " * 300 + "last words\n", False],
                        ["begun " + "and on " * 300 + "ended", True], ["<EOS>", True]], False),
        ("a.jsonl:8", [[f"turn {i}\n", i % 2 == 1] for i in range(60)], False),
    ]  # fmt: skip
    return [
        {
            "where": where,
            "tokens": 40,
            "supervised_tokens": 10,
            "truncated": cut,
            "spans": spans,
            "eos": spans[-1][0] == "<EOS>",
        }
        for where, spans, cut in texts
    ]


@pytest.fixture
def ablation(tmp_path: Path) -> list[Entry]:
    """none on seeds 1 to 3, lora on 1, 2, 4: losses, tokens and memory chosen so that a head can do the sums."""
    made = []
    for adapter, seed, end in (("none", 1, 1.0), ("none", 2, 1.2), ("none", 3, 1.4), ("lora", 1, 1.1), ("lora", 2, 1.4), ("lora", 4, 9.0)):  # fmt: skip
        lora = adapter == "lora"
        folder = small_run(
            tmp_path / f"{adapter}-{seed}", adapter=adapter, seed=seed, losses={0: 4.0, 10: 2.0, 20: end}, matches={20: 0.5 + seed / 10},
            rate=150.0 if lora else 100.0, flops=1e6 if lora else 2e6, speed=300.0 if lora else 100.0,
            peak=1.2 if lora else 1.5 + seed / 100, trained=50 if lora else 1000,
        )  # fmt: skip
        made.append(Entry(f"adapter={adapter} seed={seed}", folder))
    return made


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the slow part, for tests that are about something else."""
    for module in (plots, group_plots):
        monkeypatch.setattr(module, "draw", lambda panel: "<svg></svg>")


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``report(*arguments)``: exit code and both streams of scripts/report.py."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        code = script().main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run

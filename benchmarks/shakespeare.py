"""Character-level Shakespeare at nanoGPT's CPU size: lmlab beside a plain torch loop over a lean GPT (lean_gpt.py).

Three contenders in fresh processes, one round after another, each with as many seeds as repeats:

- ``lean_gpt``: the baseline, 2,000 iterations with nanoGPT's settings;
- ``lmlab gpt2``: experiment=shakespeare_gpt2, the same shape from transformers in `train.py`, logging as users have it;
- ``lmlab fast``: experiment=shakespeare_fast, a preset with at most as many parameters, in 780 steps.

All are measured on the whole last tenth of the text in windows of 64, in nats per character. Time is that of training,
validation left out. A run's text is any file, so `--text` with a book shows whether a gain carries over.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import (
    DATA,
    OFFLINE,
    ROOT,
    Contender,
    Machine,
    compare,
    markdown,
    paired_ratio,
    python,
    require_data,
    save,
    spread,
    write_figures,
)

HERE = Path(__file__).resolve()
TARGET = 1.88
"""Validation loss, nats per character: nanoGPT's README for this size after 2,000 iterations."""
TEXT = DATA / "clm" / "tinyshakespeare.txt"
OWN = {"lmlab gpt2": "shakespeare_gpt2", "lmlab fast": "shakespeare_fast"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=2000, help="iterations of both GPT-2s")
    parser.add_argument("--fast-steps", type=int, default=0, help="of the preset; 0 as the experiment says")
    parser.add_argument("--own", choices=sorted(OWN.values()), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.text == TEXT:
        require_data()
    text = told.text.absolute()
    if told.own:
        steps = told.steps if told.own == OWN["lmlab gpt2"] else told.fast_steps
        write_figures(own_figures(told.own, text, steps=steps, seed=told.seed))
        return 0
    machine = Machine.of_threads(told.threads)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(1, told.repeats + 1):
        for name, made in compare(contenders(text, told, seed), machine, 1).items():
            runs.setdefault(name, []).extend(made)
    result = {"text": text.name, "steps": told.steps, "machine": machine.describe(), "runs": runs}
    save("shakespeare", result, table(runs, text.name))
    return 0


def contenders(text: Path, told: argparse.Namespace, seed: int) -> list[Contender]:
    """The three commands of one round."""
    lean = [python(), str(HERE.with_name("lean_gpt.py")), str(text)]
    own = [python(), str(HERE), "--text", str(text), "--fast-steps", str(told.fast_steps)]
    common = ["--steps", str(told.steps), "--seed", str(seed)]
    return [
        Contender("lean_gpt", [*lean, *common]),
        *(Contender(name, [*own, *common, "--own", experiment]) for name, experiment in OWN.items()),
    ]


def own_figures(experiment: str, text: Path, *, steps: int, seed: int) -> dict[str, Any]:
    """One run of train.py and what its metrics.jsonl says, in the words of `lean_gpt.train`."""
    with tempfile.TemporaryDirectory(prefix="lmlab-shakespeare-") as folder:
        overrides = [
            f"experiment={experiment}",
            f"data.path={text}",
            f"seed={seed}",
            "logger=none",
            "samples.prompts=0",
            "run_name=run",
            f"output_root={folder}",
            *([f"trainer.max_steps={steps}"] if steps else []),
        ]
        command = [sys.executable, str(ROOT / "train.py"), *overrides]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **OFFLINE}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{experiment} failed ({done.returncode}):\n{done.stderr[-3000:]}")
        run = Path(folder) / "pretrain" / "run"
        lines = [
            json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {**figures_of(lines), "parameters": summary["model/params_total"]}


def figures_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """``seconds``, ``ms_per_step``, ``curve`` and ``peak_rss_gb`` out of a run's log lines.

    A log point gives the tokens per second since the one before it, validation left out; so seconds add up.
    """
    seconds = tokens = last_step = 0.0
    per_step, curve = [], []
    for line in lines:
        if "perf/tokens_per_second" in line:
            took = (line["train/tokens"] - tokens) / line["perf/tokens_per_second"]
            per_step.append(1e3 * took / (line["step"] - last_step))
            seconds, tokens, last_step = seconds + took, line["train/tokens"], line["step"]
        if "val/loss" in line and line["step"] > 0:
            curve.append([line["step"], seconds, line["val/loss"]])
    peaks = [value for line in lines for key, value in line.items() if key.endswith("/peak_gb")]
    return {
        "seconds": seconds,
        "ms_per_step": statistics.median(per_step),
        "curve": curve,
        "peak_rss_gb": max(peaks, default=0.0),
    }


def table(runs: dict[str, list[dict[str, Any]]], text: str) -> str:
    """Medians and ranges over the rounds; ratios are taken within a round."""
    rows = []
    for name, made in runs.items():
        for run in made:
            run["val_loss"] = run["curve"][-1][2]
        figures = (("val_loss", 4), ("ms_per_step", 2), ("seconds", 1))
        cells = [spread(made, figure) for figure, _ in figures]
        ratios = [paired_ratio(made, runs["lean_gpt"], figure) for figure in ("ms_per_step", "seconds")]
        rows.append(
            [
                name,
                f"{made[0]['parameters']:,}",
                f"{made[0]['curve'][-1][0]:,}",
                *(
                    cell.text(digits) if cell else "-"
                    for cell, (_, digits) in zip(cells, figures, strict=True)
                ),
                *(ratio.text(3) if ratio else "-" for ratio in ratios),
                f"{sum(run['val_loss'] <= TARGET for run in made)} of {len(made)}",
            ]
        )
    header = ("contender", "parameters", "steps", "validation loss", "ms a step", "seconds")
    return f"{text}\n\n" + markdown(
        (*header, "ms ratio", "seconds ratio", f"runs at {TARGET} or below"), rows
    )


if __name__ == "__main__":
    sys.exit(main())

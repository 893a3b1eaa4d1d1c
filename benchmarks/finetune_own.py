"""lmlab in the fine-tuning suite, as its users run it: a prepared run directory, then `lmlab.worker` over it.

    python benchmarks/finetune_own.py prepare run_name=NAME [overrides]     what train.py does before it trains
    python benchmarks/finetune_own.py train RUN_DIR --rows 48:128 --limit               lmlab.worker, then the figures

The figures come from the run's own metrics.jsonl. With ``--limit`` the matrix products of the timed steps are timed in the
same process afterwards (gemm_limit.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from side_by_side import status_gb, write_figures

PACKAGES = ("torch", "transformers", "peft", "lightning", "bitsandbytes")


def prepare(overrides: list[str]) -> int:
    from lmlab.config.compose import run_app, to_run_config
    from lmlab.start import create_run, plan_run

    def only_prepare(composed: Any, told: list[str]) -> int:
        plan = plan_run(to_run_config(composed), told)
        create_run(plan, told)
        plan.run.release()
        return 0

    sys.argv = ["train.py", *overrides]
    return run_app(only_prepare)


def train(run_dir: Path, *, timed_rows: str | None, limit: bool) -> int:
    import_what_training_needs()
    after_imports = status_gb("VmRSS")
    from lmlab.worker import main as work

    code = work([str(run_dir)])
    if code:
        return code
    figures = {"rss_after_imports_gb": after_imports, **read_run(run_dir, timed_rows)}
    if limit and timed_rows:
        write_figures(figures)  # from here on memory is the limit's
        from gemm_limit import step_seconds

        timed = figures["steps"]
        bounds = [step_seconds(run_dir, tokens, supervised) for tokens, supervised in timed]
        figures["gemm_seconds"] = sum(bounds)
        figures["share_of_limit"] = sum(bounds) / figures["seconds"]
        # Products are timed at their best, so the step that was disturbed least is what compares with them.
        pairs = zip(bounds, figures["step_seconds"], strict=True)
        figures["share_of_limit_best_step"] = max(bound / taken for bound, taken in pairs)
    write_figures(figures)
    return 0


def import_what_training_needs() -> None:
    """All of it, so that growth of memory afterwards is the run's and not an import's."""
    from lmlab.config.compose import load_env

    load_env()  # as train.py does before torch is imported
    import bitsandbytes  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lmlab.assemble
    import lmlab.session
    import lmlab.training.fit  # noqa: F401


def read_run(run_dir: Path, timed_rows: str | None) -> dict[str, Any]:
    """Losses and times from the run's journal.

    A step lasts from the log line before its own to its own: loading, logging and the loop are in it, as for a user.
    """
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    logged = {line["step"]: line for line in lines if "train/loss" in line}
    peaks = [
        v for line in lines for k, v in line.items() if k.startswith("memory/") and k.endswith("peak_gb")
    ]
    figures: dict[str, Any] = {
        "losses": [logged[step]["train/loss"] for step in sorted(logged)],
        "peak_rss_gb": max([0.0, *peaks]),
        "versions": {name: version(name) for name in PACKAGES},
    }
    summary = json.loads((run_dir / "summary.json").read_text("utf-8"))
    figures["base_bits_per_param"] = summary["model/base_bits_per_param"]
    if not timed_rows:
        return figures
    rows = json.loads((run_dir.parents[2] / "rows.json").read_text("utf-8"))
    begin, end = map(int, timed_rows.split(":"))
    last = max(logged)
    batch_size = end // last
    first = begin // batch_size
    if batch_size * last != end or batch_size * first != begin or not first:
        raise SystemExit(f"{last} steps do not end at row {end} of steps that begin at row {begin}")
    steps = []
    for step in range(first, last):
        some = rows[step * batch_size : (step + 1) * batch_size]
        # lmlab runs a document of n + 1 tokens as n positions, each of which predicts the next.
        tokens = sum(len(row["input_ids"]) - 1 for row in some)
        steps.append((tokens, sum(label != -100 for row in some for label in row["labels"][1:])))
    timed = rows[begin:end]
    seconds = logged[last]["time"] - logged[first]["time"]
    tokens = sum(len(row["input_ids"]) for row in timed)
    figures.update(
        seconds=seconds,
        step_seconds=[logged[s + 1]["time"] - logged[s]["time"] for s in range(first, last)],
        steps=steps,
        tokens_per_second=tokens / seconds,
        supervised_per_second=sum(supervised for _, supervised in steps) / seconds,
    )
    return figures


def main() -> int:
    verb, *rest = sys.argv[1:]
    if verb == "prepare":
        return prepare(rest)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--rows", help="the rows of the timed steps, first:end; none: no times")
    parser.add_argument("--limit", action="store_true", help="time the step's matrix products too")
    options = parser.parse_args(rest)
    return train(options.run_dir, timed_rows=options.rows, limit=options.limit)


if __name__ == "__main__":
    sys.exit(main())

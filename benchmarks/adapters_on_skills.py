"""Exact match before and after: none, lora, qlora on `experiment=skills`, mean and spread over seeds, as a Markdown table.

`python benchmarks/adapters_on_skills.py --steps 500 --seeds 1,2,3` runs one multirun of train.py and reads its metrics.jsonl files.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--adapters", default="none,lora,qlora")
    parser.add_argument("--out", default="outputs")
    parser.add_argument("overrides", nargs="*", help="further overrides of train.py")
    options = parser.parse_args()
    name = f"skills-{options.steps}"
    command = [
        sys.executable,
        "train.py",
        "-m",
        "experiment=skills",
        f"adapter={options.adapters}",
        f"seed={options.seeds}",
        f"trainer.max_steps={options.steps}",
        f"trainer.val_every_n_steps={options.steps}",
        f"run_name={name}",
        f"output_root={options.out}",
        *options.overrides,
    ]
    print("$", " ".join(["python", *command[1:]]), flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    print(table(Path(options.out) / "sweeps" / name))
    return code


def table(sweep: Path) -> str:
    """Mean and range over seeds of each adapter's exact match and loss, at step 0 and at the end."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in csv.DictReader((sweep / "results.csv").open(encoding="utf-8")):
        if row["status"] != "finished":
            continue
        lines = [
            json.loads(line) for line in (Path(row["directory"]) / "metrics.jsonl").open(encoding="utf-8")
        ]
        validations = [line for line in lines if "val/loss" in line]
        adapter = next(o.split("=")[1] for o in row["overrides"].split() if o.startswith("adapter="))
        found[adapter].append(
            {"first": validations[0], "last": validations[-1], "seconds": float(row["seconds"])}
        )
    out = [
        "| adapter | seeds | exact match before | after (mean, range) | val/loss before | after | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for adapter, runs in found.items():
        before = [run["first"]["val/exact_match"] for run in runs]
        after = [run["last"]["val/exact_match"] for run in runs]
        losses = [statistics.mean(run[when]["val/loss"] for run in runs) for when in ("first", "last")]
        out.append(
            f"| {adapter} | {len(runs)} | {statistics.mean(before):.1%} | {statistics.mean(after):.1%} ({min(after):.1%} to {max(after):.1%}) "
            f"| {losses[0]:.3f} | {losses[1]:.3f} | {statistics.mean(run['seconds'] for run in runs):.0f} |"
        )
    return "\n".join(out)


if __name__ == "__main__":
    sys.exit(main())

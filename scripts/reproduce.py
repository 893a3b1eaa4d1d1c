"""Make a run again from its run.json and config.yaml, and compare: `python scripts/reproduce.py RUN`.

Its data and tokenizer must be as they were; another commit, version or machine is said. The new run goes into a directory
of its own beside RUN (or under `--to DIR`) and not to W&B. Then every metric, sample and trained weight is compared:
exit code 0 if all are equal bit for bit, 1 if not. The outcome is kept there as reproduction.json.

    python scripts/reproduce.py outputs/sft/my-run
    python scripts/reproduce.py outputs/sft/my-run --steps 20    only the first 20 steps of its schedule
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lmlab.config.compose import run_script
from lmlab.journal import RunDir
from lmlab.reproduce import Reproduction, reproduce


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run directory, e.g. outputs/sft/NAME, or a multirun's job"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the new run's directory goes")
    parser.add_argument("--steps", type=int, help="end after so many steps, under the same schedule")
    options = parser.parse_args()
    return run_script(lambda: _reproduce(options))


def _reproduce(options: argparse.Namespace) -> int:
    found = reproduce(RunDir(options.run), to=options.to, steps=options.steps)
    kept = os.path.relpath(found.write())
    show(found)
    if found.equal:
        print(f"reproduced: equal bit for bit, kept in {kept}")
        return 0
    print(f"not reproduced, kept in {kept}:")
    for line in found.differences[:10]:
        print(f"  {line}")
    if len(found.differences) > 10:
        print(f"  and {len(found.differences) - 10} more")
    return 1


def show(found: Reproduction) -> None:
    from rich.console import Console
    from rich.table import Table

    what = f"the first {found.steps} steps of {found.run.path.name}" if found.steps else found.run.path.name
    table = Table(title=f"{what}, made again", title_justify="left")
    for column in ("what", "compared", "equal", "largest relative difference", "at step"):
        table.add_column(column, justify="left" if column == "what" else "right", overflow="fold")
    for metric in found.metrics:
        apart = f"{metric.largest:.2e}" if metric.largest else ""
        compared = f"{metric.points}" + (f", {metric.missing} missing" if metric.missing else "")
        step = "" if metric.step is None else str(metric.step)
        table.add_row(metric.name, compared, "yes" if metric.equal else "no", apart, step)
    count, same = found.samples
    table.add_row("samples", str(count), "yes" if count == same else f"{same} of {count}", "", "")
    if found.weights is None:
        table.add_row("weights", "no checkpoint of that step", "", "", "")
    else:
        equal = "yes" if found.weights_equal else "no"
        table.add_row("weights, optimizer, random states", found.weights, equal, "", "")
    Console(width=max(Console().width, 100)).print(table, highlight=False)


if __name__ == "__main__":
    sys.exit(main())

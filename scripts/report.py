"""Reports of runs as HTML pages.

``python scripts/report.py RUN`` writes the run's own report.html. Several runs, or a sweep's folder, are compared on one
page: into the sweep's folder, or ``outputs/reports/<time>-<names>`` with a results.csv, or ``--to DIR``. Prints the path.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lmlab.journal import slug
from lmlab.records import UserError
from lmlab.tracking.compare import write_comparison
from lmlab.tracking.report import is_run, write_report
from lmlab.tracking.results import RESULTS, entries_of, rows_of, write_results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report", description="Write a run's report, or compare runs.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run, e.g. outputs/sft/NAME, or a sweep's folder"
    )
    parser.add_argument("--compare", action="store_true", help="the comparing page of a single run too")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the comparison goes")
    parser.add_argument("--baseline", metavar="LABEL", help="the group that others are compared with")
    options = parser.parse_args(argv)
    runs: list[Path] = options.runs
    own = len(runs) == 1 and (is_run(runs[0]) or not _is_sweep(runs[0]))
    try:
        if own and not (options.compare or options.to or options.baseline):
            print(write_report(runs[0]))
        else:
            print(compare(runs, to=options.to, baseline=options.baseline))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _is_sweep(path: Path) -> bool:
    return path.is_dir() and ((path / RESULTS).is_file() or any(map(is_run, path.iterdir())))


def compare(runs: Sequence[Path], *, to: Path | None, baseline: str | None) -> Path:
    names = [run.resolve().name for run in runs]
    if to is None and len(runs) == 1 and not is_run(runs[0]):
        to = runs[0]
    if to is None:
        moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        root = Path(os.environ.get("LMLAB_OUTPUT_ROOT") or "outputs")
        to = root / "reports" / f"{moment}-{slug('-'.join(names), max_length=60)}"
    if is_run(to):
        raise UserError(
            "a run's directory keeps its own report", where=str(to), fix="name another folder with --to"
        )
    title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    try:
        entries = [entry for run in runs for entry in entries_of(run)]
        to.mkdir(parents=True, exist_ok=True)
        page = write_comparison(to, entries, title=title, baseline=baseline)
        if not any(map(is_run, to.iterdir())):  # else it is a sweep's folder, with the launcher's own table
            write_results(to, rows_of(entries))
    except OSError as error:
        raise UserError(
            f"the comparison cannot be made, {error.strerror}",
            where=str(error.filename or to),
            fix="name a folder that can be written to with --to",
        ) from error
    return page


if __name__ == "__main__":
    sys.exit(main())

"""Reports of runs as HTML pages.

``python scripts/report.py RUN`` writes the run's own report.html. Several runs, or a sweep's folder, are compared on one
page: into the sweep's folder, or ``outputs/reports/<time>-<names>`` with a results.csv, or ``--to DIR``. Prints the path.
``python scripts/report.py outputs`` lists all runs below a folder in its index.html; with ``--serve`` the list is served to
this machine and follows the runs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lmlab.config.compose import run_script
from lmlab.journal import slug
from lmlab.records import UserError
from lmlab.tracking.compare import write_comparison
from lmlab.tracking.index import write_index
from lmlab.tracking.report import is_run, write_report
from lmlab.tracking.results import RESULTS, entries_of, rows_of, write_results
from lmlab.tracking.runs import Reader


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py", description="Write a run's report, compare runs, or list all of a folder."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run, e.g. outputs/sft/NAME, a sweep's folder, or outputs",
    )
    parser.add_argument("--compare", action="store_true", help="the comparing page of a single run too")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the comparison goes")
    parser.add_argument("--baseline", metavar="LABEL", help="the group that others are compared with")
    parser.add_argument(
        "--index", action="store_true", help="the list of runs, also of a folder such as outputs/sft"
    )
    parser.add_argument(
        "--serve", action="store_true", help="serve the list to this machine and follow the runs"
    )
    parser.add_argument("--port", type=int, default=7861, help="of --serve; 0 picks a free one")
    options = parser.parse_args(argv)
    return run_script(lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    try:
        made = _folder_of_runs(options, how="--serve") if options.serve else _page(options)
    except OSError as error:
        raise UserError(
            f"the page cannot be made, {error.strerror or error}",
            where=str(error.filename or options.to or options.runs[0]),
            fix="check the path, its permissions and the room on the disk; --to names another folder for a comparison",
        ) from error
    if options.serve:
        from lmlab.tracking.serve import serve

        return serve(made, port=options.port)
    print(made)
    return 0


def _page(options: argparse.Namespace) -> Path:
    """Write what is asked for; where it is."""
    if options.index:
        return write_index(_folder_of_runs(options, how="--index"))
    runs: list[Path] = options.runs
    compared = options.compare or options.to or options.baseline
    if len(runs) == 1 and not compared and (is_run(runs[0]) or not _is_sweep(runs[0])):
        below = not is_run(runs[0]) and runs[0].is_dir() and Reader(runs[0]).read().all
        return write_index(runs[0]) if below else write_report(runs[0])
    return compare(runs, to=options.to, baseline=options.baseline)


def _folder_of_runs(options: argparse.Namespace, *, how: str) -> Path:
    if options.compare or options.to or options.baseline or len(options.runs) != 1:
        raise UserError(
            "a list is of one folder, and compares nothing", where=how, fix=f"report.py outputs {how}"
        )
    folder: Path = options.runs[0]
    if is_run(folder) or not folder.is_dir():
        what = "one run, not a folder of runs" if is_run(folder) else "no such directory"
        raise UserError(what, where=str(folder), fix="give a folder that holds runs, e.g. outputs")
    return folder


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
    entries = [entry for run in runs for entry in entries_of(run)]
    to.mkdir(parents=True, exist_ok=True)
    page = write_comparison(to, entries, title=title, baseline=baseline)
    if not any(map(is_run, to.iterdir())):  # else it is a sweep's folder, with the launcher's own table
        write_results(to, rows_of(entries))
    return page


if __name__ == "__main__":
    sys.exit(main())

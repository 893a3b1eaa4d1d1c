"""Write the HTML report of one or more runs: ``python scripts/report.py RUN [RUN...]``.

Prints the path of each report. One that cannot be written does not keep the others from it; the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lmlab.records import UserError
from lmlab.tracking.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report", description="Write the report.html of finished or failed runs."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run directory, e.g. outputs/sft/NAME"
    )
    exit_code = 0
    for run_dir in parser.parse_args(argv).runs:
        try:
            print(write_report(run_dir))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            exit_code = error.exit_code
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

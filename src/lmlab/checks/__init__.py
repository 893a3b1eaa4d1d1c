"""What a config claims, tried out on it: invariances of its model and its runs, and how two runs are compared.

`scripts/check.py` runs them; docs/checks.md says what each compares and what a red one means. A plugin adds one:

    from lmlab.checks import Bench, Part, check

    @check("tied", "head = embedding")
    def tied(bench: Bench) -> Iterator[Part]:
        yield Part("weights", ...)
"""

from lmlab.checks import model, runs  # noqa: F401 - they make their checks known
from lmlab.checks.bench import Bench
from lmlab.checks.compare import (
    COMPARED,
    Agreement,
    common_checkpoint,
    compare_runs,
    logged_rows,
    metric_agreement,
    run_worker,
)
from lmlab.checks.runs import held_for, write_resume_certificate
from lmlab.checks.table import CHECKS, HEADER, Outcome, Part, SkippedError, check, chosen, run_check

__all__ = [
    "CHECKS",
    "COMPARED",
    "HEADER",
    "Agreement",
    "Bench",
    "Outcome",
    "Part",
    "SkippedError",
    "check",
    "chosen",
    "common_checkpoint",
    "compare_runs",
    "held_for",
    "logged_rows",
    "metric_agreement",
    "run_check",
    "run_worker",
    "write_resume_certificate",
]

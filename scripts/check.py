"""Certificates on your own config: `python scripts/check.py resume RUN_DIR`, or with train.py's overrides instead of a run.

`resume` trains a few steps twice in fresh processes, once whole and once from a checkpoint in between, and compares bit
for bit: metrics, samples, weights, optimizer, schedule, random states. Exit code 0: equal; 1: not, with what differs.
Of a run directory the certificate is kept beside the run, as resume_certificate.json.

    python scripts/check.py resume outputs/sft/my-run
    python scripts/check.py resume adapter=qlora quant=nf4 --steps 8 --at 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmlab.config.compose import load_env, load_frozen, report_error, run_app, to_run_config
from lmlab.journal import RunDir
from lmlab.records import RunFailedError, UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["resume"])
    parser.add_argument(
        "told", nargs="*", metavar="RUN_DIR | key=value", help="a run, or overrides as of train.py"
    )
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of the whole run")
    parser.add_argument(
        "--at", type=int, default=3, help="the step whose checkpoint the second run begins at"
    )
    options = parser.parse_intermixed_args()
    if len(options.told) == 1 and "=" not in options.told[0]:
        load_env()
        try:
            run = RunDir(options.told[0])
            return certify(load_frozen(run.config), options, run)
        except UserError as error:
            return report_error(error)

    def composed(config: Any, overrides: list[str]) -> int:
        return certify(to_run_config(config), options, None)

    sys.argv = [sys.argv[0], *options.told]
    return run_app(composed)


def certify(config: Any, options: argparse.Namespace, run: RunDir | None) -> int:
    from lmlab.checks import certify_resume, write_certificate

    if not 0 < options.at < options.steps:
        raise UserError(
            f"--at {options.at} of --steps {options.steps}",
            where="command line",
            fix="begin after step 0 and before the last",
        )
    with tempfile.TemporaryDirectory(prefix="lmlab-check-") as folder:
        try:
            made = certify_resume(config, Path(folder), steps=options.steps, at=options.at)
        except RunFailedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    kept = f", kept in {write_certificate(run, made)}" if run is not None else ""
    if made["equal"]:
        print(
            f"resumed = uninterrupted: {made['steps']} steps, begun again at {made['at']}, equal bit for bit{kept}"
        )
        return 0
    print(f"resumed differs from uninterrupted ({len(made['differences'])} differences{kept}):")
    for line in made["differences"][:10]:
        print(f"  {line}")
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Invariance self-test of your own config: what must be the same number, however it is come by.

    python scripts/check.py [CHECK ...] [RUN_DIR | key=value ...]

Without a name all checks run that apply to the config: train.py's overrides, or those of a run. About a minute for the
default config on 2 cores.

    accumulation  k micro-batches give the gradient of one batch
    packing       documents in one row give loss and gradient of each alone; none sees another
    lora_init     a fresh adapter leaves the base's logits as they are
    cache         greedy decoding with the key-value cache = full forward passes; prompts together = alone
    save_load     weights saved and loaded again: the same tensors and logits
    sampling      a run with samples at every step trains as one without any
    resume        a run that begins at a checkpoint is the run that was not interrupted
    ddp           two ranks (gloo, on the CPU) train as one process

equal: bit for bit. within: apart by rounding, less than what is allowed. skipped: it says nothing about this config, and
why. differs, failed: red; docs/checks.md says where to look. Exit code 0: nothing is red; 1: something is; 2: your error.
Of a run the outcome is kept beside it in checks.json (and of resume in resume_certificate.json).

    python scripts/check.py
    python scripts/check.py cache save_load adapter=qlora quant=nf4
    python scripts/check.py resume outputs/sft/my-run --steps 8 --at 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmlab.config.compose import load_env, load_frozen, report_error, run_app, to_run_config
from lmlab.journal import RunDir, write_json
from lmlab.records import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        usage="check.py [CHECK ...] [RUN_DIR | key=value ...] [--steps N] [--at N]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "told",
        nargs="*",
        metavar="CHECK | RUN_DIR | key=value",
        help="names first; a run, or overrides as of train.py",
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps of the runs that are trained (4)"
    )
    parser.add_argument(
        "--at", type=int, default=2, help="the step whose checkpoint the resumed run begins at (2)"
    )
    options = parser.parse_intermixed_args()
    names, runs, overrides = _sorted(options.told)
    try:
        if not 0 < options.at < options.steps:
            raise UserError(
                f"--at {options.at} of --steps {options.steps}",
                where="command line",
                fix="begin after step 0 and before the last",
            )
        if len(runs) > 1 or (runs and overrides):
            raise UserError(
                f"{' '.join([*runs, *overrides])}",
                where="command line",
                fix="give one run, whose config is taken as it is, or overrides",
            )
        if runs:
            load_env()
            run = RunDir(runs[0])
            return run_checks(load_frozen(run.config), names, options, run)
    except UserError as error:
        return report_error(error)
    sys.argv = [sys.argv[0], *overrides]
    return run_app(
        lambda composed, told: run_checks(to_run_config(composed), names, options, None), sweeps=False
    )


def _sorted(told: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(names of checks, run directories, overrides): a plugin's checks are known once the config is."""
    from lmlab.checks import CHECKS

    overrides = [word for word in told if "=" in word or word.startswith(("~", "+"))]
    others = [word for word in told if word not in overrides]
    # A directory may have a check's name; as ./NAME it is a run.
    runs = [word for word in others if word not in CHECKS and (Path(word).is_dir() or "/" in word)]
    return [word for word in others if word not in runs], runs, overrides


def run_checks(config: Any, names: list[str], options: argparse.Namespace, run: RunDir | None) -> int:
    """Run them one after the other, a row of the table for each; the exit code."""
    from lmlab.checks import HEADER, Bench, chosen, held_for, run_check, write_resume_certificate

    checks = chosen(names)
    trainer = config.trainer
    print(
        f"model {config.model.label}, data {config.data.kind}, adapter {config.adapter.kind}, quant {config.quant.kind}, "
        f"batch {trainer.batch_size} x {trainer.accumulate_grad_batches}"
    )
    print(HEADER, flush=True)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="lmlab-check-") as folder:
        bench = Bench(
            config, Path(folder), steps=options.steps, at=options.at, say=lambda text: print(f"    {text}")
        )
        for check in checks:
            if check.trains:
                bench.release()
            outcomes.append(run_check(check, bench))
            print("\n".join(outcomes[-1].lines()), flush=True)
            if run is not None and check.name == "resume" and not outcomes[-1].failed:
                write_resume_certificate(run, bench)
    red = [outcome.check.name for outcome in outcomes if outcome.is_red]
    if run is not None:
        file = run.path / "checks.json"
        rows = [outcome.as_json() for outcome in outcomes]
        write_json(
            file, {"green": not red, "steps": options.steps, "at": options.at, **held_for(), "checks": rows}
        )
        print(f"kept in {file}")
    skipped = sum(outcome.status == "skipped" for outcome in outcomes)
    if red:
        print(f"red: {', '.join(red)} (docs/checks.md says where to look)")
        return 1
    count = len(outcomes) - skipped
    print(f"green: {count} check{'' if count == 1 else 's'}" + (f", {skipped} skipped" if skipped else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())

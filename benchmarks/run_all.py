"""The CPU suites one after another: `make bench`, or `make bench REPEATS=1` for a trial.

Each suite is a process of its own, writes results/NAME.json and NAME.md, and may fail without stopping the next; the
exit code is 1 if any did. Then results/benchmarks.md holds all tables with hardware, versions and load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from side_by_side import OFFLINE, RESULTS, ROOT, Machine, python, require_data

SUITES = (
    "startup",
    "stored_bits",
    "finetune",
    "growth",
    "shakespeare",
    "generation",
    "memory_plan",
    "multirun",
)
WITHOUT_REPEATS = ("stored_bits", "memory_plan")  # they count bytes, or measure each configuration once
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning", "datasets", "tokenizers")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--suites", default=",".join(SUITES))
    options = parser.parse_args()
    require_data()
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.suites.split(","):
        told = [] if name in WITHOUT_REPEATS else ["--repeats", str(options.repeats)]
        print(f"== {name} (load {os.getloadavg()[0]:.1f})", flush=True)
        began = time.monotonic()
        done = run(name, told)
        minutes = (time.monotonic() - began) / 60
        print(f"== {name}: {minutes:.1f} min, exit code {done.returncode}", flush=True)
        if done.returncode:
            failed.append(name)
    write_page(failed)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, told: list[str]) -> subprocess.CompletedProcess[str]:
    """One suite; where it does not write its own page, what it prints becomes that."""
    page = RESULTS / f"{name}.md"
    before = page.stat().st_mtime if page.is_file() else 0.0
    command = [python(), str(Path(__file__).resolve().parent / f"{name}.py"), *told]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **OFFLINE}, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if not page.is_file() or page.stat().st_mtime == before:
        page.write_text(done.stdout, encoding="utf-8")
    return done


def write_page(failed: list[str]) -> None:
    """All suites' tables on one page."""
    machine = Machine.of_threads(2).describe()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    features = ", ".join(machine["features"])
    lines = [
        "# Benchmarks on a CPU\n",
        f"{machine['date']}: {len(machine['cores_used'])} logical processors of {machine['cpu']} ({features}), "
        f"{machine['memory_gb']:.0f} GB, Python {machine['python']}, {versions}.",
    ]
    for name in SUITES:
        page = RESULTS / f"{name}.md"
        if page.is_file():
            note = " (its last run failed; an older table)" if name in failed else ""
            lines.append(f"\n## {name}{note}\n\n{page.read_text(encoding='utf-8').strip()}\n")
    (RESULTS / "benchmarks.md").write_text("\n".join(lines), encoding="utf-8")
    (RESULTS / "machine.json").write_text(json.dumps(machine, indent=1) + "\n", encoding="utf-8")
    print(f"all tables: {os.path.relpath(RESULTS / 'benchmarks.md')}")


if __name__ == "__main__":
    sys.exit(main())

"""Runs and reads the commands of the pages as a shell would: quotes, pipes and ``$'...'`` are bash's own business."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .pages import ROOT

BASH = shutil.which("bash") or "bash"
WORDS = "\n".join(
    f'{name}() {{ printf "%s\\0" {name} "$@"; printf "\\n"; }}'
    for name in (
        "python",
        "make",
        "pip",
        "pytest",
        "torchrun",
        "srun",
        "sbatch",
        "wandb",
        "optuna-dashboard",
        "jupyter",
        "ray",
    )
)
PYTHON = 'python() { "$DOCS_PYTHON" "$@" "${DOCS_APPENDED[@]}"; }'


def words_of(command: str) -> list[str]:
    """The program and its arguments after bash has read the line; of a pipe those of its last program. Nothing is run."""
    done = subprocess.run(
        [BASH, "-c", f"set -f\n{WORDS}\n{command}"],
        env={"PATH": "", "PWD": "/"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (command, done.stderr)
    last = done.stdout.rstrip("\n").removesuffix("\0")
    return last.split("\0") if last else []


def workspace(folder: Path) -> Path:
    """A folder that looks like a clone to a command, and takes what commands write."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "train.py",
        "scripts",
        "benchmarks",
        "conf",
        "assets",
        "README.md",
        "docs",
        "Makefile",
        "notebooks",
    ):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


def run(
    command: str, cwd: Path, *, append: Sequence[str] = (), timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """The line in bash, ``python`` being this one, with words appended to its arguments; standard input is empty."""
    appended = " ".join(f"'{word}'" for word in append)
    paths = os.pathsep.join([str(cwd), str(ROOT / "src")])
    return subprocess.run(
        [BASH, "-c", f"set -o pipefail\nDOCS_APPENDED=({appended})\n{PYTHON}\n{command}"],
        cwd=cwd,
        env={**os.environ, "DOCS_PYTHON": sys.executable, "PYTHONPATH": paths, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )

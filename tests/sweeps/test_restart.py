"""`python train.py -m ...` again in a folder that holds something: rows that stay, tables that are none. No job starts here.

Each point is a combination that cannot train, which is a row as soon as its config is composed.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lmlab.config.compose import CONF, run_app
from lmlab.sweeps.earlier import overrides_of, read_results

ROOT = Path(__file__).resolve().parents[2]
REFUSED = ("adapter=none", "quant=nf4,int8,fp4", "data=skills", "run_name=again")
Multirun = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def multirun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Multirun:
    """``multirun(*overrides)`` -> (exit code, lines on stderr), in this process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored afterwards

    def run(*overrides: str) -> tuple[int, list[str]]:
        GlobalHydra.instance().clear()
        told = ["train.py", "-m", *overrides, f"output_root={tmp_path}"]
        monkeypatch.setattr(sys, "argv", told)
        capsys.readouterr()
        code = run_app(lambda config, overrides: 1)
        return code, capsys.readouterr().err.splitlines()

    return run


def statuses(root: Path) -> list[str]:
    return [row["status"].partition(":")[0] for row in read_results(root / "results.csv").values()]


# --- rows that stay ---------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from lmlab.config.compose import run_app
from lmlab.sweeps import launcher
validated = launcher.to_run_config
def killed(composed):
    if composed.quant.kind == "int8":
        os.kill(os.getpid(), signal.SIGKILL)
    return validated(composed)
launcher.to_run_config = killed
sys.argv = ["train.py", "-m", *sys.argv[1:]]
sys.exit(run_app(lambda config, overrides: 1))
"""
"""The front door, killed when the second job's config is looked at: the first one's row has just been written."""


def test_rows_that_a_killed_second_start_did_not_come_to(multirun: Multirun, tmp_path: Path) -> None:
    assert multirun(*REFUSED) == (0, [])
    root = tmp_path / "sweeps" / "again"
    before = read_results(root / "results.csv")
    assert statuses(root) == ["refused"] * 3
    second = subprocess.run(
        [sys.executable, "-c", KILLED, *REFUSED, f"output_root={tmp_path}"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert "[1/3]" in second.stdout
    assert read_results(root / "results.csv") == before


# --- tables that are none ---------------------------------------------------------------------------------------------

GOOD = "job,overrides,status,exit_code,seconds,directory\n"
BROKEN = {
    "binary": b"job,overrides,status\n\xff\xfe\x00\n",
    "a column is missing": b"job,overrides,status,seconds\n0,seed=1,finished,1.0\n",
    "a line is cut": f"{GOOD}0,seed=1,finished\n".encode(),
    "no number": f"{GOOD}one,seed=1,finished,0,1.0,\n".encode(),
    "no seconds": f"{GOOD}0,seed=1,finished,0,soon,\n".encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_one_line_and_stays(multirun: Multirun, tmp_path: Path, content: bytes) -> None:
    table = tmp_path / "sweeps" / "again" / "results.csv"
    table.parent.mkdir(parents=True)
    table.write_bytes(content)
    code, (line,) = multirun(*REFUSED)
    assert code == 2
    assert line.startswith("error: this is no table of a sweep's jobs, ")
    assert f"({table}): mend it or move it away" in line
    assert table.read_bytes() == content
    assert [file.name for file in table.parent.iterdir()] == [table.name]


def test_a_table_of_somebody_else_s(multirun: Multirun, tmp_path: Path) -> None:
    """Alone it is no sweep's folder; among the jobs of a sweep it would be overwritten."""
    root = tmp_path / "sweeps" / "again"
    (root / "0-seed=1").mkdir(parents=True)
    (root / "results.csv").write_text("name,mark\nAda,1\n", encoding="utf-8")
    code, (line,) = multirun(*REFUSED)
    assert (code, line.partition(" (")[0]) == (2, "error: not a sweep's directory")
    (root / "0-seed=1" / "run.json").write_text("{}", encoding="utf-8")
    code, (line,) = multirun(*REFUSED)
    assert (code, line.partition(" (")[0]) == (
        2,
        "error: this is no table of a sweep's jobs, a line without job",
    )
    assert (root / "results.csv").read_text(encoding="utf-8") == "name,mark\nAda,1\n"
    assert not (root / ".lock").exists()


# --- what is typed ----------------------------------------------------------------------------------------------------


def test_blanks_commas_and_quotes_in_what_is_swept(multirun: Multirun, tmp_path: Path) -> None:
    paths = ["a b.jsonl", "c,d.jsonl", "it's.jsonl", "e=f [g].jsonl"]
    quoted = ",".join("'" + path.replace("'", "\\'") + "'" for path in paths)
    told = ["adapter=none", "quant=nf4", "data=jsonl", f"data.path={quoted}", "run_name=blanks"]
    assert multirun(*told) == (0, [])
    root = tmp_path / "sweeps" / "blanks"
    assert statuses(root) == ["refused"] * 4
    with (root / "results.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = [compose("train", overrides_of(row)).data.path for row in rows]
    assert found == paths
    assert multirun(*told) == (0, []), "the same command is the same sweep"


@pytest.mark.parametrize(
    "typed", ["seed=range(3,3)", "seed=range(0,9,0)", "seed=choice()", "adapter=glob(zz*)"]
)
def test_a_sweep_over_nothing_is_one_line(multirun: Multirun, tmp_path: Path, typed: str) -> None:
    code, (line,) = multirun(typed, "run_name=again")
    assert code == 2
    assert line.startswith("error: ")
    assert typed in line
    assert not list(tmp_path.iterdir())

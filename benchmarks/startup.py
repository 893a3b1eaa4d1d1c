"""How long a user waits: `python train.py --help`, and from a process's start to the first optimizer step.

The first step is that of the default run with its data prepared; the imports it needs are measured apart, in a process that
imports exactly the modules that the run had imported by then. Samples are off; what validation at step 0 takes is
measured by a callback (startup_probe.py) and left out. `--slow` lists what takes longest: imports by
`-X importtime`, the rest by cProfile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pstats
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from side_by_side import (
    OFFLINE,
    ROOT,
    Contender,
    Machine,
    compare,
    markdown,
    python,
    save,
    spread,
    write_figures,
)

HERE = Path(__file__).resolve()
RUN = (
    "samples.prompts=0",
    "samples.grid=[]",
    "logger=none",
    "trainer.max_steps=1",
    "overwrite=true",
    "run_name=startup",
    "plugins=[startup_probe]",
    "+callbacks.probe.kind=startup_probe",
)
HELP_LIMIT, FIRST_STEP_LIMIT = 1.0, 4.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmark-startup")
    parser.add_argument("--slow", action="store_true", help="only list what is slow")
    parser.add_argument(
        "--role", choices=("help", "first_step", "imports", "do_imports"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    work = options.work.absolute()
    roles = {"help": show_help, "first_step": first_step, "imports": imports, "do_imports": do_imports}
    if options.role:
        return roles[options.role](work)
    work.mkdir(parents=True, exist_ok=True)
    machine = Machine.of_threads(options.threads)
    told = [python(), str(HERE), "--work", str(work), "--role"]
    contenders = [Contender(role, [*told, role]) for role in ("help", "first_step", "imports")]
    compare(contenders[1:2], machine, 1)  # prepares the data and lists the modules
    if options.slow:
        print(slow(work))
        return 0
    runs = compare(contenders, machine, options.repeats)
    report(runs, machine, options.repeats)
    return 0


def report(runs: dict[str, list[dict[str, Any]]], machine: Machine, repeats: int) -> None:
    """The table; what is left without imports is taken within each round."""
    for step, imported in zip(runs["first_step"], runs["imports"], strict=True):
        step["rest"] = step["seconds"] - step["validation"] - imported["seconds"]
    figures = (
        ("`python train.py --help`", "help", "seconds", f"<= {HELP_LIMIT:g}"),
        ("default run: process start to the end of the first step", "first_step", "seconds", ""),
        ("of it: validation at step 0", "first_step", "validation", ""),
        ("of it: imports (a process that only imports)", "imports", "seconds", ""),
        ("the rest", "first_step", "rest", f"<= {FIRST_STEP_LIMIT:g}"),
    )
    rows = []
    for label, name, key, target in figures:
        made = spread(runs[name], key)
        rows.append([label, made.text(2) if made else "", target])
    text = markdown(("", "seconds, median (range)", "target"), rows)
    save("startup", {"machine": machine.describe(), "repeats": repeats, "runs": runs}, text)


# --- roles, each in a process of its own --------------------------------------------------------------------------


def environment(work: Path) -> dict[str, str]:
    return {
        **os.environ,
        **OFFLINE,
        "LMLAB_CACHE": str(work / "cache"),
        "STARTUP_PROBE": str(work / "probe.json"),
        "PYTHONPATH": str(HERE.parent),
    }


def _run(command: Sequence[str], work: Path) -> float:
    """Starts the command as a shell would, waits for it; the time it was started at."""
    began = time.time()
    done = subprocess.run(
        list(command), cwd=ROOT, env=environment(work), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    return began


def show_help(work: Path) -> int:
    began = _run([python(), "train.py", "--help"], work)
    write_figures({"seconds": time.time() - began})
    return 0


def first_step(work: Path) -> int:
    probe = work / "probe.json"
    probe.unlink(missing_ok=True)
    began = _run([python(), "train.py", *RUN, f"output_root={work / 'runs'}"], work)
    seen = json.loads(probe.read_text(encoding="utf-8"))
    (work / "modules.json").write_text(json.dumps(seen["modules"]), encoding="utf-8")
    figures = {"seconds": seen["stepped"] - began, "before_fit": seen["fit_began"] - began}
    write_figures({**figures, "validation": seen["validation"], "modules": len(seen["modules"])})
    return 0


def imports(work: Path) -> int:
    done = work / "imported.json"
    began = _run([python(), str(HERE), "--work", str(work), "--role", "do_imports"], work)
    seen = json.loads(done.read_text(encoding="utf-8"))
    write_figures({"seconds": seen["ended"] - began, "missing": seen["missing"]})
    return 0


def do_imports(work: Path) -> int:
    """Import, in their order, the modules of the run; parts of packages that cannot be imported by name are skipped."""
    warnings.simplefilter("ignore")
    missing = 0
    for name in json.loads((work / "modules.json").read_text(encoding="utf-8")):
        if name in sys.modules or name == "__mp_main__":
            continue
        try:
            importlib.import_module(name)
        except Exception:  # made at run time by its package, as torch.ops is
            missing += 1
    (work / "imported.json").write_text(
        json.dumps({"ended": time.time(), "missing": missing}), encoding="utf-8"
    )
    return 0


# --- what is slow -------------------------------------------------------------------------------------------------


def slow(work: Path) -> str:
    """Slowest imports of --help and of a run, slowest own functions of a run."""
    told = [*RUN, f"output_root={work / 'runs'}"]
    lines = ["imports of --help, ms with what they import:", *slowest_imports(["train.py", "--help"], work)]
    lines += ["", "imports of a run:", *slowest_imports(["train.py", *told], work)]
    profile = work / "run.prof"
    _run([python(), "-m", "cProfile", "-o", str(profile), "train.py", *told], work)
    stats: Any = pstats.Stats(str(profile))
    own = [
        (figures[3], figures[0], where)
        for where, figures in stats.stats.items()
        if "lmlab" in where[0] and where[2] != "<module>"
    ]
    lines += ["", "own functions of a run to its end, seconds with what they call (under cProfile):"]
    lines += [
        f"{seconds:8.2f}  {calls:6d}x  {Path(file).name}:{line} {name}"
        for seconds, calls, (file, line, name) in sorted(own, reverse=True)[:40]
    ]
    return "\n".join(lines)


def slowest_imports(command: Sequence[str], work: Path, *, shown: int = 25) -> list[str]:
    done = subprocess.run(
        [python(), "-X", "importtime", *command],
        cwd=ROOT,
        env=environment(work),
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S+)", done.stderr)
    made = sorted(((int(total) / 1000, int(own) / 1000, name) for own, total, _, name in found), reverse=True)
    return [f"{total:8.0f}  (itself {own:6.0f})  {name}" for total, own, name in made[:shown]]


if __name__ == "__main__":
    sys.exit(main())

"""Planned against measured memory: `python benchmarks/memory_plan.py [--json FILE]`; twelve runs of train.py on a CPU.

Each configuration is a run of its own in a fresh process, as a user starts it, of two optimizer steps with a validation
and samples; its plan and its peaks (resident set by phase) are read from its summary.json. Malloc is left as lmlab sets it.
The error of a run is that of its highest phase: planned over measured growth less 1, as the run's own summary.json gives
it; growth is what lies above Python and its libraries. Target: within 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    "tokenizer=file",
    "tokenizer.path=assets/tiny-base",
    "trainer.accelerator=cpu",
    "trainer.precision=fp32",
    "trainer.max_steps=2",
    "trainer.val_batch_size=4",
    "data.val_fraction=0.003",
    "samples.grid=[greedy]",
    "samples.prompts=2",
    "samplers.greedy.max_new_tokens=16",
    "logger.mode=disabled",
]
RUNS = [
    ("none", "none", "llama_30m", 8, 256, False),
    ("none", "none", "llama_30m", 24, 512, False),
    ("none", "none", "llama_30m", 24, 512, True),
    ("lora", "none", "llama_30m", 32, 256, False),
    ("lora", "none", "llama_30m", 24, 512, False),
    ("lora", "none", "llama_30m", 24, 512, True),
    ("qlora", "nf4", "llama_30m", 32, 256, False),
    ("qlora", "nf4", "llama_30m", 24, 512, True),
    ("lora", "int8", "llama_30m", 32, 256, False),
    ("lora", "none", "gpt2_124m", 8, 512, False),
    ("qlora", "nf4", "gpt2_124m", 8, 512, False),
    ("none", "none", "gpt2_124m", 4, 512, True),
]


def measure(run: tuple[str, str, str, int, int, bool], folder: Path) -> dict[str, Any]:
    """One run's planned and measured peaks."""
    adapter, quant, model, batch_size, length, checkpointing = run
    name = f"{adapter}-{quant}-{model}-{batch_size}x{length}{'-checkpointing' if checkpointing else ''}"
    overrides = [
        f"adapter={adapter}",
        f"quant={quant}",
        f"model={model}",
        f"trainer.batch_size={batch_size}",
        f"data.max_length={length}",
        f"model.gradient_checkpointing={str(checkpointing).lower()}",
        f"run_name={name}",
        f"output_root={folder}",
        *COMMON,
    ]
    done = subprocess.run(
        [sys.executable, "train.py", *overrides], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    peaks: dict[str, dict[str, float]] = {}
    for line in (folder / "sft" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        for key, value in json.loads(line).items():
            parts = key.split("/")
            if parts[0] == "memory" and len(parts) == 3:
                phase = peaks.setdefault(parts[1], {})
                phase[parts[2]] = max(value, phase.get(parts[2], 0.0))
    summary = json.loads((folder / "sft" / name / "summary.json").read_text(encoding="utf-8"))
    found = {phase: summary.get(f"memory/{phase}/plan_error") for phase in peaks}
    errors = {phase: error for phase, error in found.items() if error is not None}
    if not errors:
        raise SystemExit(f"{name}: no memory plan\n{done.stdout[-2000:]}")
    worst = max(errors, key=lambda phase: peaks[phase]["peak_gb"])
    return {
        "run": name,
        "planned_gb": peaks[worst]["planned_gb"],
        "peak_gb": peaks[worst]["peak_gb"],
        "error": errors[worst],
        "errors": errors,
        "phases": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the configurations, from 0")
    options = parser.parse_args()
    chosen = RUNS if options.only is None else [RUNS[i] for i in options.only]
    results = []
    print(f"| {'run':<42} | planned GB | measured GB | error | by phase |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for run in chosen:
            result = measure(run, Path(folder))
            results.append(result)
            errors = " ".join(f"{phase} {error:+.1%}" for phase, error in result["errors"].items())
            print(
                f"| {result['run']:<42} | {result['planned_gb']:.3f} | {result['peak_gb']:.3f} | {result['error']:+.1%} | {errors} |",
                flush=True,
            )
    inside = sum(abs(result["error"]) <= 0.1 for result in results)
    print(f"\n{inside} of {len(results)} within 10 %")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What a run will take in memory: `python scripts/plan.py adapter=qlora quant=nf4 model=pretrained model.name_or_path=DIR`.

Takes the same overrides as train.py, and `--json`. From the config alone: no data, no weights, and no GPU for
trainer.accelerator=gpu. Every row of a batch counts as full (data.max_length), every token as trained.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from lmlab.config.compose import run_app, to_run_config

AS_JSON = "--json"


def show(composed: Any, overrides: list[str], *, as_json: bool) -> int:
    from lmlab.planning import plan_of_config

    config = to_run_config(composed)
    planned = plan_of_config(config)
    made, there, tokens = planned.made(), planned.capacity_gb, sum(planned.workload.train)
    if as_json:
        figures = {
            "device": planned.device_type,
            "precision": planned.precision,
            "tokens_per_micro_batch": tokens,
            "bytes": made.phases,
            "peak_gb": made.growth_gb(),
            "total_gb": made.total_gb,
            "available_gb": there,
        }
        print(json.dumps(figures, indent=1))
        return 0
    _print_table(planned, made, tokens=tokens, there=there)
    return 0


def _print_table(planned: Any, made: Any, *, tokens: int, there: float | None) -> None:
    from rich.box import HEAVY_HEAD

    from lmlab.models.plan import KINDS
    from lmlab.tracking.figure_table import print_figures
    from lmlab.tracking.transcript import print_words, screen

    config, device_type = planned.config, planned.device_type
    kinds = [kind for kind in KINDS if any(parts[kind] for parts in made.phases.values())]
    title = f"{config.model.label}, {config.adapter.kind} over {config.quant.kind}, {tokens:,} tokens a micro-batch, {planned.precision} on {device_type}: GB by phase"
    rows = [
        [phase, *(f"{parts[kind] / 1e9:.3f}" for kind in kinds), f"{made.peak_gb(phase):.3f}"]
        for phase, parts in made.phases.items()
    ]
    console = screen()
    worst = list(made.phases).index(made.worst)
    print_figures(console, title, ["phase", *kinds, "total"], rows, box=HEAVY_HEAD, bold=worst)
    besides = "Python and libraries, some 0.5 GB" if device_type == "cpu" else "the CUDA context, some 0.5 GB"
    kind = "memory" if device_type == "cpu" else "GPU memory"
    here = (
        "no GPU on this machine to compare with"
        if there is None
        else f"{there:.2f} GB {kind} on this machine"
    )
    print_words(console, f"peak {made.total_gb:.3f} GB in {made.worst}, besides {besides}; {here}")


if __name__ == "__main__":
    wants_json = AS_JSON in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != AS_JSON]
    sys.exit(run_app(lambda composed, overrides: show(composed, overrides, as_json=wants_json)))

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
    from rich.console import Console
    from rich.table import Table

    from lmlab.models.plan import KINDS

    config, device_type = planned.config, planned.device_type
    kinds = [kind for kind in KINDS if any(parts[kind] for parts in made.phases.values())]
    title = f"{config.model.label}, {config.adapter.kind} over {config.quant.kind}, {tokens:,} tokens a micro-batch, {planned.precision} on {device_type}: GB by phase"
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    for kind in kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    table.add_column("total", justify="right", style="bold")
    for phase, parts in made.phases.items():
        cells = [f"{parts[kind] / 1e9:.3f}" for kind in kinds]
        table.add_row(
            phase, *cells, f"{made.peak_gb(phase):.3f}", style="bold" if phase == made.worst else None
        )
    console = Console(width=max(Console().width, 120))  # a wrapped number is worse than a wide table
    console.print(table, highlight=False)
    besides = "Python and libraries, some 0.5 GB" if device_type == "cpu" else "the CUDA context, some 0.5 GB"
    kind = "memory" if device_type == "cpu" else "GPU memory"
    here = (
        "no GPU on this machine to compare with"
        if there is None
        else f"{there:.2f} GB {kind} on this machine"
    )
    console.print(
        f"peak {made.total_gb:.3f} GB in {made.worst}, besides {besides}; {here}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    wants_json = AS_JSON in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != AS_JSON]
    sys.exit(run_app(lambda composed, overrides: show(composed, overrides, as_json=wants_json)))

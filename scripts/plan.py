"""What a run will take in memory: `python scripts/plan.py adapter=qlora quant=nf4 model=pretrained model.name_or_path=DIR`.

Takes the same overrides as train.py, and `--json`. From the config alone: no data, no weights, and no GPU for
trainer.accelerator=gpu. Every row of a batch counts as full (data.max_length), every token as trained. For several ranks it says
what one of them takes, and what it sends in a step under DDP and under FSDP.

`--table [PRESET ...]` prints parameters and memory of the presets of published models by adapter and storage;
`--table docs/models.md` writes that into the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lmlab.config.compose import run_app, run_script, to_run_config

AS_JSON, TABLE = "--json", "--table"


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
            "ranks": planned.ranks,
            "sent_bytes_per_step": {name: vars(sent) for name, sent in planned.traffic().items()},
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
    lines = [f"peak {made.total_gb:.3f} GB in {made.worst}, besides {besides}; {here}", *_ranks(planned)]
    for line in lines:
        print_words(console, line)


def _ranks(planned: Any) -> list[str]:
    """What several ranks have to do with one another."""
    if planned.ranks == 1:
        return []
    trainer = planned.config.trainer
    sharded = trainer.strategy == "fsdp"
    what = "an estimate for one" if sharded else "one"
    rows = trainer.rows_per_step
    lines = [
        f"the table is {what} of {planned.ranks:,} ranks ({trainer.num_nodes} x {trainer.devices}, {'fsdp' if sharded else 'ddp'}); a step is {rows:,} rows"
    ]
    for name, sent in planned.traffic().items():
        parts = [f"{word.replace('_', '-')} {size / 1e9:,.1f}" for word, size in vars(sent).items() if size]
        lines.append(
            f"{name}: a rank sends {sent.total / 1e9:,.1f} GB a step, and receives as many ({', '.join(parts)})"
        )
    if sharded:
        lines.append(f"host memory of a node while its ranks load: {planned.host_gb():,.0f} GB")
    return [
        *lines,
        "figures of several ranks are unverified: from formulas (docs/scale.md), never measured on such a machine",
    ]


def table_parser() -> argparse.ArgumentParser:
    """The arguments with ``--table``, which takes no overrides."""
    parser = argparse.ArgumentParser(
        description="Parameters and memory of the presets, by adapter and storage."
    )
    text = "which presets (none: all), or a page to write the table of all into"
    parser.add_argument(TABLE, nargs="*", metavar="PRESET|PAGE.md", help=text)
    return parser


def print_or_write_table(told: list[str]) -> int:
    """The table of presets: printed, or written into the page that is named."""
    from lmlab.presets import table, write_table

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if len(told) == 1 and told[0].endswith(".md"):
        write_table(Path(told[0]), lambda: table(say=say))
    else:
        print(table(told, say=say))
    return 0


if __name__ == "__main__":
    if TABLE in sys.argv[1:]:
        sys.exit(run_script(lambda: print_or_write_table(table_parser().parse_args().table)))
    wants_json = AS_JSON in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != AS_JSON]
    sys.exit(run_app(lambda composed, overrides: show(composed, overrides, as_json=wants_json), sweeps=False))

"""The presets of published models (conf/model), and the table of what each takes in memory by adapter and storage.

Every published model is there twice: ``model=NAME`` loads its weights from the hub, ``model=scratch/NAME`` has its shape and
random weights. The second needs no network, so it is what plans are made of; the bytes are the same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmlab.config.compose import CONF, compose_config
from lmlab.planning import model_config, plan_of_config
from lmlab.records import UserError
from lmlab.registry import suggest

WORKLOAD = (
    "trainer=gpu trainer.batch_size=1 trainer.val_batch_size=1 data.max_length=2048 data.packing=true "
    "model.gradient_checkpointing=true samples.grid=[]"
)
"""What the table is planned for: a row of 2,048 trained tokens at a time, on a GPU, in bf16."""
WAYS = {
    "full": "adapter=none",
    "LoRA, bf16": "adapter=lora quant=bf16",
    "LoRA, int8": "adapter=lora quant=int8",
    "LoRA, int4": "adapter=lora quant=int4",
    "QLoRA, nf4": "adapter=qlora",
}
"""Columns of the table -> what to type."""
BEGIN, END = "<!-- made by scripts/plan.py --table -->", "<!-- end of what it made -->"


@dataclass(frozen=True)
class Planned:
    """A cell: GB of the base as it is stored, and of the highest peak of all phases; both None where no plan can be made."""

    weights_gb: float | None
    peak_gb: float | None
    reason: str = ""

    def __str__(self) -> str:
        return "-" if self.peak_gb is None else f"{self.weights_gb:.1f} / {self.peak_gb:.1f}"


def preset_names() -> list[str]:
    """Names of the published models, as in ``model=NAME`` and ``model=scratch/NAME``."""
    return sorted(file.stem for file in (CONF / "model" / "scratch").glob("[!_]*.yaml"))


def size_of(name: str) -> int:
    """Parameters of a preset's model, tied ones once; no memory is used for them."""
    from lmlab.models.adapters import count_parameters, model_without_weights

    return count_parameters(model_without_weights(model_config(compose_config([f"model=scratch/{name}"]))))[0]


def planned(name: str, way: str) -> Planned:
    """One cell of the table: ``way`` is a key of `WAYS`."""
    config = compose_config([f"model=scratch/{name}", *WORKLOAD.split(), *WAYS[way].split()])
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints the traceback of what is caught here
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        made = plan_of_config(config).made()
    except (
        RuntimeError
    ) as error:  # the model's own code, where it needs values or a kernel that has no shapes
        return Planned(None, None, str(error).splitlines()[0])
    finally:
        log.setLevel(level)
    return Planned(made.phases["optimizer"]["weights"] / 1e9, made.total_gb)


def table(names: Sequence[str] = (), *, say: Callable[[str], None] = lambda text: None) -> str:
    """The table of these presets, of all if none, in Markdown, by size.

    Args:
        say: told of each preset when it is planned; a plan takes some seconds, and is kept in the cache.

    Raises:
        UserError: no such preset.
    """
    known = preset_names()
    for name in names:
        if name not in known:
            raise UserError(f"no preset '{name}'", where="--table", fix=suggest(name, known))
    rows: list[tuple[int, str]] = []
    for name in names or known:
        parameters = size_of(name)
        cells = [planned(name, way) for way in WAYS]
        rows.append((parameters, f"| `{name}` | {parameters:,} | {' | '.join(map(str, cells))} |"))
        reasons = {cell.reason for cell in cells} - {""}
        say(f"{name}: {parameters:,} parameters" + "".join(f"; not planned: {reason}" for reason in reasons))
    head = ["| preset | parameters | " + " | ".join(WAYS) + " |", "| --- |" + " ---: |" * (1 + len(WAYS))]
    return "\n".join([*head, *(row for _, row in sorted(rows))])


def write_table(page: Path, make: Callable[[], str]) -> None:
    """Put a table between the two marks of a page; it is made only where there is a place for it.

    Raises:
        UserError: there is no such page, or it lacks the marks.
    """
    try:
        old = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"no page to write to: {error.strerror}", where=str(page), fix="give docs/models.md"
        ) from error
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(old):
        raise UserError(
            "the page has no place for the table", where=str(page), fix=f"put {BEGIN} and {END} into it"
        )
    text = make()
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", old), encoding="utf-8")

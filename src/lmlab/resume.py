"""Going on with a run: what may differ from how it was started, and what may not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmlab.journal import RunDir, read_json
from lmlab.records import UserError

if TYPE_CHECKING:
    from lmlab.config.schema import RunConfig

SAFE = [
    "run_name",
    "output_root",
    "resume",
    "overwrite",
    "plugins",
    "logger",
    "samples",
    "samplers",
    "sampler",
    "metrics",
    "callbacks",
    "launcher",
    "checkpoint",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.val_every_n_steps",
    "trainer.val_batch_size",
    "trainer.log_every_n_steps",
    "trainer.num_workers",
    "trainer.on_nonfinite",
    "trainer.accelerator",
    "trainer.compile",
    "model.gradient_checkpointing",
]
"""Keys that do not change what the steps already done meant."""
GEOMETRY = ("batch_size", "accumulate_grad_batches", "devices", "num_nodes", "strategy")
"""How a global batch is cut; free as long as its size stays."""


def check_unchanged(run: RunDir, config: RunConfig, *, data_hash: str, tokenizer_hash: str) -> None:
    """Refuse to go on under a config, data or tokenizer that the steps already done did not have.

    Raises:
        UserError: names every such key with its old and new value.
    """
    if not run.config.is_file():
        return
    from lmlab.config.compose import load_frozen

    old, new = load_frozen(run.config), config
    changed = [
        f"{key} was {before!r}, now {after!r}"
        for key, before, after in _differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
        if not key.startswith(tuple(SAFE)) and key.rsplit(".", 1)[-1] not in GEOMETRY
    ]
    if old.trainer.rows_per_step != new.trainer.rows_per_step:
        changed.append(
            f"the global batch was {old.trainer.rows_per_step} rows, now {new.trainer.rows_per_step}"
        )
    info = read_json(run.info)
    for name, now in (("data", data_hash), ("tokenizer", tokenizer_hash)):
        if info.get(f"{name}_hash") not in (None, now):
            changed.append(f"the {name} has changed")
    if changed:
        raise UserError(
            f"cannot resume under another configuration: {'; '.join(changed)}",
            where=str(run.path),
            fix="put it back, or start a new run_name",
        )


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}, key=str):
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [(path, old, new)]

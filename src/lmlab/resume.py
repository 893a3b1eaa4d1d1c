"""Going on with a run: what may differ from how it was started, and what may not.

With ``resume=PATH`` of another run's checkpoint a new run branches off there: its own directory and W&B run, the other's
weights, optimizer, random states and count of steps. Whatever these do not depend on may be another then; of other data,
or under another global batch, it begins at the row that many steps would have come to.
"""

from __future__ import annotations

from pathlib import Path
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
    "hparams_search",
    "checkpoint",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.val_every_n_steps",
    "trainer.val_batch_size",
    "trainer.log_every_n_steps",
    "trainer.num_workers",
    "trainer.on_nonfinite",
    "trainer.max_nonfinite_steps",
    "trainer.auto_batch",
    "trainer.memory_plan",
    "trainer.layer_stats",
    "trainer.accelerator",
    "trainer.compile",
    "model.gradient_checkpointing",
]
"""Keys that do not change what the steps already done meant."""
OF_THE_STATE = ("model.", "adapter.", "quant.", "optim.name")
"""What a branch has in common with the run it leaves: its weights and its optimizer's state. Rates, decay, betas and the
schedule are the branch's own."""
GEOMETRY = ("batch_size", "accumulate_grad_batches", "devices", "num_nodes", "strategy")
"""How a global batch is cut; free as long as its size stays."""


def check_unchanged(run: RunDir, config: RunConfig, *, data_hash: str, tokenizer_hash: str) -> None:
    """Refuse to go on under a config, data or tokenizer that the steps already done did not have.

    Raises:
        UserError: names every such key with its old and new value.
    """
    source = branched_from(run, config)
    if source is not None and config.resume != "auto":
        _check_branch(source, config, tokenizer_hash=tokenizer_hash)
        return
    if not run.config.is_file():
        return
    from lmlab.config.compose import load_frozen

    old, new = load_frozen(run.config), config
    changed = [
        change
        for key, change in _changes(old, new)
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


def branched_from(run: RunDir, config: RunConfig) -> RunDir | None:
    """The run whose checkpoint ``resume`` names, if it is another one.

    Raises:
        UserError: ``resume`` names no checkpoint.
    """
    if config.resume is None:
        return None
    if config.resume == "auto":  # a branch that has saved nothing of its own yet begins where it began
        begun = read_json(run.info).get("branched_from")
        return RunDir(Path(begun).parents[1]) if begun else None
    checkpoint = Path(str(config.resume)).absolute()
    if not (checkpoint / "manifest.json").is_file():
        raise UserError(
            "not a checkpoint",
            where=f"resume={config.resume}",
            fix="give a folder like outputs/sft/my-run/checkpoints/step-00000200, or auto",
        )
    source = RunDir(checkpoint.parents[1])
    if not source.info.is_file():  # its config may name code to import
        raise UserError(
            "the checkpoint is of no run",
            where=str(source.path),
            fix=f"a run has its {source.info.name} there",
        )
    return None if source.path.resolve() == run.path.resolve() else source


def goes_on(run: RunDir, config: RunConfig) -> bool:
    """Whether ``resume`` goes on in the run's own directory; a branch begins one, which must be new."""
    if config.resume in (None, "auto"):
        return config.resume is not None
    checkpoint = str(Path(str(config.resume)).absolute())
    return branched_from(run, config) is None or read_json(run.info).get("branched_from") == checkpoint


def _check_branch(source: RunDir, config: RunConfig, *, tokenizer_hash: str) -> None:
    from lmlab.config.compose import load_frozen

    changed = [
        change
        for key, change in _changes(load_frozen(source.config), config)
        if (key.startswith(OF_THE_STATE) and key != "model.gradient_checkpointing")
        # A base drawn from the seed and frozen is in no checkpoint.
        or (key == "seed" and config.adapter.freezes_base and config.model.source is None)
    ]
    if read_json(source.info).get("tokenizer_hash") not in (None, tokenizer_hash):
        changed.append("the tokenizer is another")
    if changed:
        raise UserError(
            f"a branch of {source.path.name} under another state: {'; '.join(changed)}",
            where="resume",
            fix="put these as they were, or start without resume",
        )


def _changes(old: RunConfig, new: RunConfig) -> list[tuple[str, str]]:
    """(key, what it was and is) of every key that differs."""
    found = _differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
    return [(key, f"{key} was {before!r}, now {after!r}") for key, before, after in found]


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}, key=str):
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [(path, old, new)]

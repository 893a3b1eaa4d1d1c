"""Resumable checkpoints that are whole or not there, and the weights to use afterwards.

A checkpoint is a folder ``step-00000200`` with ``state.pt`` (Lightning's dict: trained weights, optimizer, schedule,
counters) and ``manifest.json`` with sizes and sha256, written last. It is written under a temporary name in the same
folder, synced, and renamed, so the final name never holds half a file. A disk that is full costs that checkpoint and a
warning, not the run: what was saved before stays, and the next one that is due is tried again.
"""

from __future__ import annotations

import errno
import hashlib
import pickle
import random
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_leaves

from lmlab.journal import RunDir, beside, publish_folder, read_json, write_json
from lmlab.models.sharding import whole_weights
from lmlab.modes import is_sharded
from lmlab.records import RunFailedError, UserError
from lmlab.training.options import CheckpointConfig


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after ``step`` optimizer steps; sorts by step."""
    return f"step-{step:08d}"


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders.

    Args:
        on_error: what a file system that does not take a checkpoint means: ``warn`` goes on without it, ``raise`` not.
        mapped: read tensors from the file when they are used, for ranks that use a part of each.

    Attributes:
        failed: why the last save failed, on the rank that writes; None if it did not.
    """

    def __init__(self, on_error: str = "raise", *, mapped: bool = False) -> None:
        self.on_error, self.mapped = on_error, mapped
        self.failed: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write the folder ``path`` atomically.

        Raises:
            OSError: it cannot be written, and ``on_error`` is ``raise``. What stood there before stands there still.
        """
        path = Path(path)
        temporary = beside(path, "tmp")
        self.failed = None
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _require_space(temporary, checkpoint)
            state = temporary / "state.pt"
            torch.save(checkpoint, state)
            about = {"bytes": state.stat().st_size, "sha256": _sha256(state)}
            step = int(checkpoint["global_step"])
            write_json(temporary / "manifest.json", {"step": step, "files": {"state.pt": about}}, sync=True)
            publish_folder(temporary, path)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, RuntimeError) and not _is_of_the_disk(error):
                raise
            self.failed = error if isinstance(error, OSError) else OSError(errno.EIO, _first_line(error))
            if self.on_error == "raise":
                raise self.failed from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify against the manifest and load; nothing in it is ever executed.

        Raises:
            UserError: not a checkpoint, damaged, or with something in it that is neither a number nor a tensor.
        """
        verify_checkpoint(Path(path))
        _refuse_compressed(Path(path) / "state.pt")
        try:
            return torch.load(
                Path(path) / "state.pt",
                map_location=map_location or "cpu",
                weights_only=True,
                mmap=self.mapped,
            )
        except pickle.UnpicklingError as error:
            raise UserError(
                f"it holds code, which is not run: {_first_line(error)}",
                where=str(path),
                fix="use another checkpoint",
            ) from error

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the folder."""
        shutil.rmtree(path, ignore_errors=True)


def _refuse_compressed(file: Path) -> None:
    """torch stores its records as they are; one that is compressed could unpack to more than there is memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [
                entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED
            ]
    except (zipfile.BadZipFile, OSError, ValueError):
        packed = [file.name]
    if packed:
        raise UserError(
            f"not a checkpoint of torch's ({packed[0]})", where=str(file), fix="use another checkpoint"
        )


def _require_space(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Say that the disk is full before it is."""
    leaves = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor)]
    needed, free = sum(leaf.nbytes for leaf in leaves), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free")


def _is_of_the_disk(error: RuntimeError) -> bool:
    """Whether it is how torch.save's own writer says that a file took less than it was given."""
    return any(said in str(error) for said in ("PytorchStreamWriter", "unexpected pos", "iostream error"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def verify_checkpoint(path: Path) -> None:
    """Compare sizes and hashes with the manifest.

    Raises:
        UserError: not a checkpoint, or damaged.
    """
    files = read_json(path / "manifest.json").get("files")
    if not files:
        raise UserError(
            "not a checkpoint",
            where=str(path),
            fix="give a folder like checkpoints/step-00000200, or resume=auto",
        )
    for name, about in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != about["bytes"] or _sha256(file) != about["sha256"]:
            raise UserError(
                f"damaged checkpoint: {name} differs from its manifest",
                where=str(path),
                fix="use an older one",
            )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint by step number; damaged ones are passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify_checkpoint(path)
        except UserError:
            continue
        return path
    return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Checkpoints(Callback):
    """Saves resumable checkpoints and keeps the best weights; the last weights are written at the end.

    Args:
        run: where.
        options: how often, how many.
        save_weights: writes ``adapter/`` or ``model/`` into the folder it is given (on rank 0), of these weights or, for
            None, of the model as it is.
        pause: entered while saving (the log's clock stands still).
        val_every_n_steps: a checkpoint due together with a validation is saved after it.
        branches: it begins at another run's checkpoint, whose best, perhaps on other data, is not this run's.
    """

    def __init__(
        self,
        run: RunDir,
        options: CheckpointConfig,
        *,
        save_weights: Callable[[Path, dict[str, torch.Tensor] | None], None],
        max_steps: int,
        val_every_n_steps: int,
        pause: Callable[[], AbstractContextManager[None]],
        branches: bool = False,
    ) -> None:
        self.branches = branches
        self.run, self.options, self.save_weights = run, options, save_weights
        self.max_steps, self.val_every = max_steps, val_every_n_steps
        self.best: float | None = None
        self.best_step: int | None = None
        self._saved_step, self._pause = -1, pause

    def state_dict(self) -> dict[str, Any]:
        """Best so far, so that a resumed run does not overwrite it with something worse."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        if not self.branches:
            self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save where a step is due and no validation follows."""
        step, every = trainer.global_step, self.options.every_n_steps
        due = every is not None and step % every == 0 and step != self._saved_step and _step_done(trainer)
        if due and not self._validates(trainer, step):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best weights; then save, if due, with the validation's outcome in it."""
        if trainer.sanity_checking:
            return
        step, every = trainer.global_step, self.options.every_n_steps
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and (self.best is None or float(loss) < self.best):
            self.best, self.best_step = float(loss), step
            weights = _gathered(trainer, pl_module)
            if trainer.is_global_zero:
                self._keep_best(weights)
        if step >= self.max_steps or trainer.should_stop or (every is not None and step % every == 0):
            self.save(trainer)

    def _keep_best(self, weights: dict[str, torch.Tensor] | None) -> None:
        try:
            self.save_weights(self.run.best, weights)
        except OSError as error:
            if self.options.on_error == "raise":
                raise
            _warn("the best weights", error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last weights, whatever ended the training.

        Raises:
            RunFailedError: they cannot be written.
        """
        weights = _gathered(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        try:
            self.save_weights(self.run.path, weights)
        except OSError as error:
            raise RunFailedError(
                f"the last weights cannot be written ({error.strerror or error}) in {self.run.path}: "
                "make room and go on with resume=auto"
            ) from error

    def save(self, trainer: Trainer) -> None:
        """Save now (all ranks must call it) and remove what is older than the newest ``keep``.

        Raises:
            RunFailedError: it cannot be written, and ``checkpoint.on_error`` is ``raise``.
        """
        self._saved_step = trainer.global_step
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, FolderCheckpointIO)
        with self._pause():
            # It never raises on the rank that writes before the others have passed its barrier: see `failed`.
            trainer.save_checkpoint(self.run.checkpoints / checkpoint_name(trainer.global_step))
        if not trainer.is_global_zero:
            return
        if writer.failed is not None:
            if self.options.on_error == "raise":
                raise RunFailedError(
                    f"the checkpoint of step {trainer.global_step} cannot be written ({writer.failed.strerror}): "
                    "make room, or checkpoint.on_error=warn"
                )
            _warn(f"the checkpoint of step {trainer.global_step}", writer.failed)
            return
        saved = self.run.checkpoints / checkpoint_name(trainer.global_step)
        others = sorted(path for path in self.run.checkpoints.glob("step-*") if path != saved)
        # Later ones are of a run that this one did not go on from.
        later = [path for path in others if path.name > saved.name]
        older = [path for path in others if path.name < saved.name]
        for old in later + older[: len(older) - (self.options.keep - 1)]:
            shutil.rmtree(old, ignore_errors=True)

    def _validates(self, trainer: Trainer, step: int) -> bool:
        return step % self.val_every == 0 or step >= self.max_steps or trainer.should_stop

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Random states of every rank, as plain lists and tensors that `weights_only` can load."""
        states = [_rng_state()]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, states[0])
            states = gathered
        checkpoint["rng"] = states

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep this rank's random state until training starts; count micro-batches as they are cut now."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = int(checkpoint["global_step"]) * trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            # Lightning steps where this count divides by the accumulation, which may be another since.
            shift = done - counts["ready"]
            for name in ("ready", "started", "processed", "completed"):
                counts[name] += shift
        states = checkpoint.get("rng") or []
        self._rng = states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random state last, after everything that may draw while resuming."""
        state = getattr(self, "_rng", None)
        if state is not None:
            _restore_rng(state)


def _gathered(trainer: Trainer, module: LightningModule) -> dict[str, torch.Tensor] | None:
    """The weights to use, on the first rank, where they lie in shares; all ranks must call it. None: the model has them."""
    model: Any = module.model
    if not is_sharded(model):
        return None
    return whole_weights(model, keep=trainer.is_global_zero, trained_only=hasattr(model, "peft_config"))


def _warn(what: str, error: OSError) -> None:
    print(
        f"warning: {what} cannot be written ({error.strerror or error}); what was saved before stays",
        file=sys.stderr,
    )


def _step_done(trainer: Trainer) -> bool:
    return (trainer.fit_loop.epoch_loop.batch_progress.current.ready) % trainer.accumulate_grad_batches == 0


def _rng_state() -> dict[str, Any]:
    version, keys, position, has_gauss, cached = np.random.get_state()
    python_version, python_state, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [
            str(version),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],  # type: ignore[arg-type]
        "python": [python_version, list(python_state), python_gauss],
    }


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    python_version, python_state, python_gauss = state["python"]
    random.setstate((python_version, tuple(python_state), python_gauss))

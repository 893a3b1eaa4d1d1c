"""Loaders over prepared rows: endless ordered micro-batches for training, each row once for validation.

For a GPU training batches are made ahead in one thread, which works while the kernels run. On a CPU every core is busy
with products already: made ahead, a batch costs the step more than its own time (1.0 against 0.4 ms of 33). Worker processes (``trainer.num_workers``) pay where making a batch takes longer than a step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lmlab.data.order import ShareOfRows, StepBatches, spread
from lmlab.data.packing import collate_flat, collate_padded
from lmlab.data.prepared import PreparedData
from lmlab.records import PackedBatch
from lmlab.training.options import TrainerConfig


class MadeAhead(Iterable[Any]):
    """The items of an iterable, in its order, made in a thread ahead of their use; what it raises is raised here.

    Args:
        source: may be without end.
        depth: how many items wait at most.
    """

    def __init__(self, source: Iterable[Any], *, depth: int = 2) -> None:
        self.source, self.depth = source, depth

    def __iter__(self) -> Iterator[Any]:
        waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(self.depth)
        left = threading.Event()

        def put(is_item: bool, item: Any) -> None:
            while not left.is_set():
                try:
                    return waiting.put((is_item, item), timeout=0.1)
                except queue.Full:
                    continue

        def make() -> None:
            try:
                for item in self.source:
                    put(True, item)
                    if left.is_set():
                        return
            except BaseException as error:
                put(False, error)
            else:
                put(False, None)

        thread = threading.Thread(target=make, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                is_item, item = waiting.get()
                if is_item:
                    yield item
                elif item is None:
                    return
                else:
                    raise item
        finally:  # also when the consumer goes away in the middle
            left.set()
            thread.join()


class LMDataModule(LightningDataModule):
    """Batches of a prepared data set.

    Args:
        prepared: the data set.
        trainer_config: batch sizes and workers.
        seed: of the data order.
        flat: flat rows (packed attention) instead of padded ones.
    """

    def __init__(
        self, prepared: PreparedData, trainer_config: TrainerConfig, *, seed: int, flat: bool
    ) -> None:
        super().__init__()
        self.prepared, self.options, self.seed = prepared, trainer_config, seed
        self.train_rows, self.val_rows = prepared.rows("train"), prepared.rows("val")
        self.collate = collate_flat if flat else collate_padded
        self.start_step = 0

    def rows_of_step(self, step: int) -> list[int]:
        """Training rows of one optimizer step (0 is the first), over all ranks."""
        order, size = self.prepared.order(self.train_rows, seed=self.seed), self.options.rows_per_step
        return [order[index] for index in range(step * size, (step + 1) * size)]

    def records_of_step(self, step: int) -> list[str]:
        """Where the records of one optimizer step came from (file and line), over all ranks."""
        return self.train_rows.places(self.rows_of_step(step))

    def train_dataloader(self) -> Iterable[PackedBatch]:
        """Endless; its position is the trainer's optimizer step, so that resuming needs no other state."""
        assert self.trainer is not None
        batches = StepBatches(
            self.prepared.order(self.train_rows, seed=self.seed),
            batch_size=self.options.batch_size,
            accumulate=self.options.accumulate_grad_batches,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start_step=self.start_step,
        )
        loader = self._loader(self.train_rows, batches)
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return MadeAhead(loader) if on_gpu and not self.options.num_workers else loader

    def val_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the validation rows, the same ones each time."""
        return self._once(self.val_rows, limit=self.options.max_val_rows)

    def test_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the test rows."""
        return self._once(self.prepared.rows("test"))

    def _once(self, rows: Any, *, limit: int | None = None) -> DataLoader[Any]:
        assert self.trainer is not None
        share = ShareOfRows(
            spread(len(rows), limit),
            batch_size=self.options.val_batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return self._loader(rows, share)

    def _loader(self, rows: Any, batches: Any) -> DataLoader[Any]:
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.options.num_workers,
            # An own generator: without it each iterator draws its base seed from the global RNG.
            generator=torch.Generator().manual_seed(self.seed),
            pin_memory=torch.cuda.is_available(),
        )

    def transfer_batch_to_device(
        self, batch: PackedBatch, device: torch.device, dataloader_idx: int
    ) -> PackedBatch:
        """Move the tensors; lengths stay on the CPU."""
        return batch.to(device)

    def state_dict(self) -> dict[str, int]:
        """The order's whole state: optimizer steps done."""
        return {"step": self.trainer.global_step if self.trainer else 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where the checkpoint stood."""
        self.start_step = state_dict["step"]

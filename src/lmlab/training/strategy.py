"""How the ranks of a run work together: alone, by DDP, or sharded; and who tells Lightning which rank this is.

Lightning guesses the environment from variables that are there for other reasons too: inside an sbatch job it would take
every process for rank 0 of SLURM_NTASKS. So it is told: torchrun's variables (which `lmlab.ranks` makes of srun's) for a
rank of several, nothing for one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lmlab.models.hardware import Hardware
from lmlab.models.sharding import load_optimizer, load_weights, shard_model, whole
from lmlab.modes import is_sharded


def cluster_environment() -> ClusterEnvironment:
    """Where Lightning reads rank and world size."""
    return TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()


def build_strategy(name: str, hardware: Hardware, *, world_size: int) -> Strategy | str:
    """``trainer.strategy`` for so many ranks."""
    if world_size == 1:
        return "auto"
    backend = "nccl" if hardware.device.type == "cuda" else "gloo"
    if name == "fsdp":
        dtype = hardware.compute_dtype if hardware.autocast else None
        return ShardedStrategy(backend, world_size=world_size, param_dtype=dtype)
    return DDPStrategy(
        process_group_backend=backend,
        find_unused_parameters=False,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # a language model's are constants (rotary tables): one send per micro-batch for nothing
    )


class ShardedStrategy(ModelParallelStrategy):
    """`models.sharding` under Lightning, with the checkpoints of every other strategy: whole tensors, written by rank 0.

    Lightning's own would write a folder of shards without a manifest, the frozen base in it, or one file that only one of
    its strategies reads.

    Args:
        backend: of the process group.
        param_dtype: see `models.sharding.shard_model`.
    """

    def __init__(self, backend: str, *, world_size: int, param_dtype: torch.dtype | None) -> None:
        super().__init__(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
        self.param_dtype = param_dtype

    def shard(self, model: torch.nn.Module) -> None:
        """Cut the model over all ranks, once."""
        if not is_sharded(model):
            shard_model(model, self.device_mesh["data_parallel"], param_dtype=self.param_dtype)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """By `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gathered; empty tensors' places on all ranks but the first."""
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As a single process's, parameters by number."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return whole(inner.state_dict(), keep=self.is_global_zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """By the run's own writer, on the first rank."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank maps the file and takes its share of each tensor."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """This rank's share of the weights."""
        assert self.lightning_module is not None
        load_weights(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """This rank's share of the optimizer's state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer(optimizer, state)

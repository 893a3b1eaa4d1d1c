"""What ranks send one another: the bytes planned from shapes against those that `fully_shard` really hands to collectives.

torch's fake process group does no communication, so one process is rank 0 of any number; the code above it is the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exact import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lmlab.models.adapters import Lora
from lmlab.models.build import enable_checkpointing
from lmlab.models.sharding import shard_model, sharded_loss_sum
from lmlab.models.traffic import Groups, Part, Traffic, ddp_traffic, fsdp_traffic, gathered, groups_of
from lmlab.records import PackedBatch

RANKS = 5  # divides none of the sizes: shares are padded
LORA = Lora(kind="lora", rank=3, alpha=6.0, dropout=0.0, target_modules="all-linear")


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        yield init_device_mesh("cpu", (RANKS,))
    finally:
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors that were gathered and scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.scattered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.scattered += args[1].nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_planned_traffic_is_what_sharded_training_hands_to_collectives(
    mesh: Any, adapter: str, checkpointing: bool, narrow: bool
) -> None:
    model: Any = tiny_model()
    if checkpointing:
        enable_checkpointing(model)
    if adapter == "lora":
        model = LORA.apply(model, seed=1)
    model.train()
    groups = groups_of(model)
    shard_model(model, mesh, param_dtype=torch.bfloat16 if narrow else None)
    ids = torch.arange(24).reshape(2, 12)
    batch = PackedBatch(ids, ids.clone(), None, None, torch.arange(24), 24)
    counted = Collectives()
    with counted:
        for _ in range(2):
            sharded_loss_sum(model, batch).backward()
    sent = fsdp_traffic(groups, RANKS, size=2 if narrow else None, micro_batches=2)
    assert sent.all_gather == counted.gathered // RANKS * (RANKS - 1)
    assert sent.reduce_scatter == counted.scattered // RANKS * (RANKS - 1)
    assert sent.all_gather > 0
    assert sent.reduce_scatter > 0


def test_volumes_by_hand() -> None:
    """A layer of 6 x 4 and a frozen root of 10, on 4 ranks."""
    groups = Groups(
        layers=((Part((6, 4), 4, True),), (Part((6, 4), 4, True),)), root=(Part((10,), 2, False),)
    )
    assert gathered(groups.layers[0], 4, 2) == 4 * 2 * 4 * 2  # 6 rows in shares of 2: padded to 8
    assert gathered(groups.root, 4, None) == 4 * 3 * 2
    assert ddp_traffic(groups, 4) == Traffic(all_reduce=2 * (2 * 24 * 4) * 3 // 4)
    sent = fsdp_traffic(groups, 4, size=2, micro_batches=3)
    assert sent == Traffic(
        all_gather=3 * (2 * 2 * 64 + 24) // 4 * 3, reduce_scatter=3 * (2 * 4 * 2 * 4 * 4) // 4 * 3
    )
    assert sent.total == sent.all_gather + sent.reduce_scatter


def test_volumes_are_those_of_the_zero_paper() -> None:
    """arXiv 1910.02054, section 7: 2 psi for data parallelism, 3 psi for shares of everything, one type for all."""
    groups = Groups(layers=((Part((512, 512), 4, True),),) * 50, root=(Part((512,), 4, True),))
    psi = 4 * sum(part.values for part in groups.parts)
    assert ddp_traffic(groups, 512).total == pytest.approx(2 * psi, rel=0.003)
    assert fsdp_traffic(groups, 512, size=4, micro_batches=1).total == pytest.approx(3 * psi, rel=0.003)


def test_a_tied_head_is_sent_once() -> None:
    groups = groups_of(tiny_model())
    assert len(groups.layers) == 2
    assert sorted(part.shape for part in groups.root) == [(32,), (257, 32)]
    assert sum(part.values for part in groups.parts) == sum(p.numel() for p in tiny_model().parameters())

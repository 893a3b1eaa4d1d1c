"""Sharding on CUDA over NCCL, on however many GPUs there are: the collectives and types that a CPU does not have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import distance, on_ranks, prepared_data, rows_of_steps, tiny_model, write_records

from lmlab.data.packing import collate_flat
from lmlab.models.attention import use_packed_attention
from lmlab.models.head import loss_sum
from lmlab.models.sharding import shard_model, sharded_loss_sum, whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {None: 1e-4, torch.bfloat16: 5e-2}


def sharded_gradients(records: str) -> dict[str, float]:
    """Runs on each rank: how far the gathered gradient of one batch, the same on all, is from a whole model's."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    try:
        device = torch.device("cuda", rank)
        batch = collate_flat(rows_of_steps(prepared_data(Path(records)), 8)).to(device)
        plain: Any = tiny_model()
        plain.to(device)
        use_packed_attention(plain)
        loss_sum(plain, batch).backward()
        expected = {name: p.grad for name, p in plain.named_parameters()}
        found: dict[str, float] = {}
        for dtype in TOLERANCE:
            model: Any = tiny_model()  # in host memory, as a model too large for one card
            use_packed_attention(model)
            shard_model(model, init_device_mesh("cuda", (size,)), param_dtype=dtype)
            sharded_loss_sum(model, batch).backward()
            gathered = whole({n: p.grad for n, p in model.named_parameters()}, keep=True)
            found[str(dtype)] = distance({n: g.cpu() for n, g in expected.items()}, gathered)
        return found
    finally:
        dist.destroy_process_group()


def test_against_a_whole_model_gradient(tmp_path: Path) -> None:
    records = str(write_records(tmp_path / "records.jsonl"))
    for found in on_ranks(torch.cuda.device_count(), sharded_gradients, records):
        for dtype, tolerance in TOLERANCE.items():
            assert found[str(dtype)] < tolerance

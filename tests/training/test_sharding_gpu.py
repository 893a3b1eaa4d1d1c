"""Sharding on CUDA over NCCL, on however many GPUs there are: the collectives and types that a CPU does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exact import GATHERED, gathered_gradients, on_ranks, write_records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_against_a_whole_model_gradient(tmp_path: Path) -> None:
    records = str(write_records(tmp_path / "records.jsonl"))
    for found in on_ranks(torch.cuda.device_count(), gathered_gradients, records, "cuda"):
        for dtype, tolerance in GATHERED.items():
            assert found[str(dtype)] < tolerance

"""The memory meter's phases, and the arithmetic of a step against counts by hand and by torch."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmlab.models.adapters import Lora
from lmlab.models.build import Scratch, build_model
from lmlab.models.flops import step_flops
from lmlab.models.memory import MemoryMeter
from lmlab.models.quantize import quants

GB = 0.2
HIDDEN, MLP, VOCAB, LAYERS, KV = 64, 96, 97, 2, 32


def filled(gigabytes: float = GB) -> mmap.mmap:
    """Pages straight from the system: malloc may hand out memory that earlier tests left resident."""
    block = mmap.mmap(-1, int(gigabytes * 1e9))
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    return block


@pytest.fixture
def meter() -> MemoryMeter:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc here: peaks of a phase cannot be told from the process's")
    gc.collect()
    return MemoryMeter(on_cuda=False)


def test_a_peak_is_seen_in_its_own_phase_only(meter: MemoryMeter) -> None:
    meter.start("load")
    meter.start("forward")
    block = filled()
    del block
    meter.start("backward")
    meter.start(None)
    read = meter.read()
    assert set(read) == {f"memory/{p}/peak_gb" for p in ("load", "forward", "backward")} | {"memory/rss_gb"}
    assert read["memory/forward/peak_gb"] - read["memory/load/peak_gb"] == pytest.approx(GB, abs=0.05)
    assert read["memory/backward/peak_gb"] == pytest.approx(read["memory/load/peak_gb"], abs=0.05)
    assert read["memory/rss_gb"] == pytest.approx(read["memory/load/peak_gb"], abs=0.05)


def test_phases_that_did_not_grow_and_loading_have_no_plan_error(meter: MemoryMeter) -> None:
    with meter.phase("load"):
        pass
    meter.plan({"load": 0.1, "forward": 0.1, "eval": 0.1}, loaded_gb=0.0)
    meter.base_gb += 1.0  # as if the process had been larger once
    with meter.phase("forward"):
        pass
    assert meter.errors() == {}


def test_a_phase_inside_a_phase(meter: MemoryMeter) -> None:
    meter.start("eval")
    with meter.phase("generate"):
        block = filled()
        del block
    small = meter.read()
    assert set(small) == {"memory/eval/peak_gb", "memory/generate/peak_gb", "memory/rss_gb"}
    assert small["memory/generate/peak_gb"] - small["memory/eval/peak_gb"] == pytest.approx(GB, abs=0.05)
    block = filled()
    del block
    with pytest.raises(RuntimeError), meter.phase("generate"):
        raise RuntimeError  # the phase before goes on all the same
    meter.start(None)
    again = meter.read()
    assert again["memory/eval/peak_gb"] - small["memory/eval/peak_gb"] == pytest.approx(GB, abs=0.05)


def test_the_larger_of_two_visits_counts_and_reading_forgets(meter: MemoryMeter) -> None:
    for size in (GB, 0.01):
        meter.start("forward")
        block = filled(size)
        del block
        meter.start("optimizer")
    meter.start(None)
    read = meter.read()
    assert read["memory/forward/peak_gb"] - read["memory/optimizer/peak_gb"] == pytest.approx(GB, abs=0.05)
    assert set(meter.read()) == {"memory/rss_gb"}


# --- arithmetic ---------------------------------------------------------------------------------------------------


def llama(**changes: Any) -> Any:
    config = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": MLP,
    }
    about = Scratch(
        kind="scratch",
        name="tiny",
        architecture="llama",
        config=config | changes,
        gradient_checkpointing=False,
    )
    return build_model(about, about.hf_config(VOCAB), seed=0, dtype=torch.float32)


BODY = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * MLP)
LORA_BODY = LAYERS * 4 * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KV) + 3 * (HIDDEN + MLP))
HEAD = HIDDEN * VOCAB


def lora(targets: Any) -> Lora:
    return Lora(kind="lora", rank=4, alpha=8.0, dropout=0.0, target_modules=targets)


def test_by_hand_full_training() -> None:
    flops = step_flops(llama(), checkpointing=False)
    assert flops.body == 6 * BODY
    assert flops.head == 6 * HEAD
    assert flops.attention == 3 * 4 * LAYERS * HIDDEN / 2
    assert flops.of(100, 30, 10.0) == 100 * (6 * BODY + 6 * LAYERS * HIDDEN * 10) + 30 * 6 * HEAD
    again = step_flops(llama(), checkpointing=True)  # one more forward pass through the layers, not the head
    assert (again.body, again.head) == (8 * BODY, 6 * HEAD)
    assert again.attention == flops.attention * 4 / 3


@pytest.mark.parametrize("kind", ["none", "bf16", "int8", "nf4"])
def test_by_hand_lora(kind: str) -> None:
    model = llama()
    values = {"kind": kind} | ({"double_quant": True} if kind == "nf4" else {})
    config: Any = quants.class_of(kind).model_validate(values)
    config.apply(model, compute_dtype=torch.float32)
    flops = step_flops(lora("all-linear").apply(model, seed=0), checkpointing=False)
    assert flops.body == 4 * BODY + 6 * LORA_BODY
    assert flops.head == 4 * HEAD


def test_by_hand_lora_on_the_head() -> None:
    flops = step_flops(lora(["lm_head"]).apply(llama(), seed=0), checkpointing=False)
    assert flops.head == 4 * HEAD + 6 * 4 * (HIDDEN + VOCAB)
    assert flops.body == 4 * BODY


def test_head_dim_of_its_own() -> None:
    assert step_flops(llama(head_dim=24), checkpointing=False).attention == 3 * 4 * LAYERS * 4 * 24 / 2


def test_against_torch_flop_counter() -> None:
    """Torch counts a full square of attention where half of it is masked, and no gradient to the embedding's input."""
    model, tokens = llama(), 16
    model.set_attn_implementation("eager")
    model.requires_grad_(True)
    ids = torch.randint(0, VOCAB, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        out = model(ids, use_cache=False).logits
    forward = counter.get_total_flops()
    attention = 4 * LAYERS * HIDDEN * tokens * tokens
    assert forward - attention == pytest.approx(2 * tokens * (BODY + HEAD), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    flops = step_flops(model, checkpointing=False)
    total = (
        flops.of(tokens, tokens, tokens) + flops.attention * tokens * tokens
    )  # the other half of the square
    # q, k and v of the first layer, too, hand a gradient on (to the embedding).
    assert forward + counter.get_total_flops() == pytest.approx(total, rel=0.01)

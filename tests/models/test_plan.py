"""The memory plan: counted bytes against bytes that exist, extended depth against whole depth."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmlab.models.adapters import AdapterConfig, Lora, NoAdapter, count_parameters
from lmlab.models.build import Scratch
from lmlab.models.footprint import Footprint
from lmlab.models.head import CrossEntropy
from lmlab.models.memory import MemoryMeter
from lmlab.models.plan import MemoryPlan, PlannedRun, Workload, plan
from lmlab.models.quantize import (
    EightBit,
    FourBit,
    FourBitInteger,
    QuantConfig,
    SixteenBit,
    Unquantized,
    stored_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, MLP, VOCAB, RANK = 64, 160, 300, 4
LOSS = CrossEntropy(kind="cross_entropy", label_smoothing=0.0, z_loss=0.0)
LORA = Lora(kind="lora", rank=RANK, alpha=8.0, dropout=0.0, target_modules="all-linear")
QUANTS: dict[str, QuantConfig] = {
    "none": Unquantized(kind="none"),
    "bf16": SixteenBit(kind="bf16"),
    "int8": EightBit(kind="int8"),
    "nf4": FourBit(kind="nf4", double_quant=True),
    "nf4 single": FourBit(kind="nf4", double_quant=False),
    "int4": FourBitInteger(kind="int4"),
}


def llama(layers: int) -> Any:
    return AutoConfig.for_model(
        "llama",
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
    )


def planned(
    layers: int = 3,
    *,
    quant: QuantConfig = QUANTS["none"],
    adapter: AdapterConfig = LORA,
    checkpointing: bool = False,
    train: tuple[int, ...] = (48, 32),
    whole: bool = True,
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW,
    device_type: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MemoryPlan:
    model = Scratch(
        kind="scratch", name="x", architecture="llama", config={}, gradient_checkpointing=checkpointing
    )
    work = Workload(train, sum(train) // 2, train, sum(train) // 2, False, prompts=(16, 12), new_tokens=8)
    run = PlannedRun(model, llama(layers), quant, adapter, LOSS, optimizer, work, dtype, device_type)
    return plan(run, whole=whole)


def base_parameters(layers: int) -> int:
    model = AutoModelForCausalLM.from_config(llama(layers))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", QUANTS)
def test_planned_weights_are_the_bytes_that_quantized_weights_take(name: str) -> None:
    model = AutoModelForCausalLM.from_config(llama(3), dtype=torch.float32)
    QUANTS[name].apply(model, compute_dtype=torch.float32)
    weights = planned(quant=QUANTS[name]).phases["optimizer"]["weights"]
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    # bitsandbytes' code tables (16 + 256 floats a layer) are shared in the plan.
    tables = 21 * 4 * (16 + 256) if name.startswith("nf4") else 0
    assert stored_bytes(model) - tables <= weights <= stored_bytes(model) + buffers + 64


def test_full_training_has_a_gradient_and_two_moments_for_each_parameter() -> None:
    phase = planned(adapter=NoAdapter(kind="none")).phases["optimizer"]
    assert phase["gradients"] == 4 * base_parameters(3)
    assert phase["optimizer"] == pytest.approx(2 * phase["gradients"], abs=4 * 200)  # AdamW's step counters
    assert phase["adapter"] == 0


def test_an_adapter_has_gradients_and_moments_for_its_own_parameters_only() -> None:
    shapes = [(HIDDEN, HIDDEN), (HIDDEN, 32), (HIDDEN, 32), (HIDDEN, HIDDEN)]
    shapes += [(HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)]
    trained = 4 * 3 * sum(RANK * (a + b) for a, b in shapes)
    phase = planned().phases["optimizer"]
    assert (phase["adapter"], phase["gradients"]) == (trained, trained)


@pytest.mark.parametrize("name", QUANTS)
def test_dora_and_modules_trained_whole_are_in_the_plan(name: str) -> None:
    settings = {"dora": True, "modules_to_save": ["lm_head"], "layers": [0, -1]}
    adapter = Lora.model_validate({**LORA.model_dump(), **settings})
    model = AutoModelForCausalLM.from_config(llama(9))
    QUANTS[name].apply(model, compute_dtype=torch.float32)
    trained = count_parameters(adapter.apply(model, seed=0))[1]
    found = planned(9, adapter=adapter, quant=QUANTS[name], whole=False)
    assert found.layers == (9, 9)  # its layers are not alike: none stands for another
    phase = found.phases["optimizer"]
    assert phase["gradients"] == 4 * trained
    assert 4 * trained <= phase["adapter"] <= 4 * trained + 64


def test_activations_grow_with_the_batch_and_shrink_under_checkpointing() -> None:
    one, two = planned(train=(64,) * 4), planned(train=(64,) * 8)
    less = planned(train=(64,) * 8, checkpointing=True)
    assert two.phases["forward"]["activations"] == pytest.approx(
        2 * one.phases["forward"]["activations"], rel=0.02
    )
    assert less.phases["backward"]["activations"] < two.phases["backward"]["activations"] / 3
    assert less.phases["optimizer"]["weights"] == two.phases["optimizer"]["weights"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [NoAdapter(kind="none"), LORA], ids=["none", "lora"])
def test_a_deep_model_extended_from_3_and_4_layers_is_the_deep_model_run_whole(
    adapter: AdapterConfig, checkpointing: bool
) -> None:
    whole = planned(9, adapter=adapter, checkpointing=checkpointing)
    extended = planned(9, adapter=adapter, checkpointing=checkpointing, whole=False)
    assert (whole.layers, extended.layers) == ((9, 9), (9, 7))
    for phase in whole.phases:
        assert extended.peak_gb(phase) == pytest.approx(whole.peak_gb(phase), rel=1e-3), phase


def test_live_bytes_are_those_of_the_allocator_of_this_arithmetic() -> None:
    """By hand: two matrices of 4,000 bytes, their product, and the product's end."""
    footprint = Footprint(granule=512)
    with footprint.active():
        footprint.mark = ("a",)
        one, two = torch.empty(10, 100), torch.empty(100, 10)
        product = one @ two
        assert footprint.live["weights"] == 2 * 4096 + 512  # 4,000 and 400 bytes, rounded up
        del product
        assert footprint.live["weights"] == 2 * 4096
        footprint.mark = ("b",)
        view = one.t()
        del one
        assert footprint.live["weights"] == 2 * 4096, "a view keeps its storage"
        del view
        assert footprint.live["weights"] == 4096
    assert footprint.peaks["a",].total() == 2 * 4096 + 512


def test_a_plan_draws_no_random_number_and_leaves_no_fake_tensor_behind() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    planned(quant=QUANTS["nf4"])
    assert torch.equal(torch.rand(4), expected)
    model = AutoModelForCausalLM.from_config(llama(2), dtype=torch.float32)
    QUANTS["nf4"].apply(model, compute_dtype=torch.float32)
    assert torch.isfinite(model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits).all()


def test_a_gpu_is_planned_for_without_one_in_16_bits_and_512_byte_blocks() -> None:
    cpu, gpu = planned(train=(64,) * 8), planned(train=(64,) * 8, device_type="cuda", dtype=torch.bfloat16)
    assert gpu.phases["forward"]["activations"] < 0.9 * cpu.phases["forward"]["activations"]
    assert all(size % 512 == 0 for size in gpu.phases["backward"].values())
    assert gpu.phases["forward"]["kept free"] == 0


def test_8_bit_optimizers_keep_less_state() -> None:
    import bitsandbytes.optim

    full = planned(adapter=NoAdapter(kind="none")).phases["optimizer"]["optimizer"]
    less = planned(adapter=NoAdapter(kind="none"), optimizer=lambda p: bitsandbytes.optim.AdamW8bit(p))
    assert 0.2 < less.phases["optimizer"]["optimizer"] / full < 0.6  # small tensors stay in 32 bits


def test_planned_peaks_stand_beside_measured_ones_and_give_an_error() -> None:
    meter = MemoryMeter(on_cuda=False)
    meter.plan({"forward": 0.1, "eval": 0.2}, loaded_gb=0.0)
    with meter.phase("forward"):
        block = bytearray(50_000_000)
    values = meter.read()
    del block
    assert values["memory/forward/planned_gb"] == pytest.approx(meter.base_gb + 0.1)
    assert "memory/eval/planned_gb" not in values, "that phase was not measured"
    grown = values["memory/forward/peak_gb"] - meter.base_gb
    error = (values["memory/forward/planned_gb"] - meter.base_gb) / grown - 1
    assert meter.errors() == {"memory/forward/plan_error": pytest.approx(error)}


def test_checkpointing_returns_what_it_frees_and_the_plan_counts_on_that() -> None:
    """In a process of its own, as malloc is set for good: 40 blocks freed below one that stays."""
    code = """
import sys, torch
from lmlab.models.memory import _status_gb, return_freed_blocks
if sys.argv[1] == "returned":
    return_freed_blocks()
torch.ones(4 << 20)  # freed: from now on malloc's heap takes blocks of up to 16 MB
before = _status_gb("VmRSS")
blocks = [torch.ones(1 << 19) for _ in range(80)]
stays = blocks[1::2]
del blocks
print(_status_gb("VmRSS") - before)
"""
    held, returned = (
        float(
            subprocess.run(
                [sys.executable, "-c", code, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("held", "returned")
    )
    assert returned == pytest.approx(40 * 2.1e-3, abs=0.01)
    if platform.libc_ver()[0] == "glibc":
        assert held > returned + 0.05

    def planned(*, keeps_below: int) -> float:
        footprint = Footprint(keeps_below=keeps_below)
        with footprint.active():
            footprint.mark = ("forward", "one")
            torch.empty(1 << 19)
        return footprint.heap["forward", "one"]["small"]

    assert planned(keeps_below=1 << 20) == 0
    assert planned(keeps_below=32 << 20) == 2 << 20


def test_plan_script_needs_nothing_but_a_config(tmp_path: Path) -> None:
    llama(3).save_pretrained(tmp_path / "model")
    overrides = [
        "adapter=qlora",
        "model=pretrained",
        f"model.name_or_path={tmp_path / 'model'}",
        "trainer.accelerator=gpu",
        "data.max_length=64",
        "--json",
    ]
    environment = {**os.environ, "LMLAB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "scripts/plan.py", *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    import json

    figures = json.loads(done.stdout)
    assert set(figures["peak_gb"]) == {"load", "forward", "backward", "optimizer", "eval", "generate"}
    assert figures["device"] == "cuda"
    assert figures["total_gb"] == pytest.approx(max(figures["peak_gb"].values()))
    assert not (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_tokenizer_whose_size_nobody_knows_yet_is_one_line(tmp_path: Path) -> None:
    told = ["task=pretrain", "model=llama_tiny", "tokenizer=chars", "data=text", "data.path=none.txt"]
    environment = {**os.environ, "LMLAB_CACHE": str(tmp_path)}
    command = [sys.executable, "scripts/plan.py", *told]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1
    assert "tokenizer.kind=chars" in done.stderr

"""Decoding on a GPU, with CUDA graphs: ids against transformers' generate, and what is left behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tests.parity.tiny import VOCAB, random_model, transformers_greedy

from lmlab.generation import graphs
from lmlab.generation.decode import generate
from lmlab.generation.samplers import GreedySampler, TopPTemperatureSampler
from lmlab.models.decoding import ready_to_decode
from lmlab.models.quantize import FourBit
from lmlab.registry import samplers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parity,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEW = 24
TIE = 1e-3
"""As in the CPU test, but kernels on a GPU differ more between shapes."""
PROMPTS = [
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (4, 11, 2, 17, 11, 7)
]
SAMPLER = GreedySampler(kind="greedy", max_new_tokens=NEW)


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    """TF32 rounds to 10 bits, and differently in each kernel."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    graphs._say_once.cache_clear()
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def build(name: str) -> Any:
    model = random_model(name).eval().cuda()
    model.set_attn_implementation("sdpa")
    return model


def reference(model: Any) -> tuple[list[list[int]], list[int]]:
    """transformers' ids, and per row the first step whose two best logits are tied."""
    ids, logits = transformers_greedy(model, PROMPTS, max_new_tokens=NEW)
    best = logits.topk(2, dim=-1).values
    tied = ((best[..., 0] - best[..., 1]) / logits.abs().amax() < TIE).tolist()
    clear = [row.index(True) if True in row else NEW for row in tied]
    return ids, clear


def assert_same_ids(model: Any, eos: list[int]) -> None:
    expected, clear = reference(model)
    with ready_to_decode(model, compute_dtype=torch.float32, num_steps=NEW):
        rows = generate(model, PROMPTS, sampler=SAMPLER, eos_token_ids=eos, seeds=range(len(PROMPTS)))
    # A capture that fails must not leave its own stream as the current one.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for row, ids, stop in zip(rows, expected, clear, strict=True):
        end = next((step for step, token in enumerate(ids) if token in eos), NEW)
        assert row.token_ids[: min(stop, end)] == ids[: min(stop, end)]
        if end < stop:
            assert row.token_ids == ids[:end]
    assert sum(clear) >= 0.5 * NEW * len(PROMPTS)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo3", "phi", "opt"]
)
def test_against_transformers_greedy_with_graphs(name: str, capsys: Any) -> None:
    model = build(name)
    assert_same_ids(model, [])
    assert "without CUDA graphs" not in capsys.readouterr().err
    expected, _ = reference(model)
    assert_same_ids(
        model, sorted({expected[0][4], expected[3][10]})
    )  # rows end in the middle, graphs are recorded anew


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mixtral", "lfm2", "mamba"])
def test_what_cannot_be_captured_decodes_without(name: str) -> None:
    changes: dict[str, Any] = {"layer_types": ["conv", "full_attention"]} if name == "lfm2" else {}
    model = random_model(name, **changes)
    assert_same_ids(model.eval().cuda(), [])


@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "nf4"])
def test_with_an_adapter_and_over_nf4(quantized: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    if quantized:
        FourBit(kind="nf4", double_quant=True).apply(model, compute_dtype=torch.float32)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    assert_same_ids(adapted.eval(), [])


OFF: dict[str, Any] = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p"))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "min_p", "min_p": 0.1, "temperature": 1.2},
        {"kind": "typical", "typical_p": 0.6, "temperature": 1.0},
        {"kind": "combined", **OFF, "temperature": 0.9, "top_k": 20, "top_p": 0.9},
        {"kind": "greedy", "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"kind": "temperature", "temperature": 1.0, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    ],
    ids=lambda settings: settings["kind"],
)
def test_against_the_cpu_samplers_and_constraints_with_graphs(settings: Any, capsys: Any) -> None:
    sampler = TypeAdapter(samplers.union()).validate_python({"max_new_tokens": NEW, **settings})
    model = random_model("llama", std=0.3).eval()
    model.set_attn_implementation("sdpa")
    seeds = range(len(PROMPTS))
    expected = generate(model, PROMPTS, sampler=sampler, eos_token_ids=(), seeds=seeds, entropy=True)
    model.cuda()
    with ready_to_decode(model, compute_dtype=torch.float32, num_steps=NEW):
        found = generate(model, PROMPTS, sampler=sampler, eos_token_ids=(), seeds=seeds, entropy=True)
    assert "without CUDA graphs" not in capsys.readouterr().err
    for row, other in zip(found, expected, strict=True):
        assert (
            row.token_ids == other.token_ids
        )  # one draw in some 10^4 lies within rounding of a token's edge
        assert row.mean_entropy == pytest.approx(other.mean_entropy, rel=1e-3)


class PinsMemory(threading.Thread):
    """What a loader does that makes the next batch meanwhile."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended, self.rounds = threading.Event(), 0

    def run(self) -> None:
        while not self.ended.is_set():
            batch = torch.ones(1000 + self.rounds, dtype=torch.int64).pin_memory()
            assert batch.to("cuda", non_blocking=True)[0] == 1
            self.rounds += 1


def test_a_thread_that_pins_memory_does_not_spoil_the_capture(capsys: Any) -> None:
    thread = PinsMemory()
    thread.start()
    try:
        for _ in range(3):
            assert_same_ids(build("llama"), [])
    finally:
        thread.ended.set()
        thread.join()
    assert thread.rounds > 3
    assert "without CUDA graphs" not in capsys.readouterr().err


def test_under_autocast_weights_and_random_state_stay_and_training_goes_on() -> None:
    model = build("llama").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    sampler = TopPTemperatureSampler(kind="top_p_temperature", temperature=1.0, top_p=0.9, max_new_tokens=NEW)
    with (
        torch.autocast("cuda", dtype=torch.bfloat16),
        ready_to_decode(model, compute_dtype=torch.bfloat16, num_steps=NEW),
    ):
        first, again = (
            generate(model, PROMPTS, sampler=sampler, eos_token_ids=(), seeds=range(len(PROMPTS)))
            for _ in range(2)
        )
    assert first == again
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    ids = torch.tensor([PROMPTS[3]]).cuda()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())

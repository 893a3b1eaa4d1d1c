"""Greedy ids, and the logits of every step, against transformers' ``generate``: every architecture, left-padded
prompts of mixed length, fp32. (The ids alone would say little: some random models repeat a token.)

Also with a LoRA adapter, over nf4, and with both; the reference then runs unmerged over the quantized base.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tests.parity.tiny import ACCEPTED, VOCAB, random_model, transformers_greedy

from lmlab.generation import decode
from lmlab.generation.cache import filled_cache
from lmlab.generation.decode import Generated, generate
from lmlab.generation.samplers import GreedySampler
from lmlab.models.decoding import ready_to_decode
from lmlab.models.quantize import FourBit

pytestmark = pytest.mark.parity

NEW = 10
TIE = 1e-4
"""Two tokens whose logits differ by less, relative to the largest, may swap: other matrix shapes round otherwise."""
PROMPTS = [
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (4, 11, 2, 17, 11, 7)
]
ROUNDING = 1e-4
"""Of logits, relative to the largest: sums over other shapes in fp32 (seen: up to 1e-5)."""
CHANGES: dict[str, dict[str, Any]] = {
    "ministral": {"head_dim": 16},
    "minicpm3": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
}
MORE = ("bloom", "falcon", "mpt", "gptj", "codegen", "gpt_neo", "stablelm", "llama4_text")
"""Refused for flat rows, but decoded all the same."""


def own(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Generated], torch.Tensor]:
    """What is written here, and the logits in the prompts' order."""
    steps, real = [], decode._Batch.logits

    def recorded(batch: Any) -> torch.Tensor:
        logits = real(batch)
        place = torch.tensor([row.index for row in batch.rows])
        steps.append(torch.empty_like(logits).index_copy_(0, place, logits))
        return logits

    monkeypatch.setattr(decode._Batch, "logits", recorded)
    sampler = GreedySampler(kind="greedy", max_new_tokens=NEW)
    rows = generate(model, PROMPTS, sampler=sampler, eos_token_ids=(), seeds=range(len(PROMPTS)))
    return rows, torch.stack(steps, dim=1)


def assert_same_ids(model: Any, *, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal up to the first tie of a row; nearly all tokens must have been compared."""
    if grouped:
        monkeypatch.setattr(decode, "_cost_of_one_more", lambda *args: 1)
    expected, logits = transformers_greedy(model, PROMPTS, max_new_tokens=NEW)
    with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64):
        found, own_logits = own(model, monkeypatch)
    scale, compared = logits.abs().max(), 0
    for index, row in enumerate(found):
        best = logits[index].topk(2, dim=-1).values
        gaps = ((best[:, 0] - best[:, 1]) / scale).tolist()
        clear = next((step for step, gap in enumerate(gaps) if gap < TIE), NEW)
        assert row.token_ids[:clear] == expected[index][:clear]
        assert (own_logits[index, :clear] - logits[index, :clear]).abs().max() < ROUNDING * scale
        compared += clear
    assert compared >= 0.8 * NEW * len(PROMPTS)


def build(name: str) -> Any:
    return random_model(name, **CHANGES.get(name, {})).eval()


FAST = ("llama", "gpt2", "gemma2", "qwen3", "mistral", "gpt_oss")
EVERY: list[Any] = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in (*ACCEPTED, *MORE)]


@pytest.mark.parametrize("grouped", [False, True], ids=["one-prefill", "grouped-prefill"])
@pytest.mark.parametrize("name", EVERY)
def test_against_transformers_greedy_ids(name: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_ids(build(name), grouped=grouped, monkeypatch=monkeypatch)


@pytest.mark.parametrize("name", [p for p in EVERY if str(getattr(p, "values", (p,))[0]) in ACCEPTED])
def test_the_accepted_architectures_decode_over_preallocated_keys(name: str) -> None:
    assert filled_cache(build(name), num_rows=1, columns=8) is not None


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "mixtral"])
@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "lora"])
def test_against_transformers_over_quantized_and_adapted_bases(
    name: str, quantized: bool, with_adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    if quantized:
        FourBit(kind="nf4", double_quant=True).apply(model, compute_dtype=torch.float32)
    if with_adapter:
        from peft import LoraConfig, get_peft_model

        targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(1)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.eval()
    assert_same_ids(model, grouped=True, monkeypatch=monkeypatch)


def test_lengths_that_change_the_angles_are_read_in_one_piece() -> None:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = hf.LlamaConfig(**shape, intermediate_size=32, rope_parameters=rope)
    assert decode._cost_of_one_more(hf.LlamaForCausalLM(config), torch.device("cpu")) > 1 << 30


@pytest.mark.parametrize(
    ("lengths", "one_more", "groups"),
    [
        ([10, 10, 10], 1, [(0, 3)]),
        ([100, 10, 10], 20, [(0, 1), (1, 3)]),
        ([100, 10, 10], 1000, [(0, 3)]),
        ([100, 99, 50, 49, 5], 30, [(0, 2), (2, 4), (4, 5)]),
        ([7], 5, [(0, 1)]),
    ],
)
def test_prompts_are_grouped_where_the_padding_saved_is_worth_a_pass(
    lengths: list[int], one_more: int, groups: list[tuple[int, int]]
) -> None:
    assert [(g.start, g.stop) for g in decode.prefill_groups(lengths, one_more=one_more)] == groups

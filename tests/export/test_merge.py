"""Folding adapters into their base: the same logits over every storage and for every kind, nothing of PEFT left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lmlab.models.lora import use_fused_lora
from lmlab.models.merge import merged
from lmlab.models.quantize import quants
from lmlab.models.vocabulary import use_token_rows
from lmlab.records import UserError
from tests.parity.tiny import documents, random_model, relative

pytestmark = pytest.mark.parity
RELATIVE = 1e-5
"""fp32 sums in another order: sqrt(96) 2^-24 a product, some twenty of them in a row; measured: 2e-6."""
IDS = documents([20])[0].input_ids[None]
ALL: dict[str, Any] = {"target_modules": "all-linear"}
TIED = {"tie_word_embeddings": True}
ROWS = [90, 91]


def stored(model: Any, kind: str | None) -> Any:
    if kind is not None:
        values = {"kind": kind} | ({"double_quant": True} if kind in ("nf4", "fp4") else {})
        config: Any = quants.class_of(kind).model_validate(values)
        config.apply(model, compute_dtype=torch.float32)
    return model


def adapted(base: Any, **config: Any) -> Any:
    """``base`` with an adapter that changes much."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **config))
    use_token_rows(model)
    use_fused_lora(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def foreign(model: torch.nn.Module) -> set[str]:
    """Packages other than torch and transformers that a part of the model comes from."""
    return {type(module).__module__.split(".")[0] for module in model.modules()} - {"torch", "transformers"}


CASES: dict[str, tuple[str, str | None, dict[str, Any], dict[str, Any]]] = {
    **{
        f"lora-{kind}": ("llama", kind, {}, ALL)
        for kind in (None, "fp16", "bf16", "int8", "int4", "nf4", "fp4")
    },
    **{f"conv1d-{kind}": ("gpt2", kind, {}, ALL) for kind in (None, "fp16", "nf4")},
    "rslora": ("llama", None, {}, ALL | {"use_rslora": True}),
    "dora": ("llama", None, {}, ALL | {"use_dora": True}),
    "dora-nf4": ("llama", "nf4", {}, ALL | {"use_dora": True}),
    "dora-conv1d-fp16": ("gpt2", "fp16", {}, ALL | {"use_dora": True}),
    "dora-embedding": ("llama", None, {}, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "bias-on-b": ("gpt2", None, {}, {"target_modules": ["c_attn"], "lora_bias": True}),
    "token-rows-tied": ("llama", None, TIED, ALL | {"trainable_token_indices": ROWS}),
    "token-rows": (
        "llama",
        "nf4",
        {},
        ALL | {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}},
    ),
    "whole-modules": ("llama", "int8", {}, ALL | {"modules_to_save": ["lm_head", "norm"]}),
    "moe-router": ("mixtral", None, {}, ALL),
    "moe-experts": (
        "qwen3_moe",
        None,
        {},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_computes_what_the_adapter_does(case: str) -> None:
    architecture, storage, changes, config = CASES[case]
    model = adapted(stored(random_model(architecture, **changes).eval(), storage), **config)
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert relative(base, expected) > 0.1, "the adapter of this case changes little"
    plain = merged(model)
    assert relative(logits(plain), expected) < RELATIVE
    assert torch.equal(logits(model), expected), "the model given has changed"
    assert foreign(plain) == set()
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert not hasattr(plain.config, "quantization_config")


@pytest.mark.parametrize(
    ("config", "stays"),
    [
        (ALL, True),
        (ALL | {"trainable_token_indices": ROWS}, True),
        ({"target_modules": ["lm_head", "q_proj"]}, False),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        (ALL | {"modules_to_save": ["embed_tokens"]}, False),
    ],
    ids=["linear", "token-rows", "head", "embedding", "whole-embedding"],
)
def test_a_tied_head_stays_tied_only_while_it_is_the_embedding(
    config: dict[str, Any], stays: bool, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(random_model("llama", **TIED).eval(), **config)
    expected = logits(model)
    plain: Any = merged(model)
    assert plain.config.tie_word_embeddings == stays
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == stays
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert relative(logits(again), expected) < RELATIVE


@pytest.mark.parametrize("config", [ALL, ALL | {"use_dora": True}], ids=["lora", "dora"])
def test_against_peft_weights(config: dict[str, Any]) -> None:
    model = adapted(random_model("llama").eval(), **config)
    ours = merged(model).state_dict()
    theirs = copy.deepcopy(model).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, rtol=0, atol=2e-7), (
            name
        )  # a sum's rounding at weights around 1


def test_only_active_adapters_by_their_scale() -> None:
    from peft.tuners.lora import LoraLayer

    model = adapted(random_model("llama").eval(), **ALL)
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2, **ALL))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.fill_(0.03)
    alone = logits(model)
    assert relative(logits(merged(model)), alone) < RELATIVE
    model.base_model.set_adapter(["default", "other"])
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("other", 0.5)
    both = logits(model)
    assert relative(both, alone) > 1e-3
    assert relative(logits(merged(model)), both) < RELATIVE
    with model.disable_adapter():
        assert relative(logits(merged(model)), logits(model)) < RELATIVE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_one_rounding_of_the_fp32_merge(dtype: torch.dtype) -> None:
    model = adapted(stored(random_model("llama").eval(), "nf4"), **ALL)
    rounded, exact = merged(model, dtype=dtype).state_dict(), merged(model).state_dict()
    assert all(torch.equal(rounded[name], exact[name].to(dtype)) for name in exact)


def test_a_model_without_adapter_is_dequantized() -> None:
    model = stored(random_model("gpt2").eval(), "nf4")
    plain = merged(model)
    assert relative(logits(plain), logits(model)) < RELATIVE
    assert foreign(plain) == set()


def test_what_has_no_merged_form_is_refused() -> None:
    model = adapted(random_model("llama").eval(), target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UserError, match="a bias where its base has none"):
        merged(model)

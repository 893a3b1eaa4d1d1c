"""Combined adapters against the weighted sum of updates in fp64: which method is exact, and for what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lmlab.models.adapter_files import using_adapter
from lmlab.models.adapters import Lora
from lmlab.models.combine import combine_adapters
from lmlab.models.lora import use_fused_lora
from lmlab.models.quantize import quants
from lmlab.models.vocabulary import use_token_rows
from lmlab.records import UserError

ROUNDING = 1e-6  # A is rounded to fp32 once, after its weight and scale
IDS = torch.tensor([[1, 5, 9, 30, 31, 2]])


def base(model_type: str = "llama", **changes: Any) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    shape |= {"intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": False, **changes}
    if model_type == "gpt2":
        shape = {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)).eval()


def adapted(*configs: dict[str, Any], model: Any = None) -> Any:
    """PEFT's model with adapters a, b, c ... of these settings, all of their weights drawn."""
    found: Any = None
    for name, changes in zip("abcd", configs, strict=False):
        values: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        }
        config = LoraConfig(**(values | changes))
        if found is None:
            found = get_peft_model(model if model is not None else base(), config, adapter_name=name)
        else:
            found.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    use_fused_lora(found)
    use_token_rows(found)
    return found.eval()


def update(layer: Any, name: str, *, scale: float) -> torch.Tensor:
    return scale * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()


def logits(model: Any, name: str | None) -> torch.Tensor:
    with torch.no_grad(), using_adapter(model, name):
        return model(IDS).logits


DIFFERENT = (
    {},
    {"r": 6, "use_rslora": True},
    {"target_modules": ["q_proj", "up_proj"], "r": 2, "layers_to_transform": [1]},
    {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 11}},
)
WEIGHTS = {"a": 0.5, "b": -1.25, "c": 2.0, "d": 0.1}


def test_side_by_side_is_the_exact_sum_of_whatever_there_is() -> None:
    model = adapted(*DIFFERENT)
    combined = combine_adapters(model, WEIGHTS, name="sum")
    assert combined.rank == 4 + 6 + 2 + 4
    assert combined.relative_error < ROUNDING
    scales = {"a": 6 / 4, "b": 6 / 6**0.5, "c": 6 / 2, "d": 6 / 4}  # by hand: not what the layers say
    for path, own in (("layers.0.self_attn.q_proj", {"d": 11 / 4}), ("layers.1.mlp.down_proj", {"d": 6 / 3})):
        layer = model.get_base_model().model.get_submodule(path)
        there = [name for name in WEIGHTS if name in layer.r]
        assert ("c" in there) == (path == "layers.1.mlp.up_proj")
        exact: Any = sum(WEIGHTS[name] * update(layer, name, scale=(scales | own)[name]) for name in there)
        found = (
            layer.scaling["sum"] * layer.lora_B["sum"].weight.double() @ layer.lora_A["sum"].weight.double()
        )
        assert (found - exact).norm() / exact.norm() < ROUNDING
    assert model.active_adapters == ["a"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_svd_is_exact_from_the_sums_own_rank_on(model_type: str) -> None:
    for rank, exact in ((10, True), (9, False), (None, False)):
        model = adapted({}, {"r": 6, "use_rslora": True}, model=base(model_type))
        combined = combine_adapters(model, {"a": 0.5, "b": 0.7}, name="sum", method="svd", rank=rank)
        assert combined.rank == (rank or 6)
        assert (combined.relative_error < 1e-5) == exact  # fp32 singular values
        assert combined.relative_error < 0.8


def test_linear_is_the_sum_for_one_adapter_only() -> None:
    model = adapted({}, {"use_rslora": True})
    assert combine_adapters(model, {"b": -0.5}, name="scaled", method="linear").relative_error < ROUNDING
    rough = combine_adapters(model, {"a": 0.5, "b": 0.5}, name="sum", method="linear")
    assert rough.rank == 4
    assert 0.1 < rough.relative_error < 2  # products of different adapters' parts come in


def test_it_computes_what_it_says_and_leaves_the_others_alone() -> None:
    model = adapted(*DIFFERENT[:2])
    before = {name: logits(model, name) for name in ("a", "b", None)}
    combine_adapters(model, {"a": 1.0, "b": 1.0}, name="both")
    for name, expected in before.items():
        assert torch.equal(logits(model, name), expected)
    by_hand = base()
    for path, target in by_hand.named_modules():
        if isinstance(target, torch.nn.Linear) and path != "lm_head":
            layer = model.get_base_model().get_submodule(path)
            target.weight.data += (
                update(layer, "a", scale=1.5) + update(layer, "b", scale=6 / 6**0.5)
            ).float()
    with torch.no_grad():
        expected = by_hand(IDS).logits
    assert (logits(model, "both") - expected).abs().max() / expected.abs().max() < 1e-5
    assert model.peft_config["b"].use_rslora
    assert not model.peft_config["both"].use_rslora


@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4"])
def test_it_is_as_exact_over_a_stored_base(kind: str) -> None:
    values = {"kind": kind, **({"double_quant": True} if kind == "nf4" else {})}
    quant: Any = quants.class_of(kind).model_validate(values)
    stored = base()
    quant.apply(stored, compute_dtype=torch.float32)
    model = adapted(*DIFFERENT[:2], model=stored)
    assert combine_adapters(model, {"a": 0.3, "b": 1.7}, name="sum").relative_error < ROUNDING
    assert model.get_base_model().model.layers[0].mlp.up_proj.lora_A["sum"].weight.dtype == torch.float32
    assert logits(model, "sum").isfinite().all()


def test_embeddings_have_updates_too() -> None:
    settings = {"target_modules": ["embed_tokens", "q_proj"]}
    model = adapted(settings, {**settings, "r": 3})
    assert combine_adapters(model, {"a": 0.5, "b": 2.0}, name="sum").relative_error < ROUNDING
    assert not torch.equal(logits(model, "sum"), logits(model, "a"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_added_tokens_are_meant_by_weight(tied: bool) -> None:
    where = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    rows = {"a": [30, 31], "b": [31]}
    model = adapted(
        *({"trainable_token_indices": {path: rows[name] for path in where}} for name in rows),
        model=base(tie_word_embeddings=tied),
    )
    assert combine_adapters(model, {"a": 1.0, "b": 3.0}, name="sum").relative_error < ROUNDING
    for path in where:
        delta = model.get_base_model().get_submodule(path).token_adapter.trainable_tokens_delta
        assert torch.equal(delta["sum"][0], delta["a"][0])
        assert torch.allclose(delta["sum"][1], 0.25 * delta["a"][1] + 0.75 * delta["b"][0])
    assert not torch.equal(logits(model, "sum"), logits(model, "a"))
    with pytest.raises(UserError, match="add up to 0"):
        combine_adapters(model, {"a": 1.0, "b": -1.0}, name="none")


def test_rows_follow_the_adapter_in_force() -> None:
    """Several adapters with rows of their own, over one base."""
    model = adapted(
        {"trainable_token_indices": {"model.embed_tokens": [30, 31]}},
        {"trainable_token_indices": {"model.embed_tokens": [5]}},
        {},
    )
    delta = model.get_base_model().model.embed_tokens.token_adapter.trainable_tokens_delta
    embed = model.get_base_model().model.embed_tokens
    plain = base().model.embed_tokens
    with torch.no_grad():
        for name, own in (
            ("b", {5: delta["b"][0]}),
            ("a", {30: delta["a"][0], 31: delta["a"][1]}),
            ("c", {}),
            (None, {}),
        ):
            with using_adapter(model, name):
                found = embed(IDS)[0]
            for position, token in enumerate(IDS[0].tolist()):
                assert torch.equal(found[position], own.get(token, plain.weight[token])), (name, token)


@pytest.mark.parametrize(
    ("configs", "options", "says"),
    [
        (({"use_dora": True}, {}), {}, "has DoRA"),
        (({"modules_to_save": ["lm_head"]}, {}), {}, "modules trained whole (lm_head)"),
        (({"lora_bias": True}, {}), {}, "has biases"),
        (({"r": 2}, {}), {"method": "linear"}, "ranks 2, 4"),
        (({}, {}), {"method": "svd", "rank": 33}, "rank 32 at most"),
        (({}, {}), {"rank": 5}, "rank of its own"),
        (({}, {}), {"method": "ties"}, "one of cat, svd, linear"),
        (({}, {}), {"weights": {"a": 1.0, "x": 1.0}}, "no adapter 'x'"),
        (({}, {}), {"weights": {}}, "nothing to combine"),
        (({}, {}), {"name": "b"}, "cannot name"),
        (({}, {}), {"name": "lm_head"}, "cannot name"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_has_no_sum(configs: Any, options: dict[str, Any], says: str) -> None:
    model = adapted(*configs)
    told: dict[str, Any] = {"weights": {"a": 0.5, "b": 0.5}, "name": "sum", **options}
    with pytest.raises(UserError) as caught:
        combine_adapters(model, told.pop("weights"), **told)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(model.peft_config) == ["a", "b"]


def test_a_switch_gives_back_what_was_trained() -> None:
    config = {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": "all-linear"}
    model = Lora.model_validate({**config, "modules_to_save": ["lm_head"]}).apply(base(), seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name in (None, "default"):
        with using_adapter(model, name):
            pass
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained

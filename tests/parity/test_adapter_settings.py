"""Every setting of `Lora` against PEFT told the same by its own keys: the same weights trained, the same loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from test_quantize_bitsandbytes import ALL, label, quantized
from tiny import distance, documents, flat, padded, random_model, relative

from lmlab.models.adapters import Lora, count_parameters
from lmlab.models.attention import use_packed_attention
from lmlab.models.build import enable_checkpointing
from lmlab.models.head import loss_sum, supervised_logits
from lmlab.models.quantize import dense_weight
from lmlab.models.targets import tied_paths
from lmlab.models.whole import TrainedLinear
from lmlab.records import UserError

pytestmark = pytest.mark.parity
RELATIVE = 1e-5  # fp32 sums in another order
NONE, BF16, INT8, NF4 = ALL[0], ALL[2], ALL[3], ALL[4]


def lora(**changes: Any) -> Lora:
    values = {"kind": "lora", "rank": 4, "alpha": 6.0, "dropout": 0.0, "target_modules": "all-linear"}
    return Lora.model_validate(values | changes)


def pefts(base: Any, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6.0,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(**(values | changes)))


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def move(model: Any, *, seed: int = 7) -> Any:
    """Every trained weight moved, so that no product is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(trained(model).items()):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model


def step(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradients of the trained weights by the order of their names)."""
    loss = loss_sum(model, padded(documents()))
    loss.backward()
    grads = [p.grad.flatten() for _, p in sorted(trained(model).items()) if p.grad is not None]
    model.zero_grad()
    return loss.detach(), torch.cat(grads)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora+rslora": ({"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
    "gaussian": ({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "names": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "one name": ({"target_modules": "q_proj"}, {"target_modules": ["q_proj"]}),
    "expression": (
        {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
        {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    ),
    "embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["lm_head", "q_proj"]}),
    "exclude": ({"exclude_modules": ["down_proj"]}, {"exclude_modules": ["down_proj"]}),
    "exclude by expression": ({"exclude_modules": r".*\.0\..*"}, {"exclude_modules": r".*\.0\..*"}),
    "layers": (
        {"target_modules": ["q_proj", "up_proj"], "layers": [1]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "last layer": (
        {"layers": [-1], "exclude_modules": ["o_proj"]},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": [1],
        },
    ),
    "whole head": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    "whole norm and embedding": (
        {"modules_to_save": ["model.norm", "embed_tokens"]},
        {"modules_to_save": ["model.norm", "embed_tokens"]},
    ),
    "whole mlp": ({"modules_to_save": ["layers.0.mlp"]}, {"modules_to_save": ["layers.0.mlp"]}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_against_peft_settings(name: str) -> None:
    own, told = SETTINGS[name]
    ours, theirs = lora(**own).apply(random_model("llama"), seed=0), pefts(random_model("llama"), **told)
    mine, reference = trained(ours), trained(theirs)
    assert mine.keys() == reference.keys()
    if "all-linear" in (own.get("target_modules", "all-linear"), *told.values()):
        for key, weight in mine.items():
            assert torch.equal(weight, reference[key]), key  # the same draws
    else:
        theirs.load_state_dict(ours.state_dict())
    move(ours)
    move(theirs)
    (loss, grads), (expected, reference_grads) = step(ours), step(theirs)
    assert relative(loss, expected) < RELATIVE
    assert distance(grads, reference_grads) < RELATIVE


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("storage", [NONE, BF16, NF4], ids=label)
def test_against_peft_dora_over_storages(storage: dict[str, Any], dropout: float) -> None:
    ours = lora(dora=True, dropout=dropout).apply(quantized(random_model("llama"), storage), seed=0)
    theirs = pefts(quantized(random_model("llama"), storage), use_dora=True, lora_dropout=dropout)
    move(ours)
    for key, weight in trained(theirs).items():
        weight.data.copy_(trained(ours)[key])
    found = []
    for model in (ours, theirs):
        torch.manual_seed(5)  # the same masks
        found.append(step(model.train()))
    assert relative(found[0][0], found[1][0]) < RELATIVE
    assert distance(found[0][1], found[1][1]) < RELATIVE


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("storage", ALL, ids=label)
def test_against_dora_by_hand(storage: dict[str, Any], model_type: str) -> None:
    """m V / ||V|| with V = W + scale B A, the norm a constant (arXiv 2402.09353, equation 5 and section 4.3), in fp64."""
    model = move(lora(dora=True).apply(quantized(random_model(model_type), storage), seed=0)).eval()
    path = "model.layers.0.mlp.down_proj" if model_type == "llama" else "transformer.h.0.mlp.c_proj"
    layer = model.get_base_model().get_submodule(path)
    width = layer.in_features
    x = torch.randn(3, width, requires_grad=True)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    magnitude = layer.lora_magnitude_vector["default"].weight
    out = layer(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *weights, magnitude])
    exact = [t.detach().double().requires_grad_() for t in (x, *weights, magnitude)]
    base = layer.get_base_layer()
    v = dense_weight(base, torch.float32).double() + 6 / 4 * exact[2] @ exact[1]
    whole = (exact[3] / v.detach().norm(dim=1))[:, None] * v
    bias = None if base.bias is None else base.bias.double()
    expected = F.linear(exact[0], whole, bias)
    assert relative(out.double(), expected) < RELATIVE
    for found, by_hand in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert relative(found.double(), by_hand) < 10 * RELATIVE


@pytest.mark.parametrize(
    "settings", [{"dora": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}], ids=str
)
@pytest.mark.parametrize("storage", ALL, ids=label)
def test_at_init_it_is_the_base(storage: dict[str, Any], settings: dict[str, Any]) -> None:
    base = quantized(random_model("llama"), storage).eval()
    ids = documents([20])[0].input_ids[None]
    with torch.no_grad():
        expected = base(ids).logits
        model = lora(**settings).apply(base, seed=0).eval()
        found = model(ids).logits
    assert relative(found, expected) < (1e-6 if "dora" in settings else 1e-30) or torch.equal(found, expected)
    assert all(p.dtype == torch.float32 for p in trained(model).values())


@pytest.mark.parametrize("settings", [{"dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("storage", [NONE, BF16, INT8, NF4], ids=label)
def test_packed_rows_and_checkpointing_change_nothing(
    storage: dict[str, Any], settings: dict[str, Any]
) -> None:
    found = []
    for packed in (False, True):
        base = random_model("llama")
        if packed:
            enable_checkpointing(base)
        model = move(lora(**settings).apply(quantized(base, storage), seed=0)).train()
        if packed:
            use_packed_attention(model)
            loss = loss_sum(model, flat(documents()))
            loss.backward()
            grads = [p.grad.flatten() for _, p in sorted(trained(model).items()) if p.grad is not None]
            found.append((loss.detach(), torch.cat(grads)))
        else:
            found.append(step(model))
    assert relative(found[0][0], found[1][0]) < RELATIVE
    assert distance(found[0][1], found[1][1]) < RELATIVE


# --- a head tied to the embedding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [NONE, BF16], ids=label)
@pytest.mark.parametrize("named", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_a_tied_matrix_is_trained_once_and_stays_tied(
    storage: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    base = quantized(random_model("llama", tie_word_embeddings=True), storage)
    assert "one matrix" in lora(modules_to_save=named).remarks(base)[0]
    model = lora(modules_to_save=named).apply(base, seed=0).train()
    inner = model.get_base_model()
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    assert embedding.modules_to_save["default"].weight is head.modules_to_save["default"].weight
    low_rank = sum(p.numel() for n, p in trained(model).items() if "lora_" in n)
    assert count_parameters(model)[1] == low_rank + 97 * 64
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.01)
    before = embedding.modules_to_save["default"].weight.detach().clone()
    loss_sum(model, padded(documents())).backward()
    optimizer.step()
    assert not torch.equal(embedding.modules_to_save["default"].weight, before)
    ids = documents([20])[0].input_ids[None]
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids).logits
        again = random_model("llama", tie_word_embeddings=True)
        loaded = PeftModel.from_pretrained(quantized(again, NONE), str(tmp_path)).eval()
        if storage is NONE:
            assert relative(loaded(ids).logits, expected) < RELATIVE
    found: Any = loaded.get_base_model()
    assert (
        found.get_input_embeddings().modules_to_save["default"].weight
        is found.get_output_embeddings().modules_to_save["default"].weight
    )


def test_against_plain_training_of_a_tied_matrix() -> None:
    """Its gradient is the sum of the embedding's and the head's."""
    model = lora(modules_to_save=["lm_head"]).apply(random_model("llama", tie_word_embeddings=True), seed=0)
    loss_sum(model, padded(documents())).backward()
    plain = random_model("llama", tie_word_embeddings=True)
    loss_sum(plain, padded(documents())).backward()
    copied = model.get_base_model().get_input_embeddings().modules_to_save["default"]
    assert relative(copied.weight.grad, plain.get_input_embeddings().weight.grad) < RELATIVE


def test_the_head_trained_over_a_base_wholly_in_bf16() -> None:
    """As on a GPU without autocast: fp32 weights and gradients, products in bf16."""
    exact = lora(modules_to_save=["lm_head"]).apply(random_model("llama"), seed=0)
    loss_sum(exact, padded(documents())).backward()
    expected = exact.get_base_model().get_output_embeddings().modules_to_save["default"].weight.grad
    base = random_model("llama").bfloat16()
    model = lora(modules_to_save=["lm_head", "model.norm"]).apply(base, seed=0)
    head = model.get_base_model().get_output_embeddings().modules_to_save["default"]
    assert type(head) is TrainedLinear
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    loss = loss_sum(model, padded(documents()))
    loss.backward()
    assert expected is not None
    assert head.weight.grad is not None
    assert distance(head.weight.grad, expected) < 0.1  # bf16 products
    with torch.no_grad():
        assert supervised_logits(model.eval(), padded(documents())).logits.isfinite().all()
        assert model(documents([5])[0].input_ids[None]).logits.dtype == torch.bfloat16


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_proj", "typo"]}, ["target_modules=typo matches no layer", "q_proj, k_proj"]),
        ({"target_modules": "nothing.*"}, ["matches no layer", "down_proj"]),
        ({"target_modules": "q_proj("}, ["is no regular expression"]),
        ({"exclude_modules": ["typo"]}, ["exclude_modules=typo"]),
        ({"exclude_modules": ".*"}, ["matches no layer that is left"]),
        (
            {"exclude_modules": r"layers\.0\..*"},
            ["exclude_modules=layers", "matches no layer", "whole paths"],
        ),
        (
            {"modules_to_save": ["q_proj"], "target_modules": ["q_proj"]},
            ["modules_to_save=[q_proj", "holds every layer of target_modules"],
        ),
        ({"modules_to_save": ["layers"]}, ["holds every layer"]),
        ({"layers": [0, 2]}, ["adapter.layers has 2", "2 layers", "0 to 1"]),
        ({"layers": [-3]}, ["adapter.layers has -3"]),
        ({"layers": [0], "target_modules": ["lm_head"]}, ["lm_head matches no layer"]),
        ({"modules_to_save": ["norms"]}, ["modules_to_save=norms matches no module"]),
        (
            {"modules_to_save": ["head"]},
            ["modules_to_save=head matches no module"],
        ),  # the end of a name is none
    ],
    ids=str,
)
@pytest.mark.parametrize("by_config", [True, False], ids=["before loading", "on the model"])
def test_names_that_mean_nothing(settings: dict[str, Any], says: list[str], by_config: bool) -> None:
    model, adapter = random_model("llama"), lora(**settings)
    with pytest.raises(UserError) as caught:
        adapter.check(model.config, storage="none") if by_config else adapter.apply(model, seed=0)
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in says), line


def test_targets_inside_what_is_trained_whole_get_no_update_and_that_is_said() -> None:
    model = random_model("llama")
    adapter = lora(target_modules=["q_proj", "down_proj"], modules_to_save=["down_proj"])
    assert adapter.remarks(model) == [
        "adapter.modules_to_save: 2 of 4 target layers are trained whole and get no update"
    ]
    names = trained(adapter.apply(model, seed=0))
    assert {"lora" if "lora_" in name else "whole" for name in names if "down_proj" in name} == {"whole"}
    assert sum("q_proj.lora_A" in name for name in names) == 2


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_packed_weights_are_not_trained_whole(kind: str) -> None:
    config = random_model("llama").config
    for name in ("q_proj", "layers.0.mlp"):
        with pytest.raises(UserError, match="packed weights cannot be trained"):
            lora(modules_to_save=[name]).check(config, storage=kind)
    lora(modules_to_save=["lm_head", "model.norm"]).check(config, storage=kind)
    lora(modules_to_save=["q_proj"], target_modules=["v_proj"]).check(config, storage="bf16")


def test_a_tie_that_peft_would_split() -> None:
    model = random_model("gpt_neox_japanese", tie_word_embeddings=True)
    assert tied_paths(model) == ("gpt_neox_japanese.embed_in", "embed_out")
    with pytest.raises(UserError, match="one matrix, which PEFT would split"):
        lora(modules_to_save=["embed_out"]).apply(model, seed=0)

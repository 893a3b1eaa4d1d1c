"""Figures of a layer's update against the update itself, formed: its norm, its singular values, its gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_lora_peft import peft_model, step
from test_quantize_bitsandbytes import ALL, label, quantized
from tiny import documents, flat, random_model

from lmlab.models.attention import use_packed_attention
from lmlab.models.head import loss_sum
from lmlab.models.layers import LayerFigures, TrackedLayers, averages, effective_rank, product_spectrum
from lmlab.models.lora import use_fused_lora
from lmlab.models.quantize import dense_weight

pytestmark = pytest.mark.parity
RELATIVE = 1e-5  # against fp32 products; the figures themselves are made in double


def entropy_rank(singular_values: torch.Tensor) -> float:
    """Roy and Vetterli's definition, term by term."""
    shares = [value / float(singular_values.sum()) for value in singular_values.tolist() if value > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


def adapted(model_type: str = "llama", storage: dict[str, Any] | None = None, **changes: Any) -> Any:
    model = peft_model(quantized(random_model(model_type), storage or ALL[0]), **changes).train()
    use_packed_attention(model)
    use_fused_lora(model)
    return model


def lora_layers(model: Any) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
    }


def assert_figures(model: Any, figures: list[LayerFigures]) -> None:
    """Every layer's figures against PEFT's own product ``scale * B A``."""
    layers = lora_layers(model)
    assert [row.layer for row in figures] == list(layers)
    for row in figures:
        layer = layers[row.layer]
        delta = layer.get_delta_weight("default").detach()
        weight = dense_weight(layer.get_base_layer(), torch.float32)
        ratio = (torch.linalg.matrix_norm(delta) / torch.linalg.matrix_norm(weight)).item()
        assert row.update_ratio == pytest.approx(ratio, rel=RELATIVE)
        spectrum = torch.linalg.svdvals(delta.double())
        # What fp32 made of exact zeros in PEFT's product counts for nothing.
        expected = entropy_rank(spectrum[spectrum > 1e-6 * spectrum[0]]) if ratio else 0.0
        assert row.effective_rank == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(40, 30), (6, 90), (90, 6)])
def test_against_svd_of_the_product(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    b = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    a[-1] = 2 * a[0]  # one direction less
    found = product_spectrum(b.T @ b, a @ a.T)
    expected = torch.linalg.svdvals(b @ a)[:rank]
    padded = torch.zeros(rank, dtype=torch.float64)
    padded[: len(expected)] = expected
    assert torch.allclose(found.flip(0), padded, rtol=1e-6, atol=1e-6 * float(expected[0]))
    assert found.norm().item() == pytest.approx(torch.linalg.matrix_norm(b @ a).item(), rel=1e-12)
    kept = expected[expected > 1e-9 * expected[0]]
    assert effective_rank(found).item() == pytest.approx(entropy_rank(kept), rel=1e-5)


def test_effective_rank_of_known_spectra() -> None:
    spectra = torch.tensor([[2.0, 2.0, 2.0, 2.0], [5.0, 0, 0, 0], [0.0, 0, 0, 0], [3.0, 1.0, 0, 0]])
    half = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(spectra).tolist() == pytest.approx([4.0, 1.0, 0.0, half])


@pytest.mark.parametrize("storage", ALL, ids=label)
def test_against_peft_random_adapters_over_every_storage(storage: dict[str, Any]) -> None:
    model = adapted(storage=storage)
    assert_figures(model, TrackedLayers(model).read())


@pytest.mark.parametrize(
    "changes",
    [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, {"r": 1}],
    ids=lambda c: next(iter(c)),
)
def test_against_peft_scalings_and_ranks(changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    assert_figures(model, TrackedLayers(model).read())


def test_against_peft_gpt2_whose_weights_are_transposed() -> None:
    model = adapted("gpt2")
    assert_figures(model, TrackedLayers(model).read())


def test_a_fresh_adapter_has_moved_nothing_and_a_trained_one_has() -> None:
    model = adapted(init_lora_weights=True)
    layers = TrackedLayers(model)
    assert len(layers) == 14
    for row in layers.read():
        assert (row.update_ratio, row.effective_rank, row.grad_norm) == (0.0, 0.0, None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(4):
        loss_sum(model, flat(documents(seed=seed))).backward()
        optimizer.step()
        optimizer.zero_grad()
    figures = layers.read()
    assert_figures(model, figures)
    assert all(row.update_ratio and 1 <= (row.effective_rank or 0) <= 4 for row in figures)


def test_gradient_norms_are_those_of_both_matrices_and_scaled_back() -> None:
    model = adapted()
    layers = TrackedLayers(model)
    loss_sum(model, flat(documents())).backward()
    figures = layers.read(grad_scale=3.0)
    for row in figures:
        layer = lora_layers(model)[row.layer]
        both = torch.cat(
            [layer.lora_A["default"].weight.grad.flatten(), layer.lora_B["default"].weight.grad.flatten()]
        )
        assert row.grad_norm == pytest.approx(3 * both.norm().item(), rel=RELATIVE)
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert math.hypot(*(row.grad_norm or 0.0 for row in figures)) == pytest.approx(3 * whole, rel=RELATIVE)


def test_what_is_not_plain_lora_is_left_out() -> None:
    assert len(TrackedLayers(adapted(use_dora=True))) == 0
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert len(TrackedLayers(model)) == 0


def test_a_broken_layer_is_nan_and_the_others_are_not() -> None:
    model = adapted()
    layers = TrackedLayers(model)
    good = layers.read()
    name, layer = next(iter(lora_layers(model).items()))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = math.inf
    found = layers.read()
    assert found[0].layer == name
    assert math.isnan(found[0].update_ratio or 0.0)
    assert math.isnan(found[0].effective_rank or 0.0)
    assert found[1:] == good[1:]
    assert math.isnan(averages(found)["layers/update_ratio"])


def test_reading_changes_nothing() -> None:
    models = [adapted(lora_dropout=0.3), adapted(lora_dropout=0.3)]
    state = torch.get_rng_state()
    layers = TrackedLayers(models[0])
    layers.read()
    assert torch.equal(torch.get_rng_state(), state)
    (loss, grads), (other, expected) = step(models[0]), step(models[1])
    assert loss == other
    assert torch.equal(grads, expected)


# --- full fine-tuning -----------------------------------------------------------------------------------------------


def full_layers(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


@pytest.mark.parametrize("directions", [1, 5, 300])
def test_a_full_update_to_within_its_sketch(directions: int) -> None:
    """Layers of up to 64 outputs exactly, larger ones to 3 standard deviations of the worst case, and less for full rank."""
    model = random_model("llama", hidden_size=64, intermediate_size=300)
    before = {name: module.weight.detach().clone() for name, module in full_layers(model).items()}
    state = torch.get_rng_state()
    layers = TrackedLayers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {row.update_ratio for row in layers.read()} == {0.0}
    generator = torch.Generator().manual_seed(directions)
    with torch.no_grad():
        for module in full_layers(model).values():
            out, width = module.weight.shape
            up = torch.randn(out, directions, generator=generator)
            module.weight += 1e-3 * up @ torch.randn(directions, width, generator=generator)
    worst = 3 * math.sqrt(2 / 64) / 2
    found = layers.read()
    assert [row.layer for row in found] == list(before)
    for row in found:
        weight = full_layers(model)[row.layer].weight.detach()
        exact = ((weight - before[row.layer]).norm() / before[row.layer].norm()).item()
        tolerance = 1e-4 if len(weight) <= 64 else worst if directions < 300 else worst / 3
        assert row.update_ratio == pytest.approx(exact, rel=tolerance)
        assert row.effective_rank is None


def test_full_gradients_and_the_head_is_left_out() -> None:
    model = random_model("llama")
    use_packed_attention(model)
    layers = TrackedLayers(model)
    loss_sum(model, flat(documents())).backward()
    for row in layers.read():
        expected = full_layers(model)[row.layer].weight.grad.norm().item()
        assert row.grad_norm == pytest.approx(expected, rel=RELATIVE)
    assert not any("lm_head" in row.layer for row in layers.read())


def test_a_weight_of_zeros_has_no_ratio() -> None:
    model = random_model("llama")
    with torch.no_grad():
        next(iter(full_layers(model).values())).weight.zero_()
    figures = TrackedLayers(model).read()
    assert [row.update_ratio for row in figures].count(None) == 1
    assert averages(figures)["layers/update_ratio"] == 0.0


def test_averages_leave_out_what_is_not_there() -> None:
    rows = [
        LayerFigures("a", 0.1, 2.0, 1.0),
        LayerFigures("b", 0.3, None, 3.0),
        LayerFigures("c", None, None, None),
    ]
    assert averages(rows) == {
        "layers/update_ratio": pytest.approx(0.2),
        "layers/effective_rank": 2.0,
        "layers/grad_norm_max": 3.0,
    }
    assert averages([]) == {}
    assert math.isnan(
        averages([LayerFigures("a", 0.0, 0.0, g) for g in (1.0, math.nan)])["layers/grad_norm_max"]
    )

"""Weights in shares (trainer.strategy=fsdp) over two real gloo ranks: the same training as on one device, through Lightning."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import (
    GATHERED,
    STEPS,
    Gradients,
    bring_up,
    distance,
    gathered_gradients,
    on_ranks,
    on_two_ranks,
    options,
    prepared_data,
    tiny_model,
    write_records,
)
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten_with_path

from lmlab.generation.decode import generate
from lmlab.generation.samplers import GreedySampler, TemperatureSampler
from lmlab.journal import RunDir
from lmlab.models.adapters import Lora
from lmlab.models.attention import attention
from lmlab.models.build import enable_checkpointing
from lmlab.models.fused import use_fused_layers
from lmlab.models.sharding import same_logits, shard_model, whole_weights
from lmlab.records import RunFailedError
from lmlab.training.checkpoint import Checkpoints, FolderCheckpointIO, verify_checkpoint
from lmlab.training.options import AdamW, CheckpointConfig

pytestmark = pytest.mark.slow
RELATIVE = 1e-5  # fp32, sums in another order
BF16 = 3e-2  # products and weights rounded to 8 bits; 4e-3 measured
CASES = [
    *(
        f"{adapter}{checkpointing}"
        for adapter in ("none", "lora")
        for checkpointing in ("", "-checkpointing")
    ),
    "lora-bf16-base",
    "none-bf16",
    "none-adamw",
]
CHANGED = ["none-adamw", "lora"]
"""Cases that go on under another number of devices."""
GREEDY = GreedySampler(kind="greedy", max_new_tokens=12)
DRAWN = TemperatureSampler(kind="temperature", temperature=1.0, max_new_tokens=12)
PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 9]


def built(case: str) -> Any:
    """The model of a case as lmlab builds it; B of its adapters is not zero, or A would have no gradient at first."""
    model: Any = tiny_model()
    if case == "lora-bf16-base":
        model = model.bfloat16()
    if "checkpointing" in case:
        enable_checkpointing(model)
    use_fused_layers(model)
    if case.startswith("lora"):
        adapter = Lora(kind="lora", rank=3, alpha=6.0, dropout=0.0, target_modules="all-linear")
        model = adapter.apply(model, seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=generator)
    model.train()
    return model


def fitted(
    case: str,
    records: Path,
    root: Path,
    *,
    ranks: int,
    resume: str | None = None,
    steps: int = 2 * STEPS,
    name: str | None = None,
) -> tuple[Any, Any]:
    """(module, trainer) after ``steps`` optimizer steps, whose checkpoint then lies in ``root``."""
    chosen = options(2, 4 // ranks, devices=ranks, strategy="fsdp" if ranks > 1 else "auto")
    told: dict[str, Any] = {"max_steps": steps, "precision": "bf16" if case == "none-bf16" else "fp32"}
    module, trainer, data = bring_up(built(case), prepared_data(records), chosen, root, **told)
    module.max_steps = 2 * STEPS
    if "adamw" in case:
        rest = {"warmup_steps": 0, "schedule": "constant", "min_lr_ratio": 0.1}
        module.optim = AdamW(name="adamw", lr=1e-2, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8, **rest)
    trainer.callbacks.append(  # without it micro-batches would be counted as they were cut before
        Checkpoints(
            RunDir(root / "run"),
            CheckpointConfig(every_n_steps=None, keep=1, on_error="raise"),
            save_weights=lambda folder, weights: None,
            max_steps=steps,
            val_every_n_steps=chosen.val_every_n_steps,
            pause=nullcontext,
        )
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(root / f"{name or case}-{ranks}-{steps}")
    return module, trainer


def updates(case: str, weights: dict[str, torch.Tensor]) -> Gradients:
    """What training added, of the trained parameters; far smaller than they are, so a stricter thing to compare."""
    start = {name: p for name, p in built(case).named_parameters() if p.requires_grad}
    return {name: weights[name] - start[name].detach() for name in start}


def decoded(model: Any) -> list[list[int]]:
    """Greedy continuations and drawn ones, under the attention that samples are made with."""
    found: list[list[int]] = []
    for sampler in (GREEDY, DRAWN):
        with attention(model, "sdpa"):
            rows = generate(model, PROMPTS, sampler=sampler, eos_token_ids={256}, seeds=[0, 1, 2])
        found += [row.token_ids for row in rows]
    return found


def sharded_cases(records: str, root: str) -> dict[str, Any]:
    """Runs on each of two ranks: every case, and what became of it."""
    found: dict[str, Any] = {}
    for case in CASES:
        module, trainer = fitted(case, Path(records), Path(root), ranks=2)
        model = module.model
        local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        found[case] = {
            "share": local / sum(p.numel() for p in model.parameters()),
            "norm": module.totals.grad_norm,
            "loss": module.totals.loss / module.totals.supervised,
            "weights": whole_weights(model, keep=trainer.is_global_zero, trained_only=True),
        }
        if case == "none":
            with same_logits(model):
                found["tokens"] = decoded(model)
    for case in CHANGED:
        three = Path(root) / f"{case}-1-{STEPS}"
        module, trainer = fitted(case, Path(records), Path(root), ranks=2, resume=str(three), name="resumed")
        weights = whole_weights(module.model, keep=trainer.is_global_zero, trained_only=True)
        found[f"{case} resumed"] = weights
        fitted(case, Path(records), Path(root), ranks=2, steps=STEPS)
    found["nonfinite"] = nonfinite(Path(records), Path(root))
    return found


def nonfinite(records: Path, root: Path) -> str:
    """What a gradient that is no number, on the second rank only, says on each."""
    model = built("none")
    chosen = options(2, 1, devices=2, strategy="fsdp")
    module, trainer, data = bring_up(model, prepared_data(records), chosen, root, max_steps=2)
    if int(os.environ["RANK"]) == 1:
        model.model.norm.register_full_backward_hook(lambda *told: (told[1][0] * float("nan"),))
    try:
        trainer.fit(module, data)
    except RunFailedError as error:
        return str(error)
    return "went on"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """Case -> what one process comes to; checkpoints of three steps and of six lie in the folder."""
    records = write_records(folder / "records.jsonl")
    found: dict[str, Any] = {}
    for case in CASES:
        module, _ = fitted(case, records, folder, ranks=1)
        found[case] = module
    for case in CHANGED:
        fitted(case, records, folder, ranks=1, steps=STEPS)
    return found


@pytest.fixture(scope="module")
def sharded(alone: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """By rank."""
    return on_two_ranks(sharded_cases, str(folder / "records.jsonl"), str(folder))


def trained(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_against_one_process_weights(alone: dict[str, Any], sharded: list[dict[str, Any]], case: str) -> None:
    tolerance = BF16 if "bf16" in case else RELATIVE
    expected = updates(case, trained(alone[case]))
    assert all(float(change.abs().max()) > 0 for change in expected.values()), "nothing was trained"
    assert distance(expected, updates(case, sharded[0][case]["weights"])) < tolerance
    assert sharded[1][case]["weights"] is None
    totals = alone[case].totals
    for found in sharded:
        assert found[case]["norm"] == pytest.approx(totals.grad_norm, rel=tolerance)
        assert found[case]["loss"] == pytest.approx(totals.loss / totals.supervised, rel=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_each_rank_keeps_its_half(sharded: list[dict[str, Any]], case: str) -> None:
    assert [found[case]["share"] for found in sharded] == pytest.approx([0.5, 0.5], abs=0.01)


def test_against_one_process_decoding(alone: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    expected = decoded(alone["none"].model)
    assert len({tuple(row) for row in expected}) > 3
    assert [found["tokens"] for found in sharded] == [expected, expected]


@pytest.mark.parametrize("case", CHANGED)
def test_a_checkpoint_of_one_device_goes_on_sharded(
    alone: dict[str, Any], sharded: list[dict[str, Any]], case: str
) -> None:
    expected = updates(case, trained(alone[case]))
    assert distance(expected, updates(case, sharded[0][f"{case} resumed"])) < RELATIVE


@pytest.mark.parametrize("case", CHANGED)
def test_a_sharded_checkpoint_goes_on_on_one_device(
    alone: dict[str, Any], sharded: list[dict[str, Any]], folder: Path, case: str
) -> None:
    saved = folder / f"{case}-2-{STEPS}"
    verify_checkpoint(saved)
    module, _ = fitted(
        case, folder / "records.jsonl", folder, ranks=1, resume=str(saved), name="from-sharded"
    )
    assert distance(updates(case, trained(alone[case])), updates(case, trained(module))) < RELATIVE


@pytest.mark.parametrize("case", CHANGED)
def test_a_sharded_checkpoint_is_as_one_device_writes_it(
    alone: dict[str, Any], sharded: list[dict[str, Any]], folder: Path, case: str
) -> None:
    one, two = (FolderCheckpointIO().load_checkpoint(folder / f"{case}-{ranks}-{STEPS}") for ranks in (1, 2))
    assert one.keys() == two.keys()
    for (path, a), (other, b) in zip(
        tree_flatten_with_path([one["state_dict"], one["optimizer_states"]])[0],
        tree_flatten_with_path([two["state_dict"], two["optimizer_states"]])[0],
        strict=True,
    ):
        assert path == other
        if isinstance(a, torch.Tensor):
            assert type(b) is torch.Tensor
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6), path


def test_a_gradient_that_is_no_number_stops_every_rank(sharded: list[dict[str, Any]]) -> None:
    for found in sharded:
        assert "gradient norm is nan" in found["nonfinite"]
        assert "at step 1" in found["nonfinite"]


@pytest.mark.parametrize("count", [1, 2])
def test_against_a_whole_model_gradient(count: int, folder: Path) -> None:
    records = str(write_records(folder / f"records-{count}.jsonl"))
    for found in on_ranks(count, gathered_gradients, records, "cpu"):
        for dtype, tolerance in GATHERED.items():
            assert found[str(dtype)] < tolerance


def test_a_model_without_layers_is_refused() -> None:
    model: Any = nn.Linear(2, 2)
    model.config = type("C", (), {"get_text_config": lambda self: self})()
    with pytest.raises(RunFailedError, match="cannot be told"):
        shard_model(model, mesh=None)  # type: ignore[arg-type]

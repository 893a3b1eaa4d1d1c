"""One optimizer step is the same however its rows are cut into micro-batches: the pain of every peer (pains 1 to 3)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmlab.data.prepare import PreparedData, TextEncoder, prepare
from lmlab.data.sources import JsonlData
from lmlab.models.attention import use_packed_attention
from lmlab.models.hardware import Hardware
from lmlab.models.head import CrossEntropy
from lmlab.models.memory import MemoryMeter
from lmlab.training.datamodule import LMDataModule
from lmlab.training.fit import build_trainer
from lmlab.training.modules import SFTModule, Validation
from lmlab.training.options import Sgd, TrainerConfig

# fp32, sums in another order over some thousand terms: errors of a few ulp, 1e-7 relative each.
RELATIVE = 1e-5
STEPS = 3


def byte_encoder() -> TextEncoder:
    """Every byte a token, 256 is EOS: an encoder that needs no training."""

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets = [], []
        for index, character in enumerate(text):
            for byte in character.encode("utf-8"):
                ids.append(byte)
                offsets.append((index, index + 1))
        return ids, offsets

    return TextEncoder(encode=encode, eos_token_id=256, vocab_size=257, key="bytes")


def data_config(path: Path, **changes: object) -> JsonlData:
    values = {
        "kind": "jsonl",
        "path": str(path),
        "format": "triples",
        "template": "brief",
        "columns": {},
        "max_length": 300,
        "packing": False,
        "val_fraction": 0.2,
        "too_long": "truncate_prompt",
        "on_bad_record": "error",
    }
    return JsonlData.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 records whose responses are 1 to 200 characters long."""
    import json

    file = tmp_path_factory.mktemp("data") / "unequal.jsonl"
    rows = [
        {"instruction": f"say {i}", "input": "", "output": "ab" * (100 if i % 7 == 0 else 1 + i % 5)}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def options(batch_size: int, accumulate: int, **changes: object) -> TrainerConfig:
    values: dict[str, object] = {
        "max_steps": STEPS,
        "max_epochs": None,
        "batch_size": batch_size,
        "accumulate_grad_batches": accumulate,
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": "fp32",
        "gradient_clip_val": 0.5,
        "val_every_n_steps": 100,
        "val_batch_size": 4,
        "log_every_n_steps": None,
        "num_workers": 0,
        "compile": False,
        "on_nonfinite": "stop",
    }
    return TrainerConfig.model_validate({**values, **changes})


def optimizer() -> Sgd:
    return Sgd(
        name="sgd",
        lr=0.5,
        weight_decay=0.0,
        momentum=0.0,
        warmup_steps=0,
        schedule="constant",
        min_lr_ratio=0.1,
    )


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def sft_module(model: LlamaForCausalLM, *, supervised_bytes: int = 1) -> SFTModule:
    return SFTModule(
        model,
        loss=CrossEntropy(kind="cross_entropy", label_smoothing=0.0, z_loss=0.0),
        optim=optimizer(),
        max_steps=STEPS,
        validation=Validation(supervised_bytes=supervised_bytes),
        meter=MemoryMeter(on_cuda=False),
    )


def trained(
    prepared: PreparedData, trainer_options: TrainerConfig, *, flat: bool, root: Path
) -> dict[str, torch.Tensor]:
    model = tiny_model()
    if flat:
        use_packed_attention(model)
    module = sft_module(model)
    hardware = Hardware(torch.device("cpu"), "fp32", "test")
    trainer = build_trainer(trainer_options, hardware, max_steps=STEPS, callbacks=[], root=root, world_size=1)
    trainer.fit(module, LMDataModule(prepared, trainer_options, seed=3, flat=flat))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative distance over all parameters together."""
    top = sum(float((a[k] - b[k]).double().square().sum()) for k in a)
    return (top / sum(float(a[k].double().square().sum()) for k in a)) ** 0.5


def updates(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What training added to the initial weights; far smaller than they are, so a stricter thing to compare."""
    start = dict(tiny_model().named_parameters())
    return {name: weights[name] - start[name].detach() for name in weights}


@pytest.fixture(scope="module")
def reference(unequal: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A plain torch loop over the same rows: mean over all supervised tokens of the step, clipped, SGD."""
    prepared = prepare(data_config(unequal), byte_encoder(), task="sft")
    rows, model = prepared.rows("train"), tiny_model()
    from lmlab.data.order import EndlessOrder

    order = EndlessOrder(len(rows), seed=3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        total, count = torch.zeros(()), 0
        for index in range(step * 8, step * 8 + 8):
            example = rows[order[index]]
            logits = model(input_ids=example.input_ids[None]).logits[0]
            total = total + torch.nn.functional.cross_entropy(logits, example.labels, reduction="sum")
            count += int((example.labels != -100).sum())
        sgd.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        sgd.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parity
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (1, 8)])
def test_against_torch_loop_weights(
    reference: dict[str, torch.Tensor],
    unequal: Path,
    tmp_path: Path,
    batch_size: int,
    accumulate: int,
    flat: bool,
) -> None:
    prepared = prepare(data_config(unequal), byte_encoder(), task="sft")
    weights = trained(prepared, options(batch_size, accumulate), flat=flat, root=tmp_path)
    assert distance(updates(reference), updates(weights)) < RELATIVE


def test_mean_of_means_would_be_seen(
    unequal: Path, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    """The comparison above can fail: averaging micro-batch means gives clearly other weights on these records."""
    prepared = prepare(data_config(unequal), byte_encoder(), task="sft")
    rows, model = prepared.rows("train"), tiny_model()
    from lmlab.data.order import EndlessOrder

    order = EndlessOrder(len(rows), seed=3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        losses = []
        for index in range(step * 8, step * 8 + 8):
            example = rows[order[index]]
            logits = model(input_ids=example.input_ids[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, example.labels))
        sgd.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        sgd.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert distance(updates(reference), updates(weights)) > 100 * RELATIVE


@pytest.mark.parametrize("val_batch_size", [1, 3, 8])
def test_validation_does_not_depend_on_the_batch_size(
    unequal: Path, tmp_path: Path, val_batch_size: int
) -> None:
    prepared = prepare(data_config(unequal), byte_encoder(), task="sft")
    model = tiny_model()
    seen: dict[str, float] = {}
    module = sft_module(model, supervised_bytes=prepared.meta["report"]["val"]["supervised_bytes"])
    module.on_metrics = seen.update
    chosen = options(1, 1, val_batch_size=val_batch_size)
    trainer = build_trainer(
        chosen,
        Hardware(torch.device("cpu"), "fp32", "test"),
        max_steps=STEPS,
        callbacks=[],
        root=tmp_path,
        world_size=1,
    )
    trainer.validate(module, LMDataModule(prepared, chosen, seed=3, flat=False), verbose=False)
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for index in range(len(prepared.rows("val"))):
            example = prepared.rows("val")[index]
            logits = model(input_ids=example.input_ids[None]).logits[0].double()
            nll += float(torch.nn.functional.cross_entropy(logits, example.labels, reduction="sum"))
            tokens += int((example.labels != -100).sum())
    assert seen["val/loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert seen["val/perplexity"] == pytest.approx(torch.tensor(nll / tokens).exp().item(), rel=1e-5)


def test_a_gradient_that_is_not_finite_stops_before_the_update(unequal: Path, tmp_path: Path) -> None:
    from lmlab.records import RunFailedError

    prepared = prepare(data_config(unequal), byte_encoder(), task="sft")
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    module = sft_module(model)
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    chosen = options(2, 1)
    trainer = build_trainer(
        chosen,
        Hardware(torch.device("cpu"), "fp32", "test"),
        max_steps=STEPS,
        callbacks=[],
        root=tmp_path,
        world_size=1,
    )
    with pytest.raises(RunFailedError, match="at step 1"):
        trainer.fit(module, LMDataModule(prepared, chosen, seed=3, flat=False))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_an_fp16_scale_is_out_before_clipping(unequal: Path, tmp_path: Path) -> None:
    """Under a GradScaler the logged norm is the true one (a fused AdamW would unscale only after clipping)."""
    from lightning.pytorch import Callback
    from lightning.pytorch.plugins import MixedPrecision

    from lmlab.training.options import AdamW

    prepared = prepare(data_config(unequal), byte_encoder(), task="sft")
    norms: dict[bool, float] = {}
    for scaled in (False, True):
        module = sft_module(tiny_model())
        module.optim = AdamW(
            name="adamw",
            lr=1e-3,
            weight_decay=0.0,
            betas=[0.9, 0.95],
            eps=1e-8,
            warmup_steps=0,
            schedule="constant",
            min_lr_ratio=0.1,
        )
        chosen = options(4, 1)
        hardware = Hardware(torch.device("cpu"), "fp32", "test")
        trainer = build_trainer(
            chosen, hardware, max_steps=1, callbacks=[Callback()], root=tmp_path, world_size=1
        )
        if scaled:
            plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))  # type: ignore[attr-defined]
            trainer.strategy._precision_plugin = plugin
        trainer.fit(module, LMDataModule(prepared, chosen, seed=3, flat=False))
        norms[scaled] = module.totals.grad_norm
    assert norms[True] == pytest.approx(norms[False], rel=0.02)  # fp16 products

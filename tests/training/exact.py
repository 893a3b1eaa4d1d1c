"""What the exactness tests share: records of very unequal lengths, a tiny model, one step by lmlab and by a plain loop."""

from __future__ import annotations

import json
import os
import random
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lmlab.config.compose import CONF
from lmlab.data.order import EndlessOrder
from lmlab.data.prepare import TextEncoder, prepare
from lmlab.data.prepared import PreparedData
from lmlab.data.sources import JsonlData
from lmlab.models.attention import use_packed_attention
from lmlab.models.hardware import Hardware
from lmlab.models.head import CrossEntropy
from lmlab.models.memory import MemoryMeter
from lmlab.records import Example, PackedBatch
from lmlab.training.datamodule import LMDataModule
from lmlab.training.fit import build_trainer
from lmlab.training.modules import SFTModule, Validation
from lmlab.training.options import Sgd, TrainerConfig

STEPS, SEED = 3, 3
LOSS = CrossEntropy(kind="cross_entropy", label_smoothing=0.0, z_loss=0.0)
VALIDATION = Validation(supervised_bytes=1)
Gradients = dict[str, torch.Tensor]


def byte_encoder() -> TextEncoder:
    """Every byte a token, 256 is EOS: an encoder that needs no training."""

    def encode(text: str, *, add_bos: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets = [], []
        for index, character in enumerate(text):
            for byte in character.encode("utf-8"):
                ids.append(byte)
                offsets.append((index, index + 1))
        return ids, offsets

    def decode(ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    return TextEncoder(
        encode=encode,
        encode_long=lambda pieces: iter([np.array([*encode("".join(pieces))[0], 256])]),
        decode=decode,
        eos_token_id=256,
        vocab_size=257,
        key="bytes",
    )


def write_records(file: Path, count: int = 40) -> Path:
    """Records whose responses are 1 to 200 characters long, as many of 1 to 14 as of 15 to 200."""
    rng = random.Random(1)
    rows = [
        {"instruction": f"say {i}", "input": "", "output": "abcde"[i % 5] * int(200 ** rng.random())}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def prepared_data(path: Path, **changes: object) -> PreparedData:
    defaults = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["data"]
    told = {"kind": "jsonl", "path": str(path), "format": "triples", "template": "brief", "columns": {}}
    values = {**defaults, **told, "max_length": 300, "val_fraction": 0.2}
    return prepare(JsonlData.model_validate({**values, **changes}), byte_encoder(), task="sft")


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
        "max_val_rows": None,
        "log_every_n_steps": None,
        "num_workers": 0,
        "compile": False,
        "on_nonfinite": "stop",
        "max_nonfinite_steps": 10,
        "auto_batch": False,
        "memory_plan": False,
        "layer_stats": False,
    }
    return TrainerConfig.model_validate({**values, **changes})


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


def sft_module(model: Any, *, validation: Validation = VALIDATION, loss: CrossEntropy = LOSS) -> SFTModule:
    optim = Sgd(
        name="sgd",
        lr=0.5,
        weight_decay=0.0,
        momentum=0.0,
        warmup_steps=0,
        schedule="constant",
        min_lr_ratio=0.1,
    )
    return SFTModule(
        model,
        loss=loss,
        optim=optim,
        max_steps=STEPS,
        validation=validation,
        meter=MemoryMeter(on_cuda=False),
    )


def trainer_for(
    chosen: TrainerConfig, root: Path, *, max_steps: int = STEPS, precision: str = "fp32", world_size: int = 1
) -> Any:
    """lmlab's Trainer on the CPU; ``fp16`` by autocast and a GradScaler, which Lightning keeps for GPUs."""
    hardware = Hardware(torch.device("cpu"), "fp32" if precision == "fp16" else precision, "test")
    trainer = build_trainer(
        chosen, hardware, max_steps=max_steps, callbacks=[], root=root, world_size=world_size
    )
    if precision == "fp16":
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))  # type: ignore[attr-defined]
        trainer.strategy._precision_plugin = plugin
    return trainer


def bring_up(
    model: Any,
    prepared: PreparedData,
    chosen: TrainerConfig,
    root: Path,
    *,
    flat: bool = True,
    max_steps: int = STEPS,
    precision: str = "fp32",
    validation: Validation = VALIDATION,
) -> tuple[SFTModule, Any, LMDataModule]:
    """(module, trainer, data) of ``model`` on ``prepared``, as lmlab puts them together; on as many ranks as ``chosen`` says."""
    module = sft_module(model, validation=validation)
    if flat:
        use_packed_attention(module.model)
    trainer = trainer_for(chosen, root, max_steps=max_steps, precision=precision, world_size=chosen.devices)
    return module, trainer, LMDataModule(prepared, chosen, seed=SEED, flat=flat)


class Repeated(IterableDataset[PackedBatch]):
    """The given micro-batches, again and again."""

    def __init__(self, batches: Sequence[PackedBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield from self.batches


def step_on(
    batches: Sequence[PackedBatch],
    root: Path,
    *,
    model: Any = None,
    flat: bool = True,
    loss: CrossEntropy = LOSS,
    precision: str = "fp32",
    world_size: int = 1,
) -> tuple[Gradients, SFTModule]:
    """One optimizer step of lmlab on this rank's micro-batches; its gradient as the optimizer saw it, unclipped."""
    module = sft_module(tiny_model() if model is None else model, loss=loss)
    if flat:
        use_packed_attention(module.model)
    chosen = options(1, len(batches), gradient_clip_val=None, devices=world_size)
    trainer = trainer_for(chosen, root, max_steps=1, precision=precision, world_size=world_size)
    trainer.fit(module, train_dataloaders=DataLoader(Repeated(batches), batch_size=None))
    return gradients(module.model), module


def gradients(model: Any) -> Gradients:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()}


def rows_of_steps(prepared: PreparedData, rows_per_step: int, step: int = 0) -> list[Example]:
    """The training rows of one optimizer step."""
    rows = prepared.rows("train")
    order = EndlessOrder(len(rows), seed=SEED)
    return [rows[order[i]] for i in range(step * rows_per_step, (step + 1) * rows_per_step)]


def single_documents(rows: Sequence[Example]) -> list[Example]:
    """Each document of (packed) rows by itself."""
    found = []
    for row in rows:
        parts = zip(row.input_ids.split(row.lengths), row.labels.split(row.lengths), row.lengths, strict=True)
        found += [Example(ids, labels, (n,)) for ids, labels, n in parts]
    return found


def plain_gradient(model: Any, documents: Sequence[Example], loss: CrossEntropy = LOSS) -> Gradients:
    """What it must be: each document alone, one sum over all, one division by all supervised tokens."""
    total, count = torch.zeros(()), 0
    for example in documents:
        logits = model(input_ids=example.input_ids[None]).logits[0].float()
        logits = logits[example.labels != -100]
        labels = example.labels[example.labels != -100]
        log_p = logits.log_softmax(-1)
        smooth = loss.label_smoothing
        nll = -(1 - smooth) * log_p[torch.arange(len(labels)), labels] - smooth * log_p.mean(-1)
        total = total + nll.sum() + loss.z_loss * logits.logsumexp(-1).square().sum()
        count += len(labels)
    model.zero_grad()
    (total / max(1, count)).backward()
    return gradients(model)


def distance(expected: Gradients, found: Gradients) -> float:
    """Relative distance over all parameters together."""
    top = sum(float((expected[k] - found[k]).double().square().sum()) for k in expected)
    return (top / sum(float(expected[k].double().square().sum()) for k in expected)) ** 0.5


def on_two_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`on_ranks` of two."""
    return on_ranks(2, function, *arguments)


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``function(*arguments)`` in real processes of one gloo group, started as lmlab's worker does; by rank."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    assert function.__module__ in sys.modules
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    results = elastic_launch(settings, function)(*arguments)
    return [results[rank] for rank in range(count)]


GATHERED = {None: 1e-4, torch.bfloat16: 5e-2}
"""Types of a sharded model's products, and how far its gathered gradients may be from a whole fp32 model's, relatively."""


def gathered_gradients(records: str, device_type: str) -> dict[str, float]:
    """For `on_ranks`: by type (of `GATHERED`), how far the gradient of one batch, the same on all ranks, is from a whole model's."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from lmlab.data.packing import collate_flat
    from lmlab.models.head import loss_sum
    from lmlab.models.sharding import shard_model, sharded_loss_sum, whole

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(device_type, rank if device_type == "cuda" else 0)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        batch = collate_flat(rows_of_steps(prepared_data(Path(records)), 8)).to(device)
        plain: Any = tiny_model()
        plain.to(device)
        use_packed_attention(plain)
        loss_sum(plain, batch).backward()
        expected = {name: p.grad.cpu() for name, p in plain.named_parameters()}
        found: dict[str, float] = {}
        for dtype in GATHERED:
            model: Any = tiny_model()  # in host memory, as a model too large for one card
            use_packed_attention(model)
            shard_model(model, init_device_mesh(device_type, (size,)), param_dtype=dtype)
            sharded_loss_sum(model, batch).backward()
            gathered = whole({name: p.grad for name, p in model.named_parameters()}, keep=True)
            found[str(dtype)] = distance(expected, gathered)
        return found
    finally:
        dist.destroy_process_group()

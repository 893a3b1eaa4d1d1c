"""The whole run as one frozen object. Hydra composes it, pydantic checks it here, nothing below changes it.

The open groups (adapter, data, sampler, ...) are discriminated unions over whatever is registered, plugins
included, so the class is built when it is needed. Rules that concern several keys are in `broken_rules`, in one
place, each with its remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, create_model

from lmlab import registry
from lmlab.config.search import SearchConfig, broken_search_rules
from lmlab.data.sources import DataConfig
from lmlab.evaluation.text import MetricConfig
from lmlab.generation.samplers import SamplerConfig
from lmlab.models.adapters import AdapterConfig
from lmlab.models.build import ModelConfig, Scratch
from lmlab.models.head import LossConfig
from lmlab.models.quantize import QuantConfig
from lmlab.records import RefusedError, UserError
from lmlab.registry import Config, suggest
from lmlab.tokenizers import BPETokenizer, CharsTokenizer, FileTokenizer, FromModelTokenizer
from lmlab.tracking.wandb import LoggerConfig
from lmlab.training import suites  # noqa: F401 - registers callbacks=harness
from lmlab.training.options import CallbackConfig, CheckpointConfig, OptimConfig, SamplesConfig, TrainerConfig


class LocalLauncher(Config):
    """Jobs of a multirun as process groups on this machine, ``jobs`` at a time."""

    kind: Literal["local"]
    jobs: int = Field(ge=1)


class SlurmLauncher(Config):
    """Jobs of a multirun as SLURM jobs, through submitit.

    Attributes:
        jobs: in the queue at the same time.
        time_minutes: wall-clock limit of each; one that reaches it saves and goes on in a new job.
        cpus_per_task, memory_gb: None as the partition has it.
        parameters: more of submitit's, such as ``slurm_qos``.
        cluster: ``local`` is submitit's own stand-in for SLURM on this machine.
    """

    kind: Literal["slurm"]
    jobs: int = Field(ge=1)
    partition: str | None
    account: str | None
    time_minutes: int = Field(ge=1)
    cpus_per_task: int | None = Field(ge=1)
    memory_gb: float | None = Field(gt=0)
    parameters: dict[str, Any]
    cluster: Literal["slurm", "local"]


class RunConfig(Config):
    """Everything a run depends on. Field by field: the groups of conf/."""

    task: Literal["sft", "pretrain"]
    run_name: str | None
    seed: int = Field(ge=0, lt=2**32)
    output_root: str
    resume: str | None
    overwrite: bool
    plugins: list[str]
    model: ModelConfig
    data: DataConfig
    tokenizer: FromModelTokenizer | FileTokenizer | BPETokenizer | CharsTokenizer
    adapter: AdapterConfig
    quant: QuantConfig
    optim: OptimConfig
    loss: LossConfig
    sampler: SamplerConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    samples: SamplesConfig
    samplers: dict[str, SamplerConfig]
    logger: LoggerConfig
    callbacks: dict[str, CallbackConfig]
    metrics: dict[str, MetricConfig]
    launcher: LocalLauncher | SlurmLauncher
    hparams_search: SearchConfig


_built: dict[tuple[Any, ...], type[RunConfig]] = {}


def run_config_class() -> type[RunConfig]:
    """`RunConfig` with every open field narrowed to the union of the classes registered by now.

    The same registered classes give the same class, so that equal configs compare equal.
    """
    known = tuple((group, classes.classes()) for group, classes in registry.BY_GROUP.items())
    if known not in _built:
        unions = {group: classes.union() for group, classes in registry.BY_GROUP.items()}
        fields: dict[str, Any] = {
            name: (dict[str, union] if name in registry.NAMED_GROUPS else union, ...)
            for name, union in unions.items()
        }
        _built[known] = create_model("RunConfig", __base__=RunConfig, **fields)
    return _built[known]


def broken_rules(config: RunConfig) -> Iterator[UserError]:
    """Rules over several keys: a `RefusedError` for a combination that cannot train, else a `UserError`."""
    yield from _adapter_and_quant(config)
    yield from broken_search_rules(config.hparams_search)
    if config.trainer.strategy == "fsdp":
        yield from _sharded(config)
    trainer = config.trainer
    if (trainer.max_steps is None) == (trainer.max_epochs is None):
        yield UserError(
            f"trainer.max_steps={trainer.max_steps} and trainer.max_epochs={trainer.max_epochs}",
            where="trainer",
            fix="give one of the two and null for the other",
        )
    if isinstance(config.model, Scratch) and config.tokenizer.kind == "from_model":
        yield UserError(
            "a model from scratch brings no tokenizer",
            where="tokenizer",
            fix="use tokenizer=bpe or tokenizer=file",
        )
    if not isinstance(config.model, Scratch) and config.tokenizer.kind in ("bpe", "chars"):
        yield UserError(
            "a pretrained model cannot take a new vocabulary",
            where="tokenizer",
            fix="use tokenizer=from_model",
        )
    if trainer.precision == "fp16" and not _gpu_wanted(config):
        yield UserError(
            "trainer.precision=fp16 on a CPU", where="trainer.precision", fix="use bf16 or fp32 there"
        )
    if (
        trainer.compile
        and config.model.gradient_checkpointing
        and config.quant.kind in ("int8", "int4", "nf4", "fp4")
    ):
        yield UserError(
            f"trainer.compile=true with model.gradient_checkpointing=true over quant={config.quant.kind}: "
            "a compiled layer does not recompute what it saved",
            where="trainer.compile",
            fix="switch one of the two off",
        )
    if config.overwrite and config.resume is not None:
        yield UserError(
            f"overwrite=true with resume={config.resume}",
            where="overwrite",
            fix="overwrite begins anew, resume goes on: give one of the two",
        )
    for name in config.samples.grid:
        if name not in config.samplers:
            yield UserError(
                f"unknown sampler '{name}'", where="samples.grid", fix=suggest(name, config.samplers)
            )


def _adapter_and_quant(config: RunConfig) -> Iterator[UserError]:
    adapter, quant = config.adapter.kind, config.quant.kind
    if adapter == "qlora" and quant not in ("nf4", "fp4"):
        yield RefusedError(
            f"adapter=qlora over quant={quant}",
            where="quant",
            fix="use quant=nf4 or quant=fp4, or adapter=lora",
        )
    if config.adapter.freezes_base or quant == "none":
        return
    if quant in ("fp16", "bf16"):
        if _gpu_wanted(config):
            return  # means mixed training there; `mixed_precision_instead` says so
        yield RefusedError(
            f"adapter=none with quant={quant}: a trainable base keeps fp32 weights",
            where="quant",
            fix=f"use quant=none trainer.precision=bf16 for mixed 16-bit training, or adapter=lora quant={quant}",
        )
        return
    yield RefusedError(
        f"adapter=none with quant={quant}: {quant} weights cannot be trained",
        where="quant",
        fix=f"use adapter={'qlora' if quant in ('nf4', 'fp4') else 'lora'} quant={quant}, or quant=none",
    )


def _sharded(config: RunConfig) -> Iterator[UserError]:
    """What does not go together with weights that lie in shares."""
    quant, trainer = config.quant.kind, config.trainer
    if quant in ("nf4", "fp4", "int4", "int8"):
        yield RefusedError(
            f"trainer.strategy=fsdp over quant={quant}: packed weights are not cut into shares",
            where="trainer.strategy",
            fix="use trainer.strategy=ddp, or quant=bf16",
        )
    if world_size(config) == 1:
        yield UserError(
            "trainer.strategy=fsdp on one device: there is nothing to share",
            where="trainer.strategy",
            fix="use trainer.devices=2 or more, or trainer.strategy=auto",
        )
    if trainer.precision == "fp16" or mixed_precision_instead(config) == "fp16":
        yield UserError(
            "trainer.strategy=fsdp in fp16, which needs a loss scale",
            where="trainer.precision",
            fix="use trainer.precision=bf16 or fp32",
        )
    if trainer.compile:
        yield UserError(
            "trainer.strategy=fsdp with trainer.compile=true",
            where="trainer.compile",
            fix="use trainer.compile=false",
        )
    if "8bit" in config.optim.name:
        yield UserError(
            f"trainer.strategy=fsdp with optim.name={config.optim.name}: its blocks would lie across shares",
            where="optim.name",
            fix="use optim.name=adamw or sgd",
        )
    yield from _sharded_adapter(config)
    if config.adapter.freezes_base and getattr(config.tokenizer, "added_tokens", None):
        yield UserError(
            f"trainer.strategy=fsdp with tokenizer.added_tokens and adapter={config.adapter.kind}",
            where="tokenizer.added_tokens",
            fix="use trainer.strategy=ddp, or adapter=none",
        )


def _sharded_adapter(config: RunConfig) -> Iterator[UserError]:
    """PEFT's copies and DoRA's norms need whole weights."""
    for key in ("dora", "modules_to_save"):
        if getattr(config.adapter, key, None):
            yield RefusedError(
                f"trainer.strategy=fsdp with adapter.{key}",
                where=f"adapter.{key}",
                fix="use trainer.strategy=ddp, or leave it out",
            )


def _gpu_wanted(config: RunConfig) -> bool:
    import torch

    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def optim_in_force(config: RunConfig, device_type: str) -> OptimConfig:
    """QLoRA on a GPU takes the paged 8-bit AdamW in place of AdamW, as in its paper (arXiv 2305.14314, section 3)."""
    if config.adapter.kind == "qlora" and device_type == "cuda" and config.optim.name == "adamw":
        return config.optim.model_copy(update={"name": "paged_adamw8bit"})
    return config.optim


def mixed_precision_instead(config: RunConfig) -> str | None:
    """On a GPU ``adapter=none quant=fp16|bf16`` means mixed-precision training; that precision, else None."""
    quantized = config.quant.kind in ("fp16", "bf16") and not config.adapter.freezes_base
    return config.quant.kind if quantized and _gpu_wanted(config) else None


def world_size(config: RunConfig) -> int:
    """Ranks of the run."""
    return config.trainer.devices * config.trainer.num_nodes

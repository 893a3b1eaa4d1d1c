"""Where a run's config meets the memory plan: before a run (scripts/plan.py), beside its measured peaks, after an OOM.

A plan takes some seconds, so it is kept in the cache, keyed by everything it depends on, lmlab's own model code
included. It never stops a run: what cannot be planned is said in one line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.config.schema import RunConfig, optim_in_force
from lmlab.data.sources import cache_root
from lmlab.journal import read_json, write_json
from lmlab.records import UserError

if TYPE_CHECKING:
    from lmlab.data.prepared import PreparedData
    from lmlab.models.hardware import Hardware
    from lmlab.models.memory import MemoryMeter
    from lmlab.models.plan import MemoryPlan, PlannedRun, Workload

STEPS_LOOKED_AT = 2000
"""Of the data order, for its largest micro-batch."""
UNKNOWN_PROMPT = 128
"""Tokens of a prompt where no data are prepared."""


# --- what a run will do -----------------------------------------------------------------------------------------------


def device_and_precision(config: RunConfig) -> tuple[str, str]:
    """(``cpu`` or ``cuda``, precision) of the machine meant: ``trainer.accelerator=gpu`` plans for a GPU without one."""
    import torch

    from lmlab.config.schema import mixed_precision_instead
    from lmlab.models.build import hidden_size
    from lmlab.models.hardware import choose_hardware

    asked = mixed_precision_instead(config) or config.trainer.precision
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        quiet = choose_hardware("cpu", "fp32")  # silences what the libraries say
        assert quiet.device.type == "cpu"
        return "cuda", "bf16" if asked == "auto" else asked
    hardware = choose_hardware(
        config.trainer.accelerator, asked, hidden_size=lambda: hidden_size(config.model.hf_config(None))
    )
    return hardware.device.type, hardware.precision


def planned_run(
    config: RunConfig, hf_config: Any, workload: Workload, *, device_type: str, precision: str
) -> PlannedRun:
    """What the plan needs of a config."""
    import torch

    from lmlab.models.hardware import is_mixed
    from lmlab.models.plan import PlannedRun

    optim = optim_in_force(config, device_type)
    return PlannedRun(
        model=config.model,
        hf_config=hf_config,
        quant=config.quant,
        adapter=config.adapter,
        loss=config.loss,
        # on_cuda=False: paged states are CUDA's managed memory, which cannot be imagined; plain ones are as large.
        build_optimizer=lambda parameters: optim.build(parameters, on_cuda=False, scaled=precision == "fp16"),
        workload=workload,
        compute_dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
        device_type=device_type,
        mixed=is_mixed(precision, config.quant.kind if config.adapter.freezes_base else None),
    )


def model_config(config: RunConfig) -> Any:
    """The transformers config, without data or weights; a BPE yet to be trained has the size asked for.

    Raises:
        UserError: the model's config, or the tokenizer that decides its size, cannot be read.
    """
    from lmlab.models.build import Scratch

    size: int | None = None
    if isinstance(config.model, Scratch):
        if config.tokenizer.kind == "bpe":
            size = config.tokenizer.vocab_size
        elif config.tokenizer.kind == "chars":
            raise UserError(
                "the size of a tokenizer of characters is known only when its text is read",
                where="tokenizer.kind=chars",
                fix="plan with tokenizer=bpe tokenizer.vocab_size=N, or look at memory/<phase>/planned_gb of a run",
            )
        else:
            from lmlab.tokenizers.load import load_tokenizer, rows_needed

            size = rows_needed(load_tokenizer(str(config.tokenizer.path)))  # type: ignore[union-attr]
    return config.model.hf_config(size)


def workload_of_config(config: RunConfig, hf_config: Any, *, supervised_share: float = 1.0) -> Workload:
    """The most a micro-batch can hold: every row full."""
    from lmlab.models.plan import Workload
    from lmlab.models.probe import supports_flat

    stream = config.task == "pretrain"
    wants_flat = not stream or not config.data.cross_document_attention
    train = (config.data.max_length,) * config.trainer.batch_size
    val = (config.data.max_length,) * config.trainer.val_batch_size
    count = config.samples.prompts if isinstance(config.samples.prompts, int) else len(config.samples.prompts)
    return Workload(
        train=train,
        supervised=round(supervised_share * sum(train)),
        val=val,
        val_supervised=round(supervised_share * sum(val)),
        flat=wants_flat and supports_flat(hf_config),
        prompts=(min(UNKNOWN_PROMPT, config.data.max_length),) * count if config.samples.grid else (),
        new_tokens=_new_tokens(config),
    )


def workload_of_data(
    config: RunConfig, prepared: PreparedData, *, flat: bool, max_steps: int, rank: int = 0
) -> Workload:
    """The largest micro-batch of this run's own order (of its first 2,000 steps), and of its validation side."""
    from lmlab.config.schema import world_size
    from lmlab.data.order import ShareOfRows, StepBatches
    from lmlab.models.plan import Workload

    trainer, report = config.trainer, prepared.meta["report"]
    rows = prepared.rows("train")
    batches = StepBatches(
        prepared.order(rows, seed=config.seed),
        batch_size=trainer.batch_size,
        accumulate=trainer.accumulate_grad_batches,
        rank=rank,
        world_size=world_size(config),
    )
    looked_at = islice(batches, min(max_steps, STEPS_LOOKED_AT) * trainer.accumulate_grad_batches)
    train, supervised = _largest(rows, looked_at, flat=flat)
    val_rows = prepared.rows("val")
    val, val_supervised = _largest(
        val_rows,
        ShareOfRows(len(val_rows), batch_size=trainer.val_batch_size, world_size=world_size(config)),
        flat=flat,
    )
    base = workload_of_config_prompts(config, report)
    return Workload(train, supervised, val, val_supervised, flat, base, _new_tokens(config))


def workload_of_config_prompts(config: RunConfig, report: Mapping[str, Any]) -> tuple[int, ...]:
    """Lengths of the sampled prompts, from the mean of what is not trained in an example."""
    if not config.samples.grid:
        return ()
    count = config.samples.prompts if isinstance(config.samples.prompts, int) else len(config.samples.prompts)
    records = max(1, report.get("records_kept", 1))
    mean = (report["tokens"] - report["supervised_tokens"]) // records
    return (max(8, min(config.data.max_length, mean)),) * count


def _new_tokens(config: RunConfig) -> int:
    return max([0, *(config.samplers[name].max_new_tokens for name in config.samples.grid)])


def _largest(rows: Any, batches: Any, *, flat: bool) -> tuple[tuple[int, ...], int]:
    """(document lengths, supervised tokens) of the batch with the most positions."""
    from lmlab.records import IGNORE_INDEX

    known: dict[int, tuple[tuple[int, ...], int]] = {}

    def of(index: int) -> tuple[tuple[int, ...], int]:
        if index not in known:
            example = rows[index]
            known[index] = (tuple(example.lengths), int((example.labels != IGNORE_INDEX).sum()))
        return known[index]

    best: tuple[int, tuple[int, ...], int] = (0, (1,), 0)
    for batch in batches:
        found = [of(int(index)) for index in batch]
        lengths = tuple(n for each, _ in found for n in each)
        size = sum(lengths) if flat else max(lengths) * len(lengths)
        best = max(best, (size, lengths, sum(count for _, count in found)))
    return best[1], best[2]


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigPlan:
    """What is planned of a config alone: no data, no weights, and no GPU for ``trainer.accelerator=gpu``.

    Attributes:
        hf_config: the transformers config of its model.
        device_type, precision: of the machine meant.
    """

    config: RunConfig
    hf_config: Any
    device_type: str
    precision: str

    @property
    def workload(self) -> Workload:
        """Every row full, every token trained."""
        return workload_of_config(self.config, self.hf_config)

    @property
    def capacity_gb(self) -> float | None:
        """What the device has; None: there is none here."""
        return capacity_gb(self.device_type)

    def made(self, workload: Workload | None = None) -> MemoryPlan:
        """The plan of ``workload``, or of full rows; from the cache where it was made before."""
        where = {"device_type": self.device_type, "precision": self.precision}
        run = planned_run(self.config, self.hf_config, workload or self.workload, **where)
        return cached_plan(run, self.config)


def plan_of_config(config: RunConfig) -> ConfigPlan:
    """Read what a plan needs of a config.

    Raises:
        UserError: the model's config, or the tokenizer that decides its size, cannot be read.
    """
    device_type, precision = device_and_precision(config)
    return ConfigPlan(config, model_config(config), device_type, precision)


def cached_plan(run: PlannedRun, config: RunConfig) -> MemoryPlan:
    """The plan of ``run``, from the cache where it was made before."""
    from lmlab.models.plan import MemoryPlan, plan

    path = cache_root() / "plans" / f"{_key(run, config)}.json"
    if path.is_file():
        stored = read_json(path)
        if stored:
            return MemoryPlan(stored["phases"], tuple(stored["layers"]))
    made = plan(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(made))
    return made


def _key(run: PlannedRun, config: RunConfig) -> str:
    import torch

    from lmlab.models.memory import can_tune_malloc

    code = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "models").glob("*.py")):
        code.update(file.read_bytes())
    parts = [
        run.hf_config.to_dict(),
        *(part.model_dump(mode="json") for part in (run.model, run.quant, run.adapter, run.loss)),
        [config.optim.name, asdict(run.workload), str(run.compute_dtype), run.device_type],
        [version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")],
        # Without CUDA the CPU's kernels stand in for its own.
        [code.hexdigest(), torch.cuda.is_available(), can_tune_malloc()],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def plan_beside(
    meter: MemoryMeter,
    config: RunConfig,
    prepared: PreparedData,
    built: Any,
    hardware: Hardware,
    max_steps: int,
    say: Callable[[str], None],
) -> None:
    """Give the meter what was planned; a failure is one line and no more."""
    if not config.trainer.memory_plan:
        return
    if config.trainer.strategy == "fsdp":
        say("no memory plan: it would be that of one device with the whole model")
        return
    try:
        workload = workload_of_data(config, prepared, flat=built.flat, max_steps=max_steps)
        run = planned_run(
            config,
            _as_built(config, built.model),
            workload,
            device_type=hardware.device.type,
            precision=hardware.precision,
        )
        made = cached_plan(run, config)
        meter.plan(made.growth_gb(), loaded_gb=made.loaded_gb)
    except Exception as error:  # whatever it was: a plan is no reason not to train
        lines = str(error).strip().splitlines()
        say(f"no memory plan for this model: {type(error).__name__}: {(lines or [''])[0][:150]}")


def _as_built(config: RunConfig, model: Any) -> Any:
    """The transformers config anew, without what building wrote into it, and with the rows the model has now."""
    from lmlab.models.head import base_model
    from lmlab.models.vocabulary import embedding_rows

    rows = embedding_rows(base_model(model))
    hf_config = config.model.hf_config(rows)
    hf_config.get_text_config().vocab_size = rows
    return hf_config


# --- what would fit ---------------------------------------------------------------------------------------------------


def capacity_gb(device_type: str) -> float | None:
    """Memory of the GPU, or of this machine (a container's limit counts); None: there is no such GPU here."""
    import resource

    import torch

    if device_type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [float(memory), float(resource.getrlimit(resource.RLIMIT_AS)[0])]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(float(text))
    return min(limit for limit in limits if limit > 0) / 1e9


def alternatives(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """(what to type, the config it gives): smaller in memory, the same in what is learned or near it."""
    trainer, found = config.trainer, list[tuple[str, RunConfig]]()

    def changed(words: str, **updates: Any) -> None:
        found.append((words, config.model_copy(update=updates)))

    checkpointed = config.model.model_copy(update={"gradient_checkpointing": True})
    size, accumulate = trainer.batch_size, trainer.accumulate_grad_batches
    while size % 2 == 0:
        size, accumulate = size // 2, accumulate * 2
        halved = trainer.model_copy(update={"batch_size": size, "accumulate_grad_batches": accumulate})
        words = f"trainer.batch_size={size} trainer.accumulate_grad_batches={accumulate}"
        changed(words, trainer=halved)
    if not config.model.gradient_checkpointing:
        changed("model.gradient_checkpointing=true", model=checkpointed)
    if config.adapter.kind == "lora" and config.quant.kind not in ("nf4", "fp4"):
        from lmlab.models.quantize import FourBit

        nf4 = FourBit(kind="nf4", double_quant=True)
        changed("quant=nf4", quant=nf4)
        changed("quant=nf4 model.gradient_checkpointing=true", quant=nf4, model=checkpointed)
    return found


def what_fits(
    config: RunConfig, replan: Callable[[RunConfig], float], limit_gb: float
) -> Sequence[tuple[str, float]]:
    """(what to type, planned GB) of the alternatives whose plan is below ``limit_gb``; at most two of them."""
    fitting: list[tuple[str, float]] = []
    for words, changed in alternatives(config):
        planned = replan(changed)
        if planned <= limit_gb:
            fitting.append((words, planned))
            if len(fitting) == 2:
                break
    return fitting


def out_of_memory(config: RunConfig, meter: MemoryMeter | None) -> str:
    """What happened and what would fit, in one line; never raises."""
    try:
        return _out_of_memory(config, meter)
    except Exception as error:  # this is the line about another failure
        advice = "lower trainer.batch_size or data.max_length, or use adapter=qlora"
        return f"{advice} (what would fit could not be planned: {type(error).__name__})"


def _out_of_memory(config: RunConfig, meter: MemoryMeter | None) -> str:
    known = plan_of_config(config)
    base = 0.0 if meter is None else meter.base_gb

    def replan(changed: RunConfig) -> float:
        return base + max(replace(known, config=changed).made().growth_gb().values())

    planned = replan(config)
    where = "" if meter is None or meter.current is None else f" in {meter.current}"
    limit = known.capacity_gb
    if limit is None:
        raise UserError("no such device here")
    told = f"up to {planned:.2f} GB planned{where}, {limit:.2f} GB there"
    fitting = what_fits(config, replan, 0.95 * limit)
    if not fitting:
        return f"{told}: nothing smaller was found to fit, try a smaller model or data.max_length"
    return f"{told}: " + " or ".join(f"{words} ({gigabytes:.2f} GB)" for words, gigabytes in fitting)

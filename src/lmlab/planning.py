"""Where a run's config meets the memory plan: before a run (scripts/plan.py), beside its measured peaks, after an OOM.

A plan takes some seconds, so it is kept in the cache, keyed by everything it depends on, the code of lmlab's models and of
what was chosen (a plugin's too) included. It never stops a run: what cannot be planned is said in one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.config.schema import RunConfig, optim_in_force, world_size
from lmlab.data.sources import cache_root
from lmlab.journal import read_json, write_json
from lmlab.records import UserError

if TYPE_CHECKING:
    from lmlab.data.prepared import PreparedData
    from lmlab.models.hardware import Hardware
    from lmlab.models.memory import MemoryMeter
    from lmlab.models.plan import MemoryPlan, PlannedRun, Workload
    from lmlab.models.traffic import Traffic

STEPS_LOOKED_AT = 2000
"""Of the data order, for its largest micro-batch."""
UNKNOWN_PROMPT = 128
"""Tokens of a prompt where no data are prepared."""
ONLY_SCHEDULE = {"lr", "warmup_steps", "schedule", "min_lr_ratio"}
"""Of an optimizer: what decides no tensor's size, so that a plan outlives another learning rate."""


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
    from lmlab.data.order import ShareOfRows, StepBatches, spread
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
        ShareOfRows(
            spread(len(val_rows), trainer.max_val_rows),
            batch_size=trainer.val_batch_size,
            world_size=world_size(config),
        ),
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

    def run(self, workload: Workload | None = None) -> PlannedRun:
        """What is planned: ``workload``, or full rows."""
        where = {"device_type": self.device_type, "precision": self.precision}
        return planned_run(self.config, self.hf_config, workload or self.workload, **where)

    def made(self, workload: Workload | None = None) -> MemoryPlan:
        """The plan of ``workload``, or of full rows, on one rank; from the cache where it was made before."""
        return cached_plan(self.run(workload), self.config)

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return world_size(self.config)

    def traffic(self) -> dict[str, Traffic]:
        """What a rank sends in an optimizer step by strategy (``ddp``, ``fsdp``); empty for one rank."""
        from lmlab.models.sharded_plan import gathered_size, run_groups
        from lmlab.models.traffic import ddp_traffic, fsdp_traffic

        if self.ranks == 1:
            return {}
        ranks, run = self.ranks, self.run()
        groups, batches = run_groups(run), self.config.trainer.accumulate_grad_batches
        size = gathered_size(run)
        return {
            "ddp": ddp_traffic(groups, ranks),
            "fsdp": fsdp_traffic(groups, ranks, size=size, micro_batches=batches),
        }

    def host_gb(self) -> float:
        """Memory of a node's own that its ranks take under FSDP before each keeps its share: the whole model each."""
        from lmlab.models.sharded_plan import run_groups

        whole = sum(part.values * part.stored for part in run_groups(self.run()).parts)
        return self.config.trainer.devices * whole / 1e9


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
    from lmlab.models.sharded_plan import run_groups, sharded_plan

    path = cache_root() / "plans" / f"{_key(run, config)}.json"
    if path.is_file():
        stored = read_json(path)
        if stored:
            return MemoryPlan(stored["phases"], tuple(stored["layers"]))
    made = sharded_plan(run, run_groups(run), world_size(config)) if _sharded(config) else plan(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(made))
    return made


def _sharded(config: RunConfig) -> bool:
    return config.trainer.strategy == "fsdp"


def _key(run: PlannedRun, config: RunConfig) -> str:
    from lmlab.models.memory import can_tune_malloc

    chosen = (run.model, run.quant, run.adapter, run.loss, config.optim)
    code = hashlib.sha256()
    for file in sorted(
        {*(Path(__file__).parent / "models").glob("*.py"), *_sources([*chosen, run.hf_config])}
    ):
        code.update(file.read_bytes())
    parts = [
        run.hf_config.to_dict(),
        *(part.model_dump(mode="json", exclude=ONLY_SCHEDULE) for part in chosen),
        [asdict(run.workload), str(run.compute_dtype), run.device_type],
        world_size(config) if _sharded(config) else None,
        [version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")],
        [code.hexdigest(), can_tune_malloc()],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _sources(parts: Iterable[Any]) -> Iterator[Path]:
    """The files of what a config chose, which may be a plugin's."""
    for part in parts:
        file = getattr(sys.modules.get(type(part).__module__), "__file__", None)
        if file and Path(file).is_file():
            yield Path(file)


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
    if _sharded(config):
        say("no memory plan beside the measured peaks of shares; scripts/plan.py estimates them")
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

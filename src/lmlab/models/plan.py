"""The memory plan: what each phase of a run will take, from the config alone.

Not formulas: the run's own code (build, quantize, adapt, forward pass, loss, backward pass, optimizer, validation,
generation) is run on tensors without memory and its live bytes are counted (`footprint`). Deep models are run with 3
and with 4 layers and extended linearly: layers that are alike add the same bytes at every moment of a step, so this is
exact as long as each moment (the first layers, the last ones, the head) is extended on its own and the highest one
is taken afterwards.

GB are 10^9 bytes. Of malloc's heap on a CPU an allowance is in the plan (``kept free``). Not in it: the CUDA context (some
0.5 GB that torch does not see), fragmentation on a GPU, and scratch memory inside of kernels.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lmlab.models import fake_storage
from lmlab.models.attention import attention, use_packed_attention
from lmlab.models.build import ModelConfig, decoder_layers, enable_checkpointing, standard_attention
from lmlab.models.depth import Moments, alike, extended, num_layers, with_layers
from lmlab.models.footprint import CUDA_GRANULE, Footprint
from lmlab.models.fused import use_fused_layers
from lmlab.models.hardware import move_rest_to
from lmlab.models.head import base_model, loss_sum
from lmlab.models.memory import PHASES, kept_by_malloc
from lmlab.models.quantize import load_dtype
from lmlab.records import PackedBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lmlab.models.adapters import AdapterConfig
    from lmlab.models.head import LossConfig
    from lmlab.models.quantize import QuantConfig

KINDS = (
    "weights",
    "adapter",
    "gathered",
    "gradients",
    "optimizer",
    "activations",
    "head and loss",
    "workspace",
    "kept free",
)
"""What memory is for; ``gathered``: other ranks' shares (`sharded_plan`); ``kept free``: what malloc keeps on a CPU of blocks that were freed."""
WHOLE_UP_TO = 7  # layers up to which a model is run whole: 3 + 4 of them would take longer

BuildOptimizer = Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Workload:
    """The largest micro-batches of a run.

    Attributes:
        train, val: lengths of their documents, in tokens.
        supervised, val_supervised: how many of these tokens are trained or measured.
        flat: flat rows under packed attention; else rectangles as wide as the longest.
        prompts: lengths of the prompts that are continued at once; none: nothing is generated.
        new_tokens: at most generated for each.
    """

    train: tuple[int, ...]
    supervised: int
    val: tuple[int, ...]
    val_supervised: int
    flat: bool
    prompts: tuple[int, ...] = ()
    new_tokens: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Planned peaks.

    Attributes:
        phases: phase -> kind (`KINDS`) -> bytes alive at that phase's peak.
        layers: of the model, and how many were run to find this out.
    """

    phases: dict[str, dict[str, int]]
    layers: tuple[int, int]

    def peak_gb(self, phase: str) -> float:
        """Peak of one phase."""
        return sum(self.phases[phase].values()) / 1e9

    def growth_gb(self) -> dict[str, float]:
        """Planned peaks by phase, over what was in use before."""
        return {phase: self.peak_gb(phase) for phase in self.phases}

    @property
    def loaded_gb(self) -> float:
        """Weights and adapter as they lie between phases."""
        return sum(self.phases["optimizer"][kind] for kind in ("weights", "adapter")) / 1e9

    @property
    def worst(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=self.peak_gb)

    @property
    def total_gb(self) -> float:
        """The highest peak of all phases."""
        return self.peak_gb(self.worst)


@dataclass(frozen=True)
class PlannedRun:
    """Everything a plan depends on.

    Attributes:
        compute_dtype: of products; fp32 means no autocast.
        mixed: `Hardware.mixed`.
        device_type: ``cpu`` or ``cuda``.
    """

    model: ModelConfig
    hf_config: PretrainedConfig
    quant: QuantConfig
    adapter: AdapterConfig
    loss: LossConfig
    build_optimizer: BuildOptimizer
    workload: Workload
    compute_dtype: torch.dtype
    device_type: str
    mixed: bool = True


def plan(run: PlannedRun, *, whole: bool = False) -> MemoryPlan:
    """Planned peaks of every phase.

    Args:
        whole: run every layer, however many; else deep models of like layers are extended from 3 and 4.

    Raises:
        Exception: whatever the model's own code raises without values, as where tokens are routed by value.
    """
    peaks, heap, layers = moments(run, whole=whole)
    return _collect(run, peaks, heap, layers=layers)


def moments(run: PlannedRun, *, whole: bool = False) -> tuple[Moments, Moments, tuple[int, int]]:
    """Live bytes at the peak of every moment, blocks of malloc, and (layers of the model, how many were run); as `plan`."""
    layers = num_layers(run.hf_config)
    same = alike(run.hf_config) and run.adapter.same_in_all_layers
    if whole or layers is None or layers <= WHOLE_UP_TO or not same:
        return *_measure(run, run.hf_config), (layers or 0, layers or 0)
    short, longer = (_measure(run, with_layers(run.hf_config, n)) for n in (3, 4))
    peaks, heap = (extended(low, high, layers - 3) for low, high in zip(short, longer, strict=True))
    return peaks, heap, (layers, 7)


def _collect(run: PlannedRun, peaks: Moments, heap: Moments, *, layers: tuple[int, int]) -> MemoryPlan:
    phases = {}
    # Small blocks that any phase of the loop has once used stay with the process; loading is over before the loop.
    kept = max(blocks["small"] for (phase, _), blocks in heap.items() if phase != "load")
    # What is free between them and at the heap's end: in twelve measured runs 26 to 180 MB, mostly 60 to 110.
    kept += min(kept_by_malloc(checkpointing=run.model.gradient_checkpointing)[1], kept)
    for phase in PHASES:
        moments = [live for (name, _), live in peaks.items() if name == phase]
        if not moments:
            continue
        highest = max(moments, key=lambda live: live.total())
        phases[phase] = {kind: max(0, highest[kind]) for kind in KINDS}
        if run.device_type == "cpu" and phase != "load":
            large = max(blocks["large"] for (name, _), blocks in heap.items() if name == phase)
            phases[phase]["kept free"] = max(0, large + kept - highest.total())
    return MemoryPlan(phases, layers)


# --- one model, run without memory ------------------------------------------------------------------------------------


def _measure(run: PlannedRun, hf_config: PretrainedConfig) -> tuple[Moments, Moments]:
    fake_storage.prepare()
    footprint = Footprint(
        granule=CUDA_GRANULE if run.device_type == "cuda" else 1,
        keeps_below=kept_by_malloc(checkpointing=run.model.gradient_checkpointing)[0],
    )
    with footprint.active():
        simulation = Simulation(run, hf_config, footprint)
        simulation.train()
        simulation.evaluate()
        if run.workload.prompts:
            simulation.generate()
        del simulation
    return _named(footprint.peaks), _named(footprint.heap)


def _named(marks: Mapping[tuple[Any, ...], Counter[str]]) -> Moments:
    return {(phase, name): live for (phase, *moment), live in marks.items() for name in _names(*moment)}


def _names(moment: int | str, layers: int = 0) -> list[str]:
    """A moment's names, the same for any depth: the first two layers count from the start, the last two from the end."""
    if isinstance(moment, str) or moment in (-1, layers):
        return [f"{moment}" if isinstance(moment, str) else "before" if moment < 0 else "after"]
    first, last = [f"layer {moment}"] * (moment < 2), [f"layer {moment - layers}"] * (moment >= layers - 2)
    return [*first, *last] or [f"layer {moment}"]


class Simulation:
    """A run's model and its phases on fake tensors; made and used under `Footprint.active`.

    They are the CPU's, which stand in for a GPU's of the same shapes and types, also where there is one: so the plan is the
    same wherever it is made. Compared with an H200's peaks in docs/benchmarks.md.
    """

    def __init__(self, run: PlannedRun, hf_config: PretrainedConfig, footprint: Footprint) -> None:
        self.run, self.footprint = run, footprint
        self.phase = "load"
        self.model = self._build(hf_config)
        self.layers = decoder_layers(base_model(self.model), num_layers(hf_config))
        self._follow_layers()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._own_gradient)

    def _build(self, hf_config: PretrainedConfig) -> Any:
        from transformers import AutoModelForCausalLM

        run, footprint = self.run, self.footprint
        footprint.kind, footprint.mark = "weights", ("load", "build")
        dtype = load_dtype(run.quant, run.compute_dtype, mixed=run.mixed)
        attn = standard_attention(hf_config)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=attn)
        if run.model.gradient_checkpointing:
            enable_checkpointing(model)
        footprint.mark = ("load", "quantize")
        if run.adapter.freezes_base:
            fake_storage.apply(run.quant, model, compute_dtype=run.compute_dtype)
            if not run.mixed:
                move_rest_to(model, run.compute_dtype)
        use_fused_layers(model, unchecked=True)
        self.standard_attention = str(model.config._attn_implementation)
        footprint.kind, footprint.mark = "adapter", ("load", "adapt")
        adapted = run.adapter.apply(model, seed=0)
        if run.workload.flat:
            use_packed_attention(adapted)
        return adapted.train()

    # --- which layer is at work ---------------------------------------------------------------------------------

    def _follow_layers(self) -> None:
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda *_, i=index: self._enter(i))
            layer.register_forward_hook(lambda module, args, output, i=index: self._leave(i, output))

    def _moment(self, index: int) -> None:
        """Layer ``index`` is at work; -1: before the first, their number: after the last."""
        self.footprint.mark = (self.phase, index, len(self.layers))

    def _enter(self, index: int) -> None:
        self.footprint.kind = "activations"  # in the backward pass: those recomputed under checkpointing
        if self.phase != "backward":
            self._moment(index)

    def _leave(self, index: int, output: Any) -> None:
        if self.phase == "backward":
            self.footprint.kind = "workspace"
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._moment(index))
        if index == len(self.layers) - 1:
            self.footprint.kind = "head and loss"
            self._moment(len(self.layers))

    def _own_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.footprint.assign(parameter.grad, "gradients")

    # --- phases -------------------------------------------------------------------------------------------------

    def _begin(self, phase: str, *, kind: str = "activations", index: int = -1) -> None:
        self.phase, self.footprint.kind = phase, kind
        self._moment(index)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        dtype = self.run.compute_dtype
        enabled = self.run.mixed and dtype != torch.float32
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            yield

    def train(self) -> None:
        """One optimizer step of those after the first: it finds gradients and the optimizer's state there."""
        work = self.run.workload
        batch = _batch(work.train, work.supervised, flat=work.flat)
        with _disable_current_modes():  # 8-bit optimizers make tables of code points from values
            optimizer = self.run.build_optimizer(self.trained)
        self.footprint.mark, self.footprint.kind = (), "gradients"  # those of the step before
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.footprint.kind = "optimizer"
        optimizer.step()  # makes its state
        self._begin("forward")
        with self._autocast():
            total = loss_sum(self.model, batch, self.run.loss) / 1024
        optimizer.zero_grad()  # Lightning's order: the forward pass still finds the last step's gradients
        self._begin("backward", kind="workspace", index=len(self.layers))
        total.backward()
        del total
        self._begin("optimizer", kind="workspace")
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        optimizer.step()
        self.optimizer = optimizer  # its state lives on

    def evaluate(self) -> None:
        """One validation batch."""
        work = self.run.workload
        batch = _batch(work.val, work.val_supervised, flat=work.flat)
        self._begin("eval")
        self.model.eval()
        with torch.no_grad(), self._autocast():
            loss_sum(self.model, batch)

    def generate(self) -> None:
        """The prompts at once; then a token each, when the cache is at its longest."""
        work, footprint = self.run.workload, self.footprint
        rows, width = len(work.prompts), max(work.prompts)
        ids = torch.zeros(rows, width, dtype=torch.int64)
        self._begin("generate")
        before = footprint.live["activations"]
        with torch.no_grad(), self._autocast(), attention(self.model, self.standard_attention):
            cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        if cache is None:
            return
        # Worked out, not run: a cache grows by concatenation, which holds one layer's old and new tensors at once.
        full = (footprint.live["activations"] - before) * (width + work.new_tokens) // width
        longest = footprint.live.copy()
        longest["activations"] = before + full + full // max(1, len(self.layers))
        footprint.peaks["generate", "cache"] = longest
        heap = footprint.blocks
        each = full // max(1, 2 * len(self.layers))  # keys and values of a layer
        heap["large" if each >= footprint.keeps_below else "small"] += longest.total() - heap.total()
        footprint.heap["generate", "cache"] = heap


def _batch(lengths: Iterable[int], supervised: int, *, flat: bool) -> PackedBatch:
    """A batch of that shape; token ids are all 0."""
    lengths = list(lengths)
    if flat:
        ids = torch.zeros(1, sum(lengths), dtype=torch.int64)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        cumulative = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    else:
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        positions = cumulative = None
    index = torch.arange(min(supervised, ids.numel()))
    return PackedBatch(ids, ids.clone(), positions, cumulative, index, sum(lengths))

"""The memory plan of one of several ranks under FSDP: an estimate, where `plan` is a count.

What a rank computes on is run as `plan` runs it, with the weights in the type they are gathered in. What it keeps follows from
the shapes: its share of weights, gradients and optimizer state, and what it has gathered for the moment (`sharding`): the root
from the forward to the end of the backward pass; of the layers the one at work, the next one's, which is fetched meanwhile, and
the buffer that one of them is copied out of; in the backward pass whole gradients, in the type of the products and once more in
fp32 while they are sent. `unverified` on several GPUs; torch frees some of it earlier than is counted on here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lmlab.models.depth import alike, num_layers, with_layers
from lmlab.models.footprint import Footprint
from lmlab.models.memory import PHASES
from lmlab.models.plan import KINDS, MemoryPlan, PlannedRun, Simulation, moments
from lmlab.models.traffic import REDUCED, Groups, Part, gathered, groups_of

if TYPE_CHECKING:
    from collections import Counter

LAYERS_AT_ONCE = 3
"""Gathered: the one at work, the next, and a buffer being copied out of."""


def gathered_size(run: PlannedRun) -> int | None:
    """Bytes of a weight's value as ranks gather it; None: as it is stored."""
    autocast = run.mixed and run.compute_dtype != torch.float32
    return run.compute_dtype.itemsize if autocast else None


def run_groups(run: PlannedRun) -> Groups:
    """The groups of a run's model, quantized and adapted, built without memory."""
    layers = num_layers(run.hf_config)
    same = alike(run.hf_config) and run.adapter.same_in_all_layers and layers is not None
    config = with_layers(run.hf_config, 1) if same else run.hf_config
    footprint = Footprint()
    with footprint.active():
        return groups_of(Simulation(run, config, footprint).model, times=layers if same and layers else 1)


def sharded_plan(run: PlannedRun, groups: Groups, ranks: int) -> MemoryPlan:
    """Planned peaks of the phases on one rank of ``ranks``.

    Args:
        groups: `run_groups` of the run.
    """
    size = gathered_size(run)
    peaks, _, layers = moments(replace(run, mixed=False) if size else run)
    whole = next(live for (phase, _), live in peaks.items() if phase == "optimizer")
    held = _held(groups, ranks, whole, freezes_base=run.adapter.freezes_base)
    # Of the optimizer's own temporaries too a rank has those of its share.
    shrunk = held["gradients"] / max(1, whole["gradients"])
    now = _gathered_now(groups, ranks, size)
    phases = {}
    for phase in PHASES:
        live = [counted for (name, _), counted in peaks.items() if name == phase]
        if live:
            highest = max(live, key=_passing)
            scale = shrunk if phase == "optimizer" else 1.0
            passing = {} if phase == "load" else {k: round(scale * max(0, highest[k])) for k in PASSING}
            kept = {k: v for k, v in held.items() if phase != "load" or k in ("weights", "adapter")}
            phases[phase] = {kind: 0 for kind in KINDS} | kept | {"gathered": now.get(phase, 0)} | passing
    return MemoryPlan(phases, layers)


PASSING = ("activations", "head and loss", "workspace")
"""Kinds that a rank has of its own micro-batch."""


def _passing(live: Counter[str]) -> int:
    return sum(live[kind] for kind in PASSING)


def _held(groups: Groups, ranks: int, whole: Counter[str], *, freezes_base: bool) -> dict[str, int]:
    """Bytes of a rank's shares by kind."""

    def shares(parts: Sequence[Part]) -> int:
        return sum(part.share(ranks) * part.stored for part in parts)

    trained = [part for part in groups.parts if part.trained]
    frozen = [part for part in groups.parts if not part.trained]
    gradients = shares(trained)
    states = whole["optimizer"] / max(1, whole["gradients"])  # of AdamW two moments
    return {
        "weights": shares(frozen if freezes_base else [*frozen, *trained]),
        "adapter": gradients if freezes_base else 0,
        "gradients": gradients,
        "optimizer": round(states * gradients),
    }


def _gathered_now(groups: Groups, ranks: int, size: int | None) -> dict[str, int]:
    """Bytes of whole weights and gradients on a rank at the worst moment of a phase."""

    def trained(parts: Sequence[Part]) -> list[Part]:
        return [part for part in parts if part.trained]

    layer = max(groups.layers, key=lambda parts: gathered(parts, ranks, size), default=())
    weights = gathered(groups.root, ranks, size) + LAYERS_AT_ONCE * gathered(layer, ranks, size)
    of_root, of_layer = trained(groups.root), trained(layer)
    sending = max(
        gathered(of_layer, ranks, size) + gathered(of_layer, ranks, REDUCED),
        gathered(of_root, ranks, REDUCED),
    )
    backward = weights + gathered(of_root, ranks, size) + sending
    return {"forward": weights, "backward": backward, "eval": weights, "generate": weights}

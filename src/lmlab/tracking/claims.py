"""What the field says of LoRA and QLoRA against full fine-tuning, checked on the runs at hand and nothing else.

Hu et al. 2021 (LoRA, arXiv 2106.09685) and Dettmers et al. 2023 (QLoRA, arXiv 2305.14314): a small share of the
parameters trained, less memory, quality as good, the base in as few bits as its format says. Runs are compared that
share everything but adapter, storage and optimizer (each at its best of those), in pairs of one seed. With three seeds no test of significance
means much, so the criteria are plain ones and stand beside each verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmlab.tracking.groups import MEASURES, Group, Spread
from lmlab.tracking.values import aligned

Verdict = Literal["holds", "does not hold", "cannot be told"]

NOMINAL_BITS = {"fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "nf4": 4, "fp4": 4}
"""Bits of one weight without scales and other state, of every storage that is not plain fp32."""
BITS_TOLERANCE = 0.1
"""Share of the nominal bits that scales and other state may add."""
_VARIED = ("adapter/", "quant/", "optim/")

CRITERIA = {
    "trained parameters": "holds if the adapter trains fewer parameters than full fine-tuning",
    "peak memory": "holds if every pair of one seed has the lower peak with the adapter, does not if none has; at least 2 pairs",
    "memory growth": "as peak memory, of what lies above Python and its libraries",
    "val/loss": "holds if the mean paired difference of the best val/loss is at most full fine-tuning's range over its "
    "seeds, does not if it is more and every pair is worse; at least 2 pairs",
    "exact match": "the same of the last exact match, where less is worse",
    "bits per parameter": f"holds if the base is stored in at most {BITS_TOLERANCE:.0%} more bits than its format's",
}
"""About what -> when a claim of it holds."""


@dataclass(frozen=True)
class Claim:
    """One claim of one group, what becomes of it, and the numbers."""

    about: str
    group: Group
    verdict: Verdict
    numbers: str


@dataclass(frozen=True)
class Paired:
    """Differences of a figure to a baseline, by seed.

    Attributes:
        alone: seeds that only one of the two has.
    """

    differences: dict[int, float]
    alone: tuple[int, ...] = ()

    @property
    def spread(self) -> Spread | None:
        """Their mean and range; None without a pair."""
        return Spread(tuple(self.differences.values())) if self.differences else None


def paired(group: Group, baseline: Group, figure: str) -> Paired:
    """``group`` less ``baseline`` for each seed that finished in both."""
    ours, theirs = group.by_seed(figure), baseline.by_seed(figure)
    both = sorted(ours.keys() & theirs.keys())
    return Paired(
        {seed: ours[seed] - theirs[seed] for seed in both}, tuple(sorted(ours.keys() ^ theirs.keys()))
    )


def claims(groups: Sequence[Group]) -> list[Claim]:
    """Every claim that these groups allow to be checked, ordered by what it is about."""
    found: list[Claim] = []
    compared = _best_optimized(groups)
    for group in filter(_adapted, compared):
        full = full_tuning(group, compared)
        if full is not None:
            found += [_trained(group, full), _memory("peak memory", "peak", group, full)]
            found += [_memory("memory growth", "growth", group, full), _loss(group, full)]
            found += _matches(group, full)
        found += _bits(group)
    order = list(CRITERIA)
    return sorted(found, key=lambda claim: order.index(claim.about))


def full_tuning(group: Group, compared: Sequence[Group]) -> Group | None:
    """The full fine-tuning that shares all but adapter, storage and optimizer with ``group``."""
    for other in compared:
        full = other.settings.get("adapter/kind") == "none"
        if full and _without(other, *_VARIED) == _without(group, *_VARIED):
            return other
    return None


def without_full_tuning(groups: Sequence[Group]) -> list[Group]:
    """Groups with an adapter that have nothing to be compared with."""
    compared = _best_optimized(groups)
    return [group for group in filter(_adapted, compared) if full_tuning(group, compared) is None]


def _adapted(group: Group) -> bool:
    return group.settings.get("adapter/kind") in ("lora", "qlora")


def _without(group: Group, *prefixes: str) -> dict[str, Any]:
    return {key: value for key, value in group.settings.items() if not key.startswith(prefixes)}


def _best_optimized(groups: Sequence[Group]) -> list[Group]:
    """Of finished groups that differ in nothing but the optimizer the one with the lowest best val/loss.

    An adapter wants another learning rate than full fine-tuning, so each is taken at its best.
    """
    chosen: list[Group] = []
    for group in sorted((g for g in groups if g.finished), key=_best_loss):
        if not any(_without(group, "optim/") == _without(other, "optim/") for other in chosen):
            chosen.append(group)
    return sorted(chosen, key=lambda group: group.place)


def _best_loss(group: Group) -> float:
    best = group.spread("best")
    return best.mean if best else math.inf


def _show(figure: str) -> Callable[[float], str]:
    return next(measure.show for measure in MEASURES if measure.key == figure)


def _trained(group: Group, full: Group) -> Claim:
    ours, theirs = group.spread("trained"), full.spread("trained")
    if ours is None or theirs is None or theirs.mean <= 0:
        return Claim("trained parameters", group, "cannot be told", "the runs do not say how many they train")
    show = _show("trained")
    numbers = f"{show(ours.mean)} of {show(theirs.mean)} trained: {ours.mean / theirs.mean:.2%}"
    return Claim("trained parameters", group, "holds" if ours.high < theirs.low else "does not hold", numbers)


def _memory(about: str, figure: str, group: Group, full: Group) -> Claim:
    ours, theirs = group.spread(figure), full.spread(figure)
    if ours is None or theirs is None:
        return Claim(about, group, "cannot be told", "not measured")
    pairs = paired(group, full, figure)
    ratio = f", {ours.mean / theirs.mean:.2f} times as much" if theirs.mean > 0 else ""
    numbers = f"{aligned(ours.mean)} GB against {aligned(theirs.mean)} GB{ratio}{_of_pairs(pairs, ' GB')}"
    changes = list(pairs.differences.values())
    if len(changes) < 2:
        verdict: Verdict = "cannot be told"
    elif all(change < 0 for change in changes):
        verdict = "holds"
    else:
        verdict = "does not hold" if all(change >= 0 for change in changes) else "cannot be told"
    return Claim(about, group, verdict, numbers)


def _loss(group: Group, full: Group) -> Claim:
    return _quality("val/loss", "best", 1.0, "", group, full)


def _matches(group: Group, full: Group) -> list[Claim]:
    there = group.spread("exact_match") and full.spread("exact_match")
    return [_quality("exact match", "exact_match", -1.0, " points", group, full)] if there else []


def _quality(about: str, figure: str, sign: float, unit: str, group: Group, full: Group) -> Claim:
    """``sign`` is 1 where lower is better, -1 where higher is."""
    ours, theirs, show = group.spread(figure), full.spread(figure), _show(figure)
    if ours is None or theirs is None:
        return Claim(about, group, "cannot be told", "not measured")
    pairs, scale = paired(group, full, figure), 100.0 if unit else 1.0
    noise = theirs.high - theirs.low
    numbers = f"{show(ours.mean)} against {show(theirs.mean)}{_of_pairs(pairs, unit, scale)}"
    if pairs.spread is None or len(pairs.differences) < 2:
        return Claim(about, group, "cannot be told", numbers)
    numbers += f"; full fine-tuning's range over {len(theirs.values)} seeds is {aligned(noise * scale)}{unit}"
    if sign * pairs.spread.mean <= noise:
        return Claim(about, group, "holds", numbers)
    all_worse = all(sign * change > 0 for change in pairs.differences.values())
    return Claim(about, group, "does not hold" if all_worse else "cannot be told", numbers)


def _of_pairs(pairs: Paired, unit: str, scale: float = 1.0) -> str:
    spread = pairs.spread
    if spread is None:
        return "; no seed finished in both"
    if len(pairs.differences) == 1:
        return f"; one pair only, {spread.mean * scale:+#.3g}{unit}"
    return (f"; {len(pairs.differences)} pairs differ by {spread.mean * scale:+#.3g}{unit} "
            f"({spread.low * scale:+#.3g} to {spread.high * scale:+#.3g})")  # fmt: skip


def _bits(group: Group) -> list[Claim]:
    kind, bits = str(group.settings.get("quant/kind")), group.spread("bits")
    if kind not in NOMINAL_BITS or bits is None:
        return []
    nominal = NOMINAL_BITS[kind]
    numbers = f"{aligned(bits.mean)} bits stored for each weight of the base, {nominal} of them the number itself ({kind})"
    good = bits.high <= nominal * (1 + BITS_TOLERANCE)
    return [Claim("bits per parameter", group, "holds" if good else "does not hold", numbers)]

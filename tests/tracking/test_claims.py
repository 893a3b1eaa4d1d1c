"""What is claimed of adapters: verdicts and numbers on runs made so that a head can do the sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab.tracking import claims
from lmlab.tracking.groups import Entry

from .pages import groups_of, page_of, small_run


def verdicts(entries: list[Entry]) -> dict[str, str]:
    return {claim.about: claim.verdict for claim in claims.claims(groups_of(entries))}


def pair_of(tmp_path: Path, *, seeds: int = 3, **lora: Callable[[int], Any]) -> list[Entry]:
    """Full fine-tuning (best 1.0, 1.1, 1.2; peak 2 GB) and a LoRA made by functions of the seed."""
    made = []
    for seed in range(1, seeds + 1):
        ends = {0: 4.0, 20: 0.9 + seed / 10}
        made.append(
            Entry(f"none seed={seed}", small_run(tmp_path / f"n{seed}", seed=seed, losses=ends, peak=2.0))
        )
        told: dict[str, Any] = {"trained": 50, "losses": ends, "peak": 1.0} | {
            name: value(seed) for name, value in lora.items()
        }
        made.append(
            Entry(f"lora seed={seed}", small_run(tmp_path / f"l{seed}", adapter="lora", seed=seed, **told))
        )
    return made


def test_claims_that_hold(tmp_path: Path) -> None:
    found = claims.claims(groups_of(pair_of(tmp_path)))
    assert {claim.verdict for claim in found} == {"holds"}
    numbers = {claim.about: claim.numbers for claim in found}
    assert numbers["trained parameters"] == "50 of 1,000 trained: 5.00%"
    assert (
        numbers["peak memory"]
        == "1.000 GB against 2.000 GB, 0.50 times as much; 3 pairs differ by -1.00 GB (-1.00 to -1.00)"
    )
    assert numbers["memory growth"].startswith("0.5000 GB against 1.500 GB, 0.33 times as much")
    assert numbers["val/loss"] == (
        "1.100 against 1.100; 3 pairs differ by +0.00 (+0.00 to +0.00); full fine-tuning's range over 3 seeds is 0.2000"
    )
    assert list(numbers) == [
        "trained parameters",
        "peak memory",
        "memory growth",
        "val/loss",
    ]


def test_claims_that_do_not_hold(tmp_path: Path) -> None:
    worse = pair_of(
        tmp_path,
        losses=lambda s: {0: 4.0, 20: 1.2 + s / 10},
        trained=lambda s: 1000,
        peak=lambda s: 2.0 + s / 10,
    )
    assert verdicts(worse) == {"trained parameters": "does not hold", "peak memory": "does not hold",
                               "memory growth": "does not hold", "val/loss": "does not hold"}  # fmt: skip


def test_quality_is_judged_by_the_range_of_full_fine_tuning(tmp_path: Path) -> None:
    for place, (away, verdict) in enumerate(((0.19, "holds"), (0.21, "does not hold"), (-0.5, "holds"))):
        made = pair_of(tmp_path / str(place), losses=lambda s, away=away: {0: 4.0, 20: 0.9 + s / 10 + away})
        assert verdicts(made)["val/loss"] == verdict


def test_of_several_learning_rates_the_best_is_compared(tmp_path: Path) -> None:
    ends = {("none", 0.1): 1.0, ("none", 0.2): 0.5, ("lora", 0.1): 0.7, ("lora", 0.2): 3.0}
    made = [Entry(f"{kind} {lr} seed={seed}", small_run(tmp_path / f"{kind}{lr}{seed}", adapter=kind, seed=seed, optim={"lr": lr}, losses={0: 4.0, 20: end + seed / 100}))
            for (kind, lr), end in ends.items() for seed in (1, 2)]  # fmt: skip
    found = [claim for claim in claims.claims(groups_of(made)) if claim.about == "val/loss"]
    assert [(claim.group.label, claim.numbers[:40]) for claim in found] == [
        ("lora 0.1", "0.7150 against 0.5150; 2 pairs differ by")
    ]


def test_pairs_that_disagree_refute_nothing(tmp_path: Path) -> None:
    made = pair_of(tmp_path, losses=lambda s: {0: 4.0, 20: 0.9 + s / 10 + (1.0 if s == 1 else 0.0)})
    found = claims.claims(groups_of(made))
    loss = next(claim for claim in found if claim.about == "val/loss")
    assert (loss.verdict, "differ by +0.333" in loss.numbers) == ("cannot be told", True)


@pytest.mark.usefixtures("undrawn")
def test_claims_that_cannot_be_told(tmp_path: Path) -> None:
    one = verdicts(pair_of(tmp_path / "one", seeds=1))
    assert (one["peak memory"], one["val/loss"], one["trained parameters"]) == (
        "cannot be told",
        "cannot be told",
        "holds",
    )
    mixed = pair_of(tmp_path / "mixed", peak=lambda s: 1.9 if s < 3 else 2.1)
    assert verdicts(mixed)["peak memory"] == "cannot be told"
    alone = [Entry("lora", small_run(tmp_path / "l", adapter="lora")),
             Entry("none", small_run(tmp_path / "n", data={"level": 2}))]  # fmt: skip
    assert verdicts(alone) == {}
    assert "no finished full fine-tuning with the same settings" in page_of(alone).words
    assert "Claims" not in page_of([Entry("none", small_run(tmp_path / "m"))]).words


@pytest.mark.parametrize(("quant", "bits", "verdict"), [("nf4", 4.28, "holds"), ("nf4", 4.5, "does not hold"), ("int8", 8.14, "holds"), ("bf16", 32.0, "does not hold")])  # fmt: skip
def test_bits_are_held_against_their_format(tmp_path: Path, quant: str, bits: float, verdict: str) -> None:
    run = small_run(tmp_path / "q", adapter="lora", quant=quant, bits=bits)
    assert verdicts([Entry("q", run)]) == {"bits per parameter": verdict}

"""What two ranks send each other in an optimizer step: one reduction of the gradients, one of the counts, however it is cut."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from exact import bring_up, on_two_ranks, options, prepared_data, tiny_model, write_records
from lightning.pytorch import Callback

pytestmark = pytest.mark.slow


class Steps(Callback):
    """Counts collectives of the steps alone, validation and start aside."""

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_train_start(self, *told: object) -> None:
        self.profile.start()

    def on_train_end(self, *told: object) -> None:
        self.profile.stop()

    def counts(self) -> Counter[str]:
        names = [event.name for event in self.profile.events() or ()]
        return Counter(name for name in names if name.startswith("gloo:"))


def counted(records: str, root: str) -> dict[tuple[str, int, int], Counter[str]]:
    """Runs on each of two ranks: (strategy, accumulation, steps) -> collectives."""
    prepared, found = prepared_data(Path(records)), {}
    for strategy, accumulate, steps in CASES:
        chosen = options(1, accumulate, devices=2, strategy=strategy)
        module, trainer, data = bring_up(tiny_model(), prepared, chosen, Path(root), max_steps=steps)
        steps_only = Steps()
        trainer.callbacks.append(steps_only)
        trainer.fit(module, data)
        found[strategy, accumulate, steps] = steps_only.counts()
    return found


CASES = [("ddp", accumulate, steps) for accumulate in (1, 4) for steps in (2, 5)] + [
    ("fsdp", accumulate, steps) for accumulate in (1, 4) for steps in (2, 5)
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int, int], Counter[str]]]:
    folder = tmp_path_factory.mktemp("collectives")
    return on_two_ranks(counted, str(write_records(folder / "records.jsonl")), str(folder))


def per_step(
    found: dict[tuple[str, int, int], Counter[str]], strategy: str, accumulate: int
) -> dict[str, float]:
    """What three more steps cost more, divided by three."""
    less, more = found[strategy, accumulate, 2], found[strategy, accumulate, 5]
    return {name: (more[name] - less[name]) / 3 for name in more if more[name] != less[name]}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_ddp_reduces_gradients_once_per_optimizer_step(
    ranks: list[dict[tuple[str, int, int], Counter[str]]], accumulate: int
) -> None:
    """The model fits one bucket, so: one all-reduce of gradients and one of counts."""
    for found in ranks:
        assert per_step(found, "ddp", accumulate) == {"gloo:all_reduce": 2}


def test_fsdp_reduces_shares_in_every_micro_batch(
    ranks: list[dict[tuple[str, int, int], Counter[str]]],
) -> None:
    """Two layers and the root are reduced apart, four times as often with four micro-batches; counts and norm once a step."""
    for found in ranks:
        one, four = (per_step(found, "fsdp", accumulate) for accumulate in (1, 4))
        assert one.keys() == four.keys()
        assert sum(four.values()) - 1 == 4 * (sum(one.values()) - 1)

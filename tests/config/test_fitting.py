"""What is advised after an out-of-memory error can be typed."""

from __future__ import annotations

import pytest

from lmlab.fitting import alternatives

from .conftest import Compose

HALVED = "trainer.batch_size=1 trainer.accumulate_grad_batches=2"
CHECKPOINTED = "model.gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("words", "advised"),
    [
        ([], [HALVED, CHECKPOINTED, "quant=nf4", f"quant=nf4 {CHECKPOINTED}"]),
        (["trainer.strategy=fsdp", "trainer.devices=2"], [HALVED, CHECKPOINTED]),
        (["trainer.compile=true", "quant=int8"], [HALVED, "quant=nf4"]),
        (["adapter=none"], [HALVED, CHECKPOINTED]),
    ],
)
def test_what_is_advised_is_allowed(run_config: Compose, words: list[str], advised: list[str]) -> None:
    config = run_config("trainer.batch_size=2", *words)
    assert [text for text, _ in alternatives(config)] == advised

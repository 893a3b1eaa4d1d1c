"""What the machine decides: bf16 on a CPU's tiles for models wide enough, never against what was configured."""

from __future__ import annotations

import platform

import pytest

from lmlab.models import hardware
from lmlab.models.hardware import AMX_WIDTH, choose_hardware


@pytest.mark.parametrize(
    ("tiles", "hidden_size", "precision"),
    [
        (True, AMX_WIDTH, "bf16"),
        (True, AMX_WIDTH - 1, "fp32"),
        (True, None, "bf16"),
        (False, 4096, "fp32"),
    ],
)
def test_bf16_on_a_cpu_is_for_tiles_and_wide_models(
    monkeypatch: pytest.MonkeyPatch, tiles: bool, hidden_size: int | None, precision: str
) -> None:
    monkeypatch.setattr(hardware, "_has_amx", lambda: tiles)
    chosen = choose_hardware("cpu", "auto", hidden_size=lambda: hidden_size)
    assert chosen.precision == precision
    assert ("narrower" in chosen.reason) == (tiles and precision == "fp32")


def test_the_start_table_says_whether_freed_blocks_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(*, checkpointing: bool) -> str:
        chosen = choose_hardware("cpu", "fp32")
        rows = chosen.table(
            flat=True,
            checkpointing=checkpointing,
            compiled=False,
            optimizer="adamw",
            chunked=True,
            adapter="lora",
        )
        return dict(rows)["memory"]

    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert ("returned" in memory(checkpointing=True)) == (platform.libc_ver()[0] == "glibc")
    assert "returned" not in memory(checkpointing=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4096")
    assert "returned" not in memory(checkpointing=True)


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_a_configured_precision_is_taken(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setattr(hardware, "_has_amx", lambda: asked == "fp32")
    assert choose_hardware("cpu", asked, hidden_size=lambda: 64).precision == asked

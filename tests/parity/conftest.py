"""What the parity tests share: references stay what their library ships."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from lmlab.models.fused import FusedRotary


@pytest.fixture(autouse=True)
def _library_as_shipped() -> Iterator[None]:
    """Switching a model's rotations switches them for its whole library module: undone after each test."""
    yield
    for module in list(sys.modules.values()):
        found = vars(module).get("apply_rotary_pos_emb") if hasattr(module, "__dict__") else None
        if isinstance(found, FusedRotary):
            module.apply_rotary_pos_emb = found.own  # type: ignore[attr-defined]

"""Shared test set-up: one thread (tests run two at a time on two cores), a private cache, no network, no W&B login."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two test processes on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
for name in ("COLUMNS", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "LMLAB_OUTPUT_ROOT"):
    os.environ.pop(name, None)

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEST_DATA = Path(os.environ.get("LMLAB_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    """One cache per test session, shared by the two workers, so that the embedded corpus is read once."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if worker_id != "master" else base
    os.environ["LMLAB_CACHE"] = str(root / "lmlab-cache")
    os.environ["NETRC"] = str(root / "no-netrc")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; a test that asks for it skips where it is absent."""
    if not TEST_DATA.is_dir():
        pytest.skip(f"real data is absent: {TEST_DATA} (set LMLAB_TEST_DATA)")
    return TEST_DATA

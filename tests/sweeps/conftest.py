"""Studies of tests do not wait for the disk: SQLite's syncs are nine tenths of a trial that trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_sync() -> Iterator[None]:
    event = pytest.importorskip("sqlalchemy.event", reason="pip install 'lmlab[optuna]'")
    from sqlalchemy.engine import Engine

    def quick(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", quick)
    yield
    event.remove(Engine, "connect", quick)

"""Calls that may take as long as a server does, made beside the training."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class Errands:
    """Calls made one after another in a thread of their own; one that fails or never ends is replaced by another."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], object], Callable[[], object]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._given_up = False

    def add(self, call: Callable[[], object], *, instead: Callable[[], object]) -> None:
        """Have ``call`` made when those before it are; ``instead`` must neither raise nor wait."""
        with self._changed:
            self._waiting.append((call, instead))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb-tables", daemon=True)
            self._thread.start()

    def finish(self, timeout: float) -> None:
        """Wait until all are made, ``timeout`` seconds at most; what is left then is replaced. The thread ends."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout)
            self._given_up = True
            self._changed.notify_all()
            left = list(self._waiting)
        for _, instead in left:
            instead()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._given_up)
                if self._given_up:
                    return
                call, instead = self._waiting[0]
            failed = False
            try:
                call()
            except Exception:  # a server that is away, and whatever else: the replacement says what is wrong
                failed = True
            with self._changed:
                if self._given_up:
                    return
                if failed:
                    instead()
                self._waiting.popleft()
                self._changed.notify_all()

"""Files of JSON lines that only grow: every line is with the system at once, and what a full disk does not take waits."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """``value`` with non-finite numbers as strings, as JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


class Lines:
    """A file that only grows by whole lines. What a full disk does not take is kept and written as soon as it does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._waiting = b"\n"  # a line torn by a kill must not spoil the next one

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line; a disk that takes nothing costs one line on stderr, not the run."""
        line = json.dumps(plain(row), ensure_ascii=False) + "\n"
        had_waited = len(self._waiting) > 1
        self._waiting += line.encode("utf-8", errors="backslashreplace")
        error = self._write()
        if error is not None and not had_waited:
            print(
                f"warning: {self.path.name} cannot be written ({error.strerror}): its lines are kept until it can",
                file=sys.stderr,
            )

    def _write(self) -> OSError | None:
        """As much of what waits as the disk takes; why it took no more."""
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Try once more what waits, and close; what is lost then is said."""
        if self._file < 0:
            return
        if error := self._write():
            lost = self._waiting.count(b"\n")
            print(f"warning: {lost} lines of {self.path.name} were lost ({error.strerror})", file=sys.stderr)
        os.close(self._file)
        self._file = -1

"""On PYTHONPATH this breaks the invariant that LMLAB_TEST_BREAKS names, in every Python started: see breakages.py."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tests.checks.breakages import BREAKAGES

MODULE, BREAK = BREAKAGES[os.environ["LMLAB_TEST_BREAKS"]]


class _BreakAfterImport(importlib.abc.MetaPathFinder):
    """Lets the module be found as usual and breaks it when it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            BREAK(module, setattr)

        loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _BreakAfterImport())

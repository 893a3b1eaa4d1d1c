"""A plugin of lmlab's that only looks at the clock: when the first optimizer step is done, what validation before it took.

Used by startup.py as `plugins=[startup_probe] +callbacks.probe.kind=startup_probe`; writes to the file named by
``$STARTUP_PROBE``. The modules imported by then are listed too, so that importing them can be timed apart.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

from lmlab.registry import callbacks
from lmlab.training.options import CallbackConfig


@callbacks.register
class StartupProbe(CallbackConfig):
    """See the module."""

    kind: Literal["startup_probe"]

    def build(self) -> Any:
        from lightning.pytorch import Callback

        class Probe(Callback):
            def __init__(self) -> None:
                self.fit_began = time.time()
                self.validation_began = 0.0
                self.validation = 0.0
                self.done = False

            def on_sanity_check_start(self, *args: Any) -> None:
                self.validation_began = time.time()

            def on_sanity_check_end(self, *args: Any) -> None:
                self.validation = time.time() - self.validation_began

            def on_train_batch_end(self, *args: Any) -> None:
                if self.done:
                    return
                self.done = True
                seen = {
                    "stepped": time.time(),
                    "fit_began": self.fit_began,
                    "validation": self.validation,
                    "modules": list(sys.modules),
                }
                Path(os.environ["STARTUP_PROBE"]).write_text(json.dumps(seen), encoding="utf-8")

        return Probe()

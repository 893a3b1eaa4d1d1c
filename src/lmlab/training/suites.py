"""The config of tasks during training, apart from what runs them (`harness`): reading a run's config imports no Lightning."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lmlab.records import UserError
from lmlab.registry import callbacks
from lmlab.training.options import CallbackConfig, RunTools


@callbacks.register
class HarnessConfig(CallbackConfig):
    """Tasks of the lm-evaluation-harness while training, logged as ``eval/<task>/<metric>``.

    Attributes:
        suites: names of tasks.
        suite_path: a folder of task files of one's own.
        every_n_steps: besides step 0 and the end; null means at every validation.
        limit: only the first so many documents of each task.
        batch_size: rows in one forward pass.
    """

    kind: Literal["harness"]
    suites: list[str]
    suite_path: str | None
    every_n_steps: int | None = Field(ge=1)
    limit: int | None = Field(ge=1)
    batch_size: int = Field(ge=1)

    def check(self) -> None:
        """Load the tasks once, so that what is missing is said before the run begins."""
        if not self.suites:
            fix = "callbacks.harness.suites=[TASK,...]"
            raise UserError("no task named", where="callbacks.harness.suites", fix=fix)
        self._load()

    def _load(self) -> dict[str, Any]:
        from lmlab.evaluation.harness import load_suites

        return load_suites(self.suites, folder=self.suite_path)

    def build_in(self, tools: RunTools) -> Any:
        """See `lmlab.training.harness`."""
        from lmlab.training.harness import HarnessTasks

        every = {"every_n_steps": self.every_n_steps, "limit": self.limit, "batch_size": self.batch_size}
        return HarnessTasks(self._load(), tools, **every)

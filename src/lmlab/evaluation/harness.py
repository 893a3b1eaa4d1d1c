"""Tasks of EleutherAI's lm-evaluation-harness over a model that is loaded or in training, by their public library.

The model is used as it stands (adapted, quantized, in training): the harness gets a thin stand-in for it, since it would
otherwise set modes and tie weights anew. Task files of one's own are the harness's YAML; those with local ``data_files``
(``dataset_path: json``) need no network. github.com/EleutherAI/lm-evaluation-harness, docs/new_task_guide.md.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lmlab.modes import evaluating
from lmlab.records import UserError
from lmlab.registry import suggest

SEED = 1234
"""The harness's own for few-shot examples and for tasks that sample."""
GENERATED = 64
"""Forward passes that a generating task is taken to need, for what to make ready before."""


def load_suites(names: Sequence[str], *, folder: str | None) -> dict[str, Any]:
    """The tasks called ``names`` with their data.

    Args:
        folder: of task files of one's own, besides the harness's.

    Raises:
        UserError: the harness is not installed, an unknown task, or one whose file or data cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        fix = "pip install 'lmlab[eval]'"
        raise UserError("the lm-evaluation-harness is not installed", where="--suite", fix=fix) from error
    from pathlib import Path

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not Path(folder).is_dir():
        fix = "give the folder of your task files (.yaml)"
        raise UserError(f"no such folder: {folder}", where="--suite-path", fix=fix)
    # The harness's own 10,000 files take seconds to index: only where a name is not in the folder given.
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = _nearest(name, manager.all_tasks)
            fix = suggest(name, near) if near else "lm-eval ls tasks lists them"
            raise UserError(f"unknown task '{name}'", where="--suite", fix=fix)
    try:
        with untouched_random_state(), _quiet():
            loaded: dict[str, Any] = dict(manager.load(list(names)))
    except Exception as error:  # a task file is somebody's code, and its data may be anywhere
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UserError(
            f"the task cannot be loaded: {type(error).__name__}: {reason[:200]}",
            where=f"--suite {','.join(names)}",
            fix="mend its file, or put its data where the file says (dataset_path: json with local data_files needs no network)",
        ) from error
    return loaded


def run_suites(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    around: Callable[..., AbstractContextManager[Any]],
) -> dict[str, dict[str, float]]:
    """Metrics by task (or group) and metric; model, tokenizer and all random states are left as they were.

    Args:
        tasks: of `load_suites`.
        limit: documents of each task, the first ones.
        around: entered around all of it, with a number of forward passes (`TextGenerator.around`).
    """
    from lm_eval.evaluator import evaluate

    with untouched_random_state(), _quiet(), evaluating(model), around(GENERATED):
        _seed()
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        found = evaluate(
            lm=_language_model(model, tokenizer, batch_size),
            task_dict=tasks,  # type: ignore[arg-type]
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    made: Any = found
    sections = (made["results"], made.get("groups") or {})
    return {task: _metrics(about) for section in sections for task, about in section.items()}


def _metrics(about: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``; another filter's name is kept; what is no number (aliases, missing errors) is not."""
    values = {}
    for key, value in about.items():
        metric, _, filtered = key.partition(",")
        if isinstance(value, (int, float)) and filtered:
            values[metric if filtered == "none" else f"{metric}_{filtered}"] = float(value)
    return values


class _StandIn:
    """What the harness needs of a model; being no ``nn.Module``, it is put into no mode and its weights are not tied."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config, self.device = model.config, next(model.parameters()).device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        """transformers' own: tasks bring their own arguments."""
        return self.model.generate(**kwargs)


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models import huggingface

    made: Any = huggingface.HFLM
    # A copy, as the harness gives it a padding token.
    return made(
        pretrained=_StandIn(model),
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        backend="causal",
    )


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """The few of thousands that ``name`` may mean."""
    import difflib

    inside = [each for each in known if name in each][:4]
    return list(dict.fromkeys([*difflib.get_close_matches(name, known, n=4, cutoff=0.5), *inside]))[:6]


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Python's, numpy's and torch's random states (all devices') come back afterwards."""
    import numpy as np
    import torch

    own, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)


def _seed() -> None:
    import numpy as np
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, which would break a training's own, and no advice."""
    from unittest import mock

    import datasets
    from tqdm import tqdm

    def off(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **{**kwargs, "disable": True})

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with mock.patch("lm_eval.api.task.tqdm", off), mock.patch("lm_eval.models.huggingface.tqdm", off):
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()

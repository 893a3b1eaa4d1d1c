"""Hydra's ``-m`` without Hydra's launcher: the sweep is expanded here and every job runs in processes of its own.

Hydra's basic sweeper runs jobs in one process (CUDA memory, environment and W&B runs leak from job to job) and, with a
DDP launcher inside, each rank starts the whole sweep again (Lightning issue 11300). Here a job is composed, checked
and frozen, and then is nothing but a run directory for `lmlab.worker`.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lmlab import ranks
from lmlab.config.compose import to_run_config
from lmlab.journal import check_run_name, slug
from lmlab.records import RefusedError, UserError
from lmlab.sweeps.jobs import GridPoints, key_of
from lmlab.sweeps.search import STUDY, OptunaPoints, import_optuna
from lmlab.sweeps.space import Space, parse_space
from lmlab.tracking.results import RESULTS

GROUP = "hparams_search"


def expand(arguments: Sequence[str], config_loader: Any) -> list[list[str]]:
    """Every combination of the swept overrides (Hydra's grammar: lists, choice(), range(), glob()), in order.

    Raises:
        UserError: an ``interval()``, which has no finite set of values.
    """
    from hydra.core.override_parser.types import Transformer

    parser = OverridesParser.create(config_loader=config_loader)
    axes: list[list[str]] = []
    for override in parser.parse_overrides(list(arguments)):
        key = override.get_key_element()
        if override.is_interval_sweep():
            raise UserError(
                f"{override.input_line} has no list of values",
                where=key,
                fix="use choice(...) or range(...), or hparams_search=optuna, which draws from it",
            )
        if override.is_sweep_override():
            try:
                values = list(
                    override.sweep_iterator(transformer=Transformer.encode)
                    if override.is_choice_sweep()
                    else override.sweep_string_iterator()
                )
            except ValueError:  # a range whose step is 0
                values = []
            if not values:
                raise UserError(
                    f"{override.input_line} has no values", where=key, fix="check its ends, or the pattern"
                )
            axes.append([f"{key}={value}" for value in values])
        else:
            axes.append([str(override.input_line)])
    return [list(combination) for combination in itertools.product(*axes)]


def sweep(arguments: Sequence[str], *, config_loader: Any, master: Any) -> int:
    """Run the jobs of a multirun: every combination of ``arguments``, or what a search asks for; the exit code.

    Args:
        config_loader: Hydra's, which composes each job.
        master: the config of the command line without the swept values.
    """
    from lmlab.sweeps.launcher import run_jobs
    from lmlab.worker import patient_streams, requeue

    ranks.refuse_front_door()

    def compose(overrides: Sequence[str]) -> Any:
        return config_loader.load_sweep_config(master, list(overrides))

    told = [*_params(arguments, master), *arguments]
    with patient_streams():
        if OmegaConf.select(master, "hparams_search.kind", default="none") != "none":
            return requeue(_search(told, compose=compose, config_loader=config_loader))
        points = GridPoints(expand(told, config_loader))
        first = _first(compose, points.jobs[0])
        root, anew = _sweep_folder(first, points.keys), bool(first.overwrite)
        return requeue(run_jobs(points, compose=compose, root=root, options=first.launcher, overwrite=anew))


def _params(arguments: Sequence[str], master: Any) -> list[str]:
    """What ``hydra.sweeper.params`` of an experiment file sweeps, unless the command line says otherwise."""
    told = {key_of(argument) for argument in arguments}
    params = OmegaConf.select(master, "hydra.sweeper.params") or {}
    return [f"{key}={value}" for key, value in params.items() if key not in told]


def _search(arguments: Sequence[str], *, compose: Callable[[Sequence[str]], Any], config_loader: Any) -> int:
    """A search by Optuna. Its own settings are not among the jobs' overrides: each of them is a run to type as it is."""
    from rich.console import Console

    from lmlab.config.search import OptunaSearch
    from lmlab.sweeps.best import show_best
    from lmlab.sweeps.feasible import refuse_too_large
    from lmlab.sweeps.launcher import run_jobs

    import_optuna()
    own = [text for text in arguments if text.lstrip("+~").startswith(GROUP)]
    space = parse_space([text for text in arguments if text not in own], config_loader)
    first = _first(compose, [*own, *space.first()])
    search = OptunaSearch.model_validate(OmegaConf.to_container(first.hparams_search, resolve=True))
    if not space.axes:
        raise UserError(
            "a search without anything to search",
            where="hparams_search",
            fix="add ranges, as optim.lr='tag(log, interval(1e-4, 1e-2))' adapter.rank='choice(4, 8, 16)'",
        )
    if compose(space.first()).hparams_search.kind != "none":  # an experiment file asks for the search
        space = Space((*space.parts, f"{GROUP}=none"))
    root = _sweep_folder(first, [axis.name for axis in space.axes])
    of_another_kind = search.storage is None and not (root / STUDY).exists()
    if (root / RESULTS).exists() and of_another_kind and not first.overwrite:
        raise UserError(
            "this folder holds a sweep that is no search",
            where=str(root),
            fix="choose another run_name, or overwrite=true",
        )
    points = OptunaPoints(
        search,
        space,
        root,
        overwrite=first.overwrite,
        steps=(first.trainer.val_every_n_steps, first.trainer.max_steps),
    )

    def compose_point(overrides: Sequence[str]) -> Any:
        composed = compose(overrides)
        if points.asked(overrides):
            refuse_too_large(to_run_config(composed), search.memory_limit_gb)
        return composed

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    code = run_jobs(
        points, compose=compose_point, root=root, options=first.launcher, overwrite=bool(first.overwrite)
    )
    show_best(points, console)
    return code


def _first(compose: Callable[[Sequence[str]], Any], overrides: Sequence[str]) -> Any:
    """The config of a point before there is any.

    Raises:
        UserError: what is wrong with it, but for a combination that cannot train: that is a row of the sweep.
    """
    own = [text for text in overrides if text.lstrip("+~").startswith(GROUP)]
    for override in OverridesParser.create().parse_overrides(own):
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line} is many searches",
                where=override.get_key_element(),
                fix="write one value",
            )
    composed = compose(overrides)
    with contextlib.suppress(RefusedError):
        to_run_config(composed)
    return composed


def _sweep_folder(first: Any, keys: Sequence[str]) -> Path:
    """Where the sweep lies: ``run_name``'s, which the same command finds again, or a new one of the time and ``keys``."""
    if first.run_name is None:
        moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{moment}-{slug('-'.join(keys) or 'sweep', max_length=40)}-{secrets.token_hex(2)}"
    else:
        name = check_run_name(first.run_name)
    return Path(first.output_root) / "sweeps" / name

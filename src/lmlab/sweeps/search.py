"""A multirun whose points Optuna chooses: ask for a trial, run it as a job, tell how it ended.

The study lies in the sweep's folder (study.db) and is the truth about the search. A trial is told only when its job has
ended; those still open when a search is killed are taken up again by the next start, so a study never has more than
``n_trials``. The sampler is seeded anew for each trial, from the seed and the trial's number: a search that was killed
and gone on with draws what it would have drawn.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.config.search import OptunaSearch
from lmlab.journal import RunDir, read_json
from lmlab.records import UserError
from lmlab.registry import suggest
from lmlab.sweeps.space import Space

if TYPE_CHECKING:
    import optuna

    from lmlab.sweeps.jobs import Job

STUDY = "study.db"
UNTOLD = ("interrupted", "not started", "waiting", "running")
ENDED_WITHOUT_VALUE = ("refused", "pruned")


def import_optuna() -> Any:
    """Optuna, which is an extra of lmlab.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "hparams_search=optuna needs the package optuna",
            where="hparams_search",
            fix="pip install 'lmlab[optuna]'",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass
class _Open:
    """A trial whose job has not ended, and how far its metrics.jsonl has been read."""

    trial: optuna.trial.Trial
    overrides: tuple[str, ...]
    reported: set[int] = field(default_factory=set)
    offset: int = 0


class OptunaPoints:
    """The points of a search, one at a time (the launcher's ``Points``).

    Args:
        search: its settings.
        space: what is searched.
        root: the sweep's folder; made with the study when the first point is asked for.
        overwrite: forget a study of that name.
        steps: (between validations, of a run): what a pruner that halves by steps begins and ends with; None: as it sees.
    """

    def __init__(
        self,
        search: OptunaSearch,
        space: Space,
        root: Path,
        *,
        overwrite: bool = False,
        steps: tuple[int, int | None] = (1, None),
    ) -> None:
        self.search, self.space, self.root, self.overwrite = search, space, root, overwrite
        self.optuna = import_optuna()
        self.grid = space.grid() if search.sampler == "grid" else None
        self.total = search.n_trials if self.grid is None else min(search.n_trials, len(self.grid))
        self.pruner = self._pruner(*steps)
        self._study: optuna.study.Study | None = None
        self._open: dict[int, _Open] = {}
        self._interrupted: set[int] = set()
        self._began = time.monotonic()

    # --- the launcher's side ------------------------------------------------------------------------------------------

    @property
    def keys(self) -> tuple[str, ...]:
        """What is searched."""
        return tuple(axis.name for axis in self.space.axes)

    def keeps(self, status: str, *, is_whole: bool) -> bool:
        """Whatever the study was told, files or not; what was interrupted is still an open trial."""
        return status not in UNTOLD

    def recall(self, job: Job) -> None:
        """Tell the study of a job whose end it has not heard of: its launcher was killed in between."""
        opened = self._left_open(job.number, exactly=True)
        if opened is not None:
            self._open[job.number] = opened
            self.done(job)

    def next(self, number: int) -> list[str] | None:
        """Overrides of job ``number``: a trial that another start left open, or a new one; None when there are enough."""
        if self.search.timeout is not None and time.monotonic() - self._began > self.search.timeout:
            return None
        opened = self._left_open(number) or self._new()
        if opened is None:
            return None
        opened.trial.set_user_attr("sweep", self.root.name)
        opened.trial.set_user_attr("job", number)
        self._open[number] = opened
        return list(opened.overrides)

    def asked(self, overrides: Sequence[str]) -> bool:
        """Whether these are the overrides of a trial that has not ended."""
        return any(opened.overrides == tuple(overrides) for opened in self._open.values())

    def hopeless(self, job: Job) -> bool:
        """Whether the pruner would end the job's trial, by what its metrics.jsonl has got since the last time."""
        opened = self._open.get(job.number)
        if opened is None or self.search.pruner == "none":
            return False
        return self._report(opened, job.run) and opened.trial.should_prune()

    def done(self, job: Job) -> None:
        """Tell how the job ended; one that was interrupted stays open, for the next start.

        Raises:
            UserError: a finished run has no such figure as an objective names; or the very first job could not start,
                which is taken to be wrong with all of them. The trial stays open then.
        """
        opened = self._open.pop(job.number, None)
        if opened is None:
            return
        if job.status in UNTOLD:
            self._interrupted.add(opened.trial.number)
            return
        if job.status.startswith("error") and not any(
            trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False)
        ):
            raise UserError(job.status.partition(": ")[2])
        if len(self.search.objectives) == 1:
            self._report(opened, job.run)
        state, values, reason = self._outcome(job)
        trial = opened.trial
        trial.set_user_attr("directory", job.folder.name)
        trial.set_user_attr("overrides", list(opened.overrides))
        if reason:
            trial.set_user_attr("reason", reason)
        self.study.tell(trial, values, state=state)

    # --- the study ----------------------------------------------------------------------------------------------------

    @property
    def storage(self) -> str:
        """URL of the database."""
        return self.search.storage or f"sqlite:///{self.root.absolute() / STUDY}"

    @property
    def study(self) -> optuna.study.Study:
        """Made or loaded when it is first asked for.

        Raises:
            UserError: the storage cannot be opened, or the study is one of another search.
        """
        if self._study is None:
            self.root.mkdir(parents=True, exist_ok=True)
            self._study = self._load()
        return self._study

    def _load(self) -> optuna.study.Study:
        name = self.search.study_name or self.root.name
        try:
            storage = self.optuna.storages.RDBStorage(self.storage)
            if self.overwrite and name in self.optuna.get_all_study_names(storage):
                self.optuna.delete_study(study_name=name, storage=storage)
            study = self.optuna.create_study(
                storage=storage,
                study_name=name,
                directions=[objective.direction for objective in self.search.objectives],
                pruner=self.pruner,
                load_if_exists=True,
            )
        except Exception as error:  # SQLAlchemy's, a driver's, the file system's
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"the study cannot be opened: {text[0][:150]}",
                where="hparams_search.storage",
                fix="give a database as sqlite:///file.db, or null for the sweep's folder",
            ) from error
        known, now = study.user_attrs.get("search"), self._identity()
        if known is not None and known != now:
            raise UserError(
                "this study is of another search: "
                + "; ".join(_differences(json.loads(known), json.loads(now))),
                where=name,
                fix="give the same command again, choose another run_name, or overwrite=true",
            )
        study.set_user_attr("search", now)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is called experimental
            study.set_metric_names([objective.metric for objective in self.search.objectives])
        return study

    def _identity(self) -> str:
        """What the trials of a study have in common: fixed overrides, space, objectives."""
        from optuna.distributions import distribution_to_json

        free = ("launcher.", "logger", "run_name", "output_root", "overwrite")
        fixed = [part for part in self.space.parts if isinstance(part, str)]
        return json.dumps(
            {
                "overrides": sorted(text for text in fixed if not text.startswith(free)),
                "space": {
                    name: distribution_to_json(each)
                    for name, each in sorted(self.space.distributions.items())
                },
                "objectives": [objective.model_dump() for objective in self.search.objectives],
            }
        )

    def _left_open(self, number: int, *, exactly: bool = False) -> _Open | None:
        """A trial of this sweep that an earlier start began: the one that was job ``number`` then, else the first."""
        mine = {opened.trial.number for opened in self._open.values()} | self._interrupted
        states = (self.optuna.trial.TrialState.RUNNING,)
        left = [
            trial
            for trial in self.study.get_trials(deepcopy=False, states=states)
            if trial.number not in mine and trial.user_attrs.get("sweep", self.root.name) == self.root.name
        ]
        same = [trial for trial in left if trial.user_attrs.get("job") == number]
        if not (same if exactly else left):
            return None
        frozen = (same or left)[0]
        self.study.sampler = self._sampler(frozen.number)
        trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
        return self._begin(trial, reported=set(frozen.intermediate_values))

    def _new(self) -> _Open | None:
        trials = self.study.get_trials(deepcopy=False)
        # Put there by optuna-dashboard, or a grid's point that a kill left between the two lines below: asked first.
        waiting = [trial for trial in trials if trial.state == self.optuna.trial.TrialState.WAITING]
        if len(trials) - len(waiting) >= self.total:
            return None
        self.study.sampler = self._sampler(len(trials))
        if self.grid is not None and not waiting:
            point = self.grid[len(trials)]
            self.study.enqueue_trial(dict(zip(self.space.distributions, point, strict=True)))
        return self._begin(self.study.ask())

    def _begin(self, trial: optuna.trial.Trial, *, reported: set[int] | None = None) -> _Open:
        """Draw what the trial lacks: all of a new one, nothing of one that was killed later than while it was drawn."""
        params = {axis.name: axis.suggest(trial) for axis in self.space.axes}
        return _Open(trial, tuple(self.space.overrides(params)), reported or set())

    def _sampler(self, number: int) -> Any:
        """The sampler for trial ``number``, which has a seed of its own."""
        import numpy

        samplers, search = self.optuna.samplers, self.search
        seed = int(numpy.random.SeedSequence([search.seed, number]).generate_state(1)[0])
        if search.sampler == "tpe":
            # constant_liar: what runs beside it counts as bad, so that jobs at the same time are not alike.
            return samplers.TPESampler(
                n_startup_trials=search.n_startup_trials, seed=seed, constant_liar=True
            )
        if search.sampler == "nsga2":
            return samplers.NSGAIISampler(population_size=search.population_size, seed=seed)
        return samplers.RandomSampler(seed=seed)  # of a grid every value is given

    def _pruner(self, every: int, steps: int | None) -> Any:
        pruners, search = self.optuna.pruners, self.search
        if search.pruner == "median":
            return pruners.MedianPruner(search.pruner_startup_trials, search.pruner_warmup_steps)
        if search.pruner == "hyperband":
            return pruners.HyperbandPruner(every, steps if steps is not None else "auto")
        if search.pruner == "successive_halving":
            return pruners.SuccessiveHalvingPruner(every)
        return pruners.NopPruner()

    # --- what became of a trial ---------------------------------------------------------------------------------------

    def _report(self, opened: _Open, run: RunDir | None) -> bool:
        """Report the objective's new values of metrics.jsonl; whether there was one.

        Step 0 is before any training, and the same for most points.
        """
        if run is None or not run.metrics.is_file():
            return False
        metric, new = self.search.objectives[0].logged, False
        with run.metrics.open("rb") as stream:
            if opened.offset > stream.seek(0, 2):
                opened.offset = 0  # begun again from a checkpoint, with fewer lines
            stream.seek(opened.offset)
            whole, _, _ = stream.read().rpartition(b"\n")
        opened.offset += len(whole) + 1 if whole else 0
        for line in whole.split(b"\n"):
            try:
                row = json.loads(line)
                step, value = int(row["step"]), float(row[metric])  # "nan" is written as a string
            except (ValueError, KeyError, TypeError):
                continue
            if step > 0 and step not in opened.reported:
                opened.trial.report(value, step)
                opened.reported.add(step)
                new = True
        return new

    def _outcome(self, job: Job) -> tuple[Any, list[float] | None, str]:
        """(state, values, why there are none)."""
        states = self.optuna.trial.TrialState
        word, _, reason = job.status.partition(": ")
        if word in ENDED_WITHOUT_VALUE:
            return states.PRUNED, None, reason or "worse than the trials before it"
        if word != "finished" or job.run is None:
            return states.FAIL, None, reason or f"{word}, exit code {job.exit_code}"
        summary = read_json(job.run.summary)
        values: list[float] = []
        for objective in self.search.objectives:
            name = next((n for n in objective.names() if n in summary), None)
            if name is None:
                raise UserError(
                    f"no '{objective.metric}' in {job.folder.name}/summary.json",
                    where="hparams_search.objectives",
                    fix=suggest(objective.metric, _figures(summary)),
                )
            value = summary[name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                return states.FAIL, None, f"{name} is {value}"
            values.append(float(value))
        return states.COMPLETE, values, ""


def _figures(summary: dict[str, Any]) -> list[str]:
    return [name for name, value in summary.items() if isinstance(value, float) and math.isfinite(value)]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Which parts are others, with what they were where that is short."""
    found = []
    for part in now:
        if before.get(part) != now[part]:
            found.append(f"{part} were {json.dumps(before.get(part))[:120]}")
    return found

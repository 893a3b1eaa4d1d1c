"""Ask and tell: which trials, what they are told, what is left open, and how a killed search goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lmlab.records import UserError
from lmlab.sweeps.best import best_trials, show_best
from lmlab.sweeps.search import OptunaPoints

from .play import SPACE, begin, bowl, end, log, play, points, values

optuna = pytest.importorskip("optuna", reason="pip install 'lmlab[optuna]'")
ROOT = Path(__file__).resolve().parents[2]
TWO = [{"metric": "val/loss", "direction": "minimize"}, {"metric": "memory/peak_gb", "direction": "minimize"}]


def study_of(root: Path) -> Any:
    """By plain Optuna, from the file."""
    return optuna.load_study(study_name=None, storage=f"sqlite:///{root / 'study.db'}")


def drawn(chosen: OptunaPoints) -> list[dict[str, Any]]:
    return [trial.params for trial in chosen.study.get_trials()]


def states(root: Path) -> list[str]:
    return [trial.state.name for trial in study_of(root).trials]


# --- which trials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_the_same_seed_gives_the_same_trials_in_one_start_or_in_two(tmp_path: Path, sampler: str) -> None:
    settings = {"sampler": sampler, "n_startup_trials": 4, "population_size": 4}
    whole = points(tmp_path / "whole", n_trials=12, **settings)
    assert play(whole) == 12
    begun = points(tmp_path / "parts", n_trials=7, **settings)
    assert play(begun) == 7
    gone_on = points(tmp_path / "parts", n_trials=12, **settings)
    assert play(gone_on, first=7) == 5
    other = points(tmp_path / "other", n_trials=12, seed=1, **settings)
    play(other)
    assert drawn(whole) == drawn(gone_on)
    assert len({str(params) for params in drawn(whole)}) == 12
    assert drawn(whole) != drawn(other)
    assert play(points(tmp_path / "parts", n_trials=12, **settings), first=12) == 0, "there are enough"


@pytest.mark.slow
def test_tpe_finds_more_than_chance(tmp_path: Path) -> None:
    tpe, random = (points(tmp_path / name, n_trials=40, sampler=name) for name in ("tpe", "random"))
    play(tpe)
    play(random)
    late = [[t.values[0] for t in chosen.study.trials[20:]] for chosen in (tpe, random)]
    assert sorted(late[0])[10] < 0.5 * sorted(late[1])[10], "the median of what it drew after learning"


def test_a_grid_is_every_point_once_and_ends(tmp_path: Path) -> None:
    space = ("adapter.rank=choice(4,8,16)", "optim.lr=0.1,0.001")
    chosen = points(tmp_path / "grid", *space, sampler="grid", n_trials=100)
    assert play(chosen) == 6
    assert [tuple(p.values()) for p in drawn(chosen)] == [(r, lr) for r in (4, 8, 16) for lr in (0.1, 0.001)]
    capped = points(tmp_path / "capped", *space, sampler="grid", n_trials=4)
    assert play(capped, at_once=3) == 4


def test_jobs_at_the_same_time_are_no_more_than_asked_for(tmp_path: Path) -> None:
    chosen = points(tmp_path / "s", n_trials=10, n_startup_trials=3)
    assert play(chosen, at_once=4) == 10
    assert states(tmp_path / "s") == ["COMPLETE"] * 10
    assert len({params["optim.lr"] for params in drawn(chosen)}) == 10


def test_no_trial_begins_after_the_timeout(tmp_path: Path) -> None:
    chosen = points(tmp_path / "s", timeout=0.5)
    job = begin(chosen, 0)
    assert job is not None
    time.sleep(0.6)
    assert chosen.next(1) is None
    end(chosen, job, bowl(values(job.overrides)))
    assert states(tmp_path / "s") == ["COMPLETE"]


# --- what they are told -----------------------------------------------------------------------------------------------


def test_the_best_is_found_again_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = points(tmp_path / "found", n_trials=15)
    play(chosen)
    show_best(chosen, Console(width=160))
    study = study_of(tmp_path / "found")
    best = yaml.safe_load((tmp_path / "found" / "best.yaml").read_text(encoding="utf-8"))
    assert best["study"] == study.study_name == "found"
    (entry,) = best["best"]
    assert entry["values"]["val/loss"] == study.best_value == min(t.value for t in study.trials)
    assert entry["trial"] == study.best_trial.number
    summary = json.loads((tmp_path / "found" / entry["directory"] / "summary.json").read_text("utf-8"))
    assert summary["best/val_loss"] == study.best_value
    assert values(entry["overrides"]) == {**study.best_params, "trainer.max_steps": 20}
    said = capsys.readouterr().out
    for text in ("15 finished", f"optim.lr={study.best_params['optim.lr']!r}", "optuna-dashboard sqlite:///"):
        assert text in said


def test_nsga2_ends_in_the_pareto_front(tmp_path: Path) -> None:
    chosen = points(tmp_path / "two", n_trials=40, sampler="nsga2", population_size=8, objectives=TWO)
    assert play(chosen) == 40
    every = [trial.values for trial in chosen.study.trials]
    front = [v for v in every if not any(o != v and o[0] <= v[0] and o[1] <= v[1] for o in every)]
    assert sorted(map(tuple, front)) == [tuple(trial.values) for trial in best_trials(chosen)]
    assert {round(memory, 3) for _, memory in front} >= {0.4, 0.8}, "the smallest rank and the best one"
    show_best(chosen, Console(width=160))
    best = yaml.safe_load((tmp_path / "two" / "best.yaml").read_text(encoding="utf-8"))["best"]
    assert [list(entry["values"].values()) for entry in best] == sorted(front)


def test_a_larger_value_can_be_better(tmp_path: Path) -> None:
    objective = {"metric": "val/exact_match", "direction": "maximize"}
    chosen = points(tmp_path / "s", n_trials=6, objectives=[objective])
    play(chosen, lambda params: {"final/val/exact_match": params["adapter.rank"] / 16})
    (best,) = best_trials(chosen)
    assert (
        best.value
        == max(trial.values[0] for trial in chosen.study.trials)
        == study_of(tmp_path / "s").best_value
    )


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        ("failed", "FAIL", "failed"),
        ("error: no such file (data.path): give one", "FAIL", "no such file"),
        ("refused: 3.10 GB planned in backward, 2.00 GB there (memory plan)", "PRUNED", "3.10 GB planned"),
        ("pruned", "PRUNED", "worse"),
        ("interrupted", "RUNNING", ""),
    ],
)
def test_each_end_of_a_job_is_told(tmp_path: Path, status: str, state: str, reason: str) -> None:
    play(points(tmp_path / "s", n_trials=1))
    chosen = points(tmp_path / "s", n_trials=3)
    job = begin(chosen, 1)
    assert job is not None
    end(chosen, job, {}, status=status)
    _, trial = study_of(tmp_path / "s").trials
    assert trial.state.name == state
    assert trial.user_attrs.get("reason", "").startswith(reason)
    assert play(chosen, first=2) == 1, "what was interrupted keeps its place until the next start"
    assert len(study_of(tmp_path / "s").trials) == 3


def test_what_is_wrong_with_the_first_job_ends_the_search(tmp_path: Path) -> None:
    chosen = points(tmp_path / "s", n_trials=3)
    job = begin(chosen, 0)
    assert job is not None
    with pytest.raises(UserError, match=r"^no such file \(data.path\): give one$"):
        end(chosen, job, {}, status="error: no such file (data.path): give one")
    assert play(points(tmp_path / "s", n_trials=3)) == 3, "mended, the same three trials"
    assert states(tmp_path / "s") == ["COMPLETE"] * 3


def test_a_loss_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    chosen = points(tmp_path / "s", n_trials=1)
    play(chosen, lambda params: {"best/val_loss": float("nan")})
    (trial,) = study_of(tmp_path / "s").trials
    assert (trial.state.name, trial.user_attrs["reason"]) == ("FAIL", "best/val_loss is nan")
    show_best(chosen, Console())
    assert not (tmp_path / "s" / "best.yaml").exists()


def test_an_objective_that_no_run_has(tmp_path: Path) -> None:
    chosen = points(tmp_path / "s", objectives=[{"metric": "memory/peak_bg", "direction": "minimize"}])
    with pytest.raises(UserError, match="did you mean 'memory/peak_gb'"):
        play(chosen)


# --- pruning ----------------------------------------------------------------------------------------------------------


def test_a_trial_is_hopeless_as_soon_as_its_losses_say_so(tmp_path: Path) -> None:
    chosen = points(tmp_path / "s", n_trials=5, pruner="median", pruner_startup_trials=3)
    for number, loss in enumerate((1.0, 1.1, 1.2)):
        job = begin(chosen, number)
        assert job is not None
        log(job, s0=3.0, s5=loss + 1, s10=loss)
        assert not chosen.hopeless(job), "too few to compare with"
        end(chosen, job, {"best/val_loss": loss})
    bad, good = begin(chosen, 3), begin(chosen, 4)
    assert bad is not None
    assert good is not None
    for job in (bad, good):
        assert not chosen.hopeless(job), "nothing is known yet"
        log(job, s0=9.0)
        assert not chosen.hopeless(job), "step 0 is before any training"
    log(bad, s5=2.05)
    log(good, s5=2.05)
    assert not chosen.hopeless(bad)
    assert not chosen.hopeless(good)
    assert bad.run is not None
    with bad.run.metrics.open("a") as stream:
        stream.write('{"step": 10, "val/lo')  # the line is being written
    assert not chosen.hopeless(bad)
    with bad.run.metrics.open("a") as stream:
        stream.write('ss": 2.0}\n')
    assert chosen.hopeless(bad)
    log(good, s10=0.9)
    assert not chosen.hopeless(good)
    end(chosen, bad, {}, status="pruned")
    end(chosen, good, {"best/val_loss": 0.9})
    last = study_of(tmp_path / "s").trials[3:]
    assert [trial.state.name for trial in last] == ["PRUNED", "COMPLETE"]
    assert last[0].intermediate_values == {5: 2.05, 10: 2.0}
    assert last[1].intermediate_values == {5: 2.05, 10: 0.9}


@pytest.mark.parametrize("pruner", ["hyperband", "successive_halving"])
def test_halving_prunes_the_worse(tmp_path: Path, pruner: str) -> None:
    space = ("optim.lr=interval(0, 1)",)
    chosen = points(tmp_path / "s", *space, n_trials=18, pruner=pruner, steps=(1, 9))
    number, pruned, kept = 0, list[float](), list[float]()
    while (job := begin(chosen, number)) is not None:
        loss = values(job.overrides)["optim.lr"]
        for step in range(1, 10):
            log(job, **{f"s{step}": loss})
            if chosen.hopeless(job):
                end(chosen, job, {}, status="pruned")
                pruned.append(loss)
                break
        else:
            end(chosen, job, {"best/val_loss": loss})
            kept.append(loss)
        number += 1
    assert len(pruned) >= 3
    assert sum(pruned) / len(pruned) > sum(kept) / len(kept)
    assert min(kept) < min(pruned)


def test_what_went_back_to_a_checkpoint_is_read_again(tmp_path: Path) -> None:
    chosen = points(tmp_path / "s", n_trials=1, pruner="median")
    job = begin(chosen, 0)
    assert job is not None
    assert job.run is not None
    log(job, s5=2.0, s10=1.5, s15=1.4)
    chosen.hopeless(job)
    job.run.metrics.write_text("")
    log(job, s5=2.0, s20=1.0)
    end(chosen, job, {"best/val_loss": 1.0})
    (trial,) = study_of(tmp_path / "s").trials
    assert trial.intermediate_values == {5: 2.0, 10: 1.5, 15: 1.4, 20: 1.0}


# --- going on ---------------------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from tests.sweeps.play import play, points
root, die_at, at_once = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
play(points(root, n_trials=20), at_once=at_once, die_at=die_at)
"""


@pytest.mark.parametrize("at_once", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_9_it_goes_on_to_20_exactly(tmp_path: Path, at_once: int) -> None:
    root = tmp_path / "killed"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(root), "9", str(at_once)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == -9, child.stderr
    before = states(root)
    assert before == ["COMPLETE"] * (10 - at_once) + ["RUNNING"] * at_once
    left = study_of(root).trials[10 - at_once :]
    chosen = points(root, n_trials=20)
    job = begin(chosen, 9)
    assert job is not None
    assert values(job.overrides)["optim.lr"] == left[-1].params["optim.lr"], "the same job is begun again"
    end(chosen, job, bowl(values(job.overrides)))
    assert play(chosen, first=10, at_once=at_once) == 9 + at_once
    study = study_of(root)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 20
    assert study.best_value == min(trial.value for trial in study.trials)
    if at_once == 1:
        whole = points(tmp_path / "whole", n_trials=20)
        play(whole)
        assert drawn(whole) == [trial.params for trial in study.trials], "as if nothing had happened"
        assert study.best_value == whole.study.best_value


def test_a_trial_killed_while_it_was_drawn_gets_the_rest(tmp_path: Path) -> None:
    chosen = points(tmp_path / "s", n_trials=3)
    lr = chosen.space.axes[0].suggest(chosen.study.ask())
    assert play(points(tmp_path / "s", n_trials=3)) == 3
    trials = study_of(tmp_path / "s").trials
    assert len(trials) == 3
    assert trials[0].params["optim.lr"] == lr
    assert trials[0].params["adapter.rank"] in (4, 8, 16)


def test_a_grid_killed_between_its_two_steps_misses_no_point(tmp_path: Path) -> None:
    space = ("adapter.rank=choice(4,8,16)", "optim.lr=0.1")
    chosen = points(tmp_path / "s", *space, sampler="grid")
    chosen.study.enqueue_trial({"adapter.rank": 4, "optim.lr": 0.1})
    fixed = points(tmp_path / "s", *space, sampler="grid")
    assert play(fixed) == 3
    assert [params["adapter.rank"] for params in drawn(fixed)] == [4, 8, 16]


@pytest.mark.parametrize(
    ("space", "changes", "said"),
    [
        ((SPACE[0], SPACE[1], "trainer.max_steps=50"), {}, "overrides were"),
        ((SPACE[0], "adapter.rank=choice(4,8)", SPACE[2]), {}, "space were"),
        (SPACE, {"objectives": [{"metric": "val/loss", "direction": "maximize"}]}, "objectives were"),
    ],
)
def test_a_study_of_another_search_is_refused(
    tmp_path: Path, space: tuple[str, ...], changes: Mapping[str, Any], said: str
) -> None:
    play(points(tmp_path / "s", n_trials=2))
    with pytest.raises(UserError, match=said) as caught:
        points(tmp_path / "s", *space, **changes).next(2)
    assert "run_name" in str(caught.value.fix)
    fresh = points(tmp_path / "s", *space, overwrite=True, n_trials=1, **changes)
    assert play(fresh) == 1
    assert len(study_of(tmp_path / "s").trials) == 1


def test_settings_that_mean_nothing_to_old_trials_may_change(tmp_path: Path) -> None:
    play(points(tmp_path / "s", *SPACE, "launcher.jobs=2", n_trials=2))
    assert play(points(tmp_path / "s", *SPACE, "launcher.jobs=1", n_trials=3, sampler="random"), first=2) == 1


def test_a_storage_that_cannot_be_opened(tmp_path: Path) -> None:
    for storage in ("nonsense", "sqlite:////no/such/folder/x.db"):
        with pytest.raises(UserError, match="cannot be opened") as caught:
            points(tmp_path / "s", storage=storage).next(0)
        assert caught.value.where == "hparams_search.storage"


def test_a_study_may_lie_elsewhere(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    play(points(tmp_path / "a", n_trials=2, storage=url, study_name="one"))
    play(points(tmp_path / "b", n_trials=4, storage=url, study_name="one"), first=2)
    play(points(tmp_path / "c", n_trials=1, storage=url))
    assert optuna.study.get_all_study_names(url) == ["one", "c"]
    assert len(optuna.load_study(study_name="one", storage=url).trials) == 4
    assert not (tmp_path / "a" / "study.db").exists()


# --- beside it --------------------------------------------------------------------------------------------------------


def test_optuna_dashboard_opens_the_study(tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    import socket

    play(points(tmp_path / "shown", n_trials=3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    url = f"sqlite:///{tmp_path / 'shown' / 'study.db'}"
    server = subprocess.Popen(
        [sys.executable, "-c", code, url, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        answer, until = None, time.monotonic() + 60
        while answer is None and time.monotonic() < until:
            assert server.poll() is None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as stream:
                    answer = json.load(stream)
            except OSError:
                time.sleep(0.2)
        assert answer is not None
        (study,) = answer["study_summaries"]
        assert study["study_name"] == "shown"
        assert study["directions"] == ["minimize"]
    finally:
        server.terminate()
        server.wait(timeout=20)

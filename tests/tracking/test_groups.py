"""Groups, spreads, pairs, budgets and bands of runs, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmlab.tracking import claims, curves, group_plots, groups, plots
from lmlab.tracking.groups import MAX_COLOURED, Entry

from .pages import groups_of, page_of, small_run


def test_runs_that_differ_only_in_their_seed_are_one_group(ablation: list[Entry]) -> None:
    none, lora = groups_of(ablation)
    assert (none.label, none.seeds, lora.label, lora.seeds) == (
        "adapter=none",
        [1, 2, 3],
        "adapter=lora",
        [1, 2, 4],
    )
    best = none.spread("best")
    assert best is not None
    assert (best.mean, best.low, best.high) == pytest.approx((1.2, 1.0, 1.4))
    matches, growth, wall = (none.spread(name) for name in ("exact_match", "growth", "wall"))
    assert matches is not None
    assert matches.mean == pytest.approx((0.6 + 0.7 + 0.8) / 3)
    assert growth is not None
    assert growth.mean == pytest.approx(1.02)  # 1.51, 1.52, 1.53 less the 0.5 of the process
    assert wall is not None
    assert wall.mean == 24.5
    assert none.spread("bits_per_byte") is None


def test_what_varies_is_told_from_what_only_some_options_have(ablation: list[Entry]) -> None:
    made = groups_of(ablation)
    assert groups.varying(made) == ["adapter/kind", "adapter/rank"]
    assert groups.telling(made) == ["adapter/kind"]
    assert dict(groups.shared(made)) == {"task": "sft", "quant/kind": "none", "optim/lr": 0.001}


def test_runs_of_one_name_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    made = [Entry("run", small_run(tmp_path / f"{lr}-{seed}", adapter="lora", seed=seed, optim={"lr": lr}))
            for lr in (0.1, 0.2) for seed in (1, 2)]  # fmt: skip
    assert [group.label for group in groups_of(made)] == ["optim.lr=0.1", "optim.lr=0.2"]


def test_only_finished_runs_count_if_there_are_any(tmp_path: Path) -> None:
    died = small_run(tmp_path / "b", seed=2, losses={0: 4.0, 10: 3.0}, status="failed")
    group = groups_of([Entry("seed=1", small_run(tmp_path / "a")), Entry("seed=2", died)])[0]
    assert (group.note, group.seeds) == ("1 of 2 finished", [1])
    best = group.spread("best")
    assert best is not None
    assert best.values == (1.0,)
    alone = groups_of([Entry("seed=2", died)])[0]
    assert alone.note == "not finished: failed"
    assert alone.by_seed("best") == {}
    best = alone.spread("best")
    assert best is not None
    assert best.values == (3.0,)


def test_the_clock_of_a_resumed_run_begins_again() -> None:
    rows = [{"step": step, "time": time} for step, time in enumerate((1.0, 5.0, 9.0, 2.0, 4.0))]
    assert groups.wall_time(rows) == 13.0
    assert groups.wall_time([{"step": 1, "time": "x"}, {"step": 2}]) is None


def test_more_groups_than_colours(tmp_path: Path) -> None:
    made = groups_of(
        [
            Entry(f"lr={n}", small_run(tmp_path / str(n), optim={"lr": n}, losses={0: 5.0, 20: 100.0 - n}))
            for n in range(11)
        ]
    )
    groups.colour(made, made[0])
    assert [group.colour for group in made] == [0, None, None, None, 1, 2, 3, 4, 5, 6, 7]
    assert len(group_plots.MARKS) == len(group_plots.GLYPHS) == MAX_COLOURED <= len(plots.LINES)


# --- pairs, budgets, curves -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_differences_are_paired_by_seed_and_a_missing_one_is_said(ablation: list[Entry]) -> None:
    none, lora = groups_of(ablation)
    pairs = claims.paired(lora, none, "best")
    assert pairs.differences == pytest.approx({1: 0.1, 2: 0.2})
    assert pairs.alone == (3, 4)
    assert pairs.spread is not None
    assert pairs.spread.mean == pytest.approx(0.15)  # 9.0 of seed 4 has nothing to be compared with
    assert "seed 3, 4 not in both" in page_of(ablation).words


def test_losses_at_equal_budget_are_read_between_validations(ablation: list[Entry]) -> None:
    found = {budget.axis.key: budget for budget in curves.budgets(groups_of(ablation))}
    assert {key: budget.amount for key, budget in found.items()} == {
        "tokens": 2000.0,
        "flops": 2e7,
        "seconds": 10.0,
    }
    # lora has seen 1,500 tokens at step 10 and 3,000 at step 20: 2,000 are a third of the way from 2.0 to its end.
    expected = tuple(2.0 + (end - 2.0) / 3 for end in (1.1, 1.4, 9.0))
    assert found["tokens"].losses[1].values == pytest.approx(expected)
    assert found["tokens"].losses[0].values == pytest.approx((1.0, 1.2, 1.4))
    # 2e7 FLOPs are step 10 of none and step 20 of lora; 10 s of training are step 10 of none and step 20 of lora.
    for axis in ("flops", "seconds"):
        assert found[axis].losses[0].values == pytest.approx((2.0, 2.0, 2.0))
        assert found[axis].losses[1].values == pytest.approx((1.1, 1.4, 9.0))


def test_no_budget_where_one_group_alone_was_validated(tmp_path: Path) -> None:
    made = groups_of(
        [
            Entry("a", small_run(tmp_path / "a")),
            Entry("b", small_run(tmp_path / "b", adapter="lora", losses={})),
        ]
    )
    assert curves.budgets(made) == []


def test_a_band_lies_where_all_runs_of_a_group_are(tmp_path: Path) -> None:
    made = groups_of([Entry("seed=1", small_run(tmp_path / "a", losses={0: 4.0, 10: 2.0, 20: 1.0})),
                      Entry("seed=2", small_run(tmp_path / "b", seed=2, losses={0: 6.0, 10: 3.0}))])  # fmt: skip
    found = curves.band(made[0], "val/loss", "steps")
    assert found is not None
    assert found.x == (0.0, 10.0)
    assert [(spread.mean, spread.low, spread.high) for spread in found.spreads] == [
        (5.0, 4.0, 6.0),
        (2.5, 2.0, 3.0),
    ]
    assert curves.band(made[0], "val/none", "steps") is None


def test_curves_stand_still_at_their_ends_and_between_points() -> None:
    line = curves.Curve.of({10.0: 1.0, 0.0: 3.0})
    assert [line.at(x) for x in (-1, 0, 2.5, 10, 11)] == [None, 3.0, 2.5, 1.0, None]
    assert curves.Curve((), ()).at(0) is None
    rows = [
        {"step": s, "train/tokens": 10.0 * s, "perf/tokens_per_second": 5.0 if s < 3 else 0.0}
        for s in (1, 2, 3)
    ]
    assert curves.worth(rows, "seconds") == curves.Curve((0.0, 1.0, 2.0), (0.0, 2.0, 4.0)), (
        "unknown from step 3 on"
    )
    assert curves.worth(rows, "flops") == curves.Curve((), ())

"""The page that compares runs: groups, spreads, pairs and budgets against numbers worked out by hand, and hostile files."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import HOSTILE, Page, script, write_json, write_lines

from lmlab.records import Sample, UserError
from lmlab.tracking import claims, compare, curves, group_plots, groups, plots
from lmlab.tracking.compare import render, write_comparison
from lmlab.tracking.groups import MAX_COLOURED, Entry, Group, grouped, read_result
from lmlab.tracking.results import FIGURES, entries_of, rows_of, write_results

Losses = dict[int, float]


def small_run(
    folder: Path, *, adapter: str = "none", quant: str = "none", seed: int = 1, losses: Losses | None = None,
    matches: Losses | None = None, rate: float = 100.0, flops: float = 1e6, speed: float = 1000.0, peak: float = 1.5,
    base: float | None = 0.5, trained: int = 1000, bits: float = 32.0, status: str = "finished", **more: Any,
) -> Path:  # fmt: skip
    """A run of 20 steps, logged every 10: ``rate`` tokens and ``flops`` a step, ``speed`` tokens a second."""
    folder.mkdir(parents=True)
    losses = {0: 4.0, 10: 2.0, 20: 1.0} if losses is None else losses
    rows: list[dict[str, Any]] = [
        {"step": 0, "time": 3.0, "memory/load/peak_gb": 0.9, "memory/load/planned_gb": 1.0}
    ]
    rows += [{"step": 0, "time": 4.0, "val/loss": losses[0]}] if 0 in losses else []
    for step in (10, 20):
        done = {"train/tokens": rate * step, "train/flops": flops * step, "perf/tokens_per_second": speed}
        rows.append({"step": step, "time": 4.0 + step, "train/loss": 5.0 / step, "memory/backward/peak_gb": peak,
                     "memory/backward/planned_gb": 1.4, **done})  # fmt: skip
        if step in losses:
            rows.append({"step": step, "time": 4.5 + step, "val/loss": losses[step]})
        if matches and step in matches:
            rows[-1]["val/exact_match"] = matches[step]
    write_lines(folder / "metrics.jsonl", rows)
    config: dict[str, Any] = {
        "task": "sft",
        "seed": seed,
        "run_name": folder.name,
        "output_root": str(folder.parent),
    }
    config |= {
        "adapter": {"kind": adapter},
        "quant": {"kind": quant},
        "optim": {"lr": 0.001},
        "logger": {"group": folder.name},
    }
    config["adapter"] |= {"rank": 8} if adapter != "none" else {}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | more, allow_unicode=True), encoding="utf-8")
    summary = {"status": status, "exit_code": 0 if status == "finished" else 1, "best/val_loss": min(losses.values(), default=None),
               "model/params_trainable": trained, "model/base_bits_per_param": bits, "memory/peak_gb": peak}  # fmt: skip
    write_json(folder / "summary.json", summary | ({} if base is None else {"memory/base_gb": base}))
    samples = [
        Sample(step, 0, "2 + 2 =", "greedy", 0, f"{adapter} says {step}", 3, "eos").row() for step in (0, 20)
    ]
    write_lines(folder / "samples.jsonl", samples)
    return folder


@pytest.fixture
def ablation(tmp_path: Path) -> list[Entry]:
    """none on seeds 1 to 3, lora on 1, 2, 4: losses, tokens and memory chosen so that a head can do the sums."""
    made = []
    for adapter, seed, end in (("none", 1, 1.0), ("none", 2, 1.2), ("none", 3, 1.4), ("lora", 1, 1.1), ("lora", 2, 1.4), ("lora", 4, 9.0)):  # fmt: skip
        lora = adapter == "lora"
        folder = small_run(
            tmp_path / f"{adapter}-{seed}", adapter=adapter, seed=seed, losses={0: 4.0, 10: 2.0, 20: end}, matches={20: 0.5 + seed / 10},
            rate=150.0 if lora else 100.0, flops=1e6 if lora else 2e6, speed=300.0 if lora else 100.0,
            peak=1.2 if lora else 1.5 + seed / 100, trained=50 if lora else 1000,
        )  # fmt: skip
        made.append(Entry(f"adapter={adapter} seed={seed}", folder))
    return made


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the slow part, for tests that are about something else."""
    monkeypatch.setattr(group_plots, "draw", lambda panel: "<svg></svg>")


def groups_of(entries: list[Entry]) -> list[Group]:
    return grouped(read_result(entry) for entry in entries)


def page_of(entries: list[Entry], **options: Any) -> Page:
    return Page(render(entries, title="a sweep", **options))


# --- groups ---------------------------------------------------------------------------------------------------------


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


# --- claims ---------------------------------------------------------------------------------------------------------


def verdicts(entries: list[Entry]) -> dict[str, str]:
    return {claim.about: claim.verdict for claim in claims.claims(groups_of(entries))}


def pair_of(tmp_path: Path, *, seeds: int = 3, **lora: Callable[[int], Any]) -> list[Entry]:
    """Full fine-tuning (best 1.0, 1.1, 1.2; peak 2 GB) and a LoRA made by functions of the seed."""
    made = []
    for seed in range(1, seeds + 1):
        ends = {0: 4.0, 20: 0.9 + seed / 10}
        made.append(
            Entry(f"none seed={seed}", small_run(tmp_path / f"n{seed}", seed=seed, losses=ends, peak=2.0))
        )
        told: dict[str, Any] = {"trained": 50, "losses": ends, "peak": 1.0} | {
            name: value(seed) for name, value in lora.items()
        }
        made.append(
            Entry(f"lora seed={seed}", small_run(tmp_path / f"l{seed}", adapter="lora", seed=seed, **told))
        )
    return made


def test_claims_that_hold(tmp_path: Path) -> None:
    found = claims.claims(groups_of(pair_of(tmp_path)))
    assert {claim.verdict for claim in found} == {"holds"}
    numbers = {claim.about: claim.numbers for claim in found}
    assert numbers["trained parameters"] == "50 of 1,000 trained: 5.00%"
    assert (
        numbers["peak memory"]
        == "1.000 GB against 2.000 GB, 0.50 times as much; 3 pairs differ by -1.00 GB (-1.00 to -1.00)"
    )
    assert numbers["memory growth"].startswith("0.5000 GB against 1.500 GB, 0.33 times as much")
    assert numbers["val/loss"] == (
        "1.100 against 1.100; 3 pairs differ by +0.00 (+0.00 to +0.00); full fine-tuning's range over 3 seeds is 0.2000"
    )
    assert list(numbers) == [
        "trained parameters",
        "peak memory",
        "memory growth",
        "val/loss",
    ]


def test_claims_that_do_not_hold(tmp_path: Path) -> None:
    worse = pair_of(
        tmp_path,
        losses=lambda s: {0: 4.0, 20: 1.2 + s / 10},
        trained=lambda s: 1000,
        peak=lambda s: 2.0 + s / 10,
    )
    assert verdicts(worse) == {"trained parameters": "does not hold", "peak memory": "does not hold",
                               "memory growth": "does not hold", "val/loss": "does not hold"}  # fmt: skip


def test_quality_is_judged_by_the_range_of_full_fine_tuning(tmp_path: Path) -> None:
    for place, (away, verdict) in enumerate(((0.19, "holds"), (0.21, "does not hold"), (-0.5, "holds"))):
        made = pair_of(tmp_path / str(place), losses=lambda s, away=away: {0: 4.0, 20: 0.9 + s / 10 + away})
        assert verdicts(made)["val/loss"] == verdict


def test_of_several_learning_rates_the_best_is_compared(tmp_path: Path) -> None:
    ends = {("none", 0.1): 1.0, ("none", 0.2): 0.5, ("lora", 0.1): 0.7, ("lora", 0.2): 3.0}
    made = [Entry(f"{kind} {lr} seed={seed}", small_run(tmp_path / f"{kind}{lr}{seed}", adapter=kind, seed=seed, optim={"lr": lr}, losses={0: 4.0, 20: end + seed / 100}))
            for (kind, lr), end in ends.items() for seed in (1, 2)]  # fmt: skip
    found = [claim for claim in claims.claims(groups_of(made)) if claim.about == "val/loss"]
    assert [(claim.group.label, claim.numbers[:40]) for claim in found] == [
        ("lora 0.1", "0.7150 against 0.5150; 2 pairs differ by")
    ]


def test_pairs_that_disagree_refute_nothing(tmp_path: Path) -> None:
    made = pair_of(tmp_path, losses=lambda s: {0: 4.0, 20: 0.9 + s / 10 + (1.0 if s == 1 else 0.0)})
    found = claims.claims(groups_of(made))
    loss = next(claim for claim in found if claim.about == "val/loss")
    assert (loss.verdict, "differ by +0.333" in loss.numbers) == ("cannot be told", True)


@pytest.mark.usefixtures("undrawn")
def test_claims_that_cannot_be_told(tmp_path: Path) -> None:
    one = verdicts(pair_of(tmp_path / "one", seeds=1))
    assert (one["peak memory"], one["val/loss"], one["trained parameters"]) == (
        "cannot be told",
        "cannot be told",
        "holds",
    )
    mixed = pair_of(tmp_path / "mixed", peak=lambda s: 1.9 if s < 3 else 2.1)
    assert verdicts(mixed)["peak memory"] == "cannot be told"
    alone = [Entry("lora", small_run(tmp_path / "l", adapter="lora")),
             Entry("none", small_run(tmp_path / "n", data={"level": 2}))]  # fmt: skip
    assert verdicts(alone) == {}
    assert "no finished full fine-tuning with the same settings" in page_of(alone).words
    assert "Claims" not in page_of([Entry("none", small_run(tmp_path / "m"))]).words


@pytest.mark.parametrize(("quant", "bits", "verdict"), [("nf4", 4.28, "holds"), ("nf4", 4.5, "does not hold"), ("int8", 8.14, "holds"), ("bf16", 32.0, "does not hold")])  # fmt: skip
def test_bits_are_held_against_their_format(tmp_path: Path, quant: str, bits: float, verdict: str) -> None:
    run = small_run(tmp_path / "q", adapter="lora", quant=quant, bits=bits)
    assert verdicts([Entry("q", run)]) == {"bits per parameter": verdict}


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_is_whole(ablation: list[Entry], tmp_path: Path) -> None:
    refused = Entry("adapter=none quant=nf4 seed=1", None, "refused: a trainable base keeps its own dtype")
    html = write_comparison(tmp_path, [*ablation, refused], title="a sweep").read_text(encoding="utf-8")
    assert "http" not in html.replace("http-equiv", "")
    assert "#0a0b" not in html, "a colour that is not the page's"
    page = Page(html)
    text = " ".join(page.words.split())
    for said in ("6 finished, 1 refused; 2 groups", "1.2001.000–1.400",
                 "a trainable base keeps its own dtype", "Differences to adapter=none", "2 k tokens", "none says 20",
                 "lora says 20", "10 seconds of training", "5.00%", "The 3 settings that all have alike"):  # fmt: skip
        assert said in text, said
    assert "none says 0" not in text, "an earlier step's sample"
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    tags = [tag for tag, _ in page.tags]
    # val/loss and train/loss against four axes, memory of two groups, two scatters
    assert tags.count("svg") == tags.count("figure") == 8 + 2 + 2
    assert tags.count("table") == tags.count("caption") >= 7
    radios = [attrs for tag, attrs in page.tags if tag == "input"]
    assert [attrs["id"] for attrs in radios] == ["axis-steps", "axis-tokens", "axis-flops", "axis-seconds"]
    assert [("checked" in attrs) for attrs in radios] == [True, False, False, False]
    for _, attrs in page.tags:
        referred = re.findall(r"url\(([^)]*)\)", " ".join(str(value) for value in attrs.values()))
        assert all(target.lstrip("#") in ids for target in referred)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["report.html"]


@pytest.mark.usefixtures("undrawn")
def test_only_the_sorting_script_may_run(ablation: list[Entry]) -> None:
    html = render(ablation, title="a sweep")
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == html.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(attrs["content"] for _, attrs in Page(html).tags if attrs.get("http-equiv"))
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_names_and_samples_are_text(tmp_path: Path) -> None:
    run = small_run(tmp_path / "a", data={"path": HOSTILE, HOSTILE: 1}, tokenizer={"kind": HOSTILE})
    other = small_run(tmp_path / "b", data={"path": "x"}, adapter="lora")
    sample = Sample(20, 0, HOSTILE, HOSTILE, 0, HOSTILE + "\x1b[31m\u202e", 3, "eos").row()
    write_lines(run / "samples.jsonl", [sample])
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 20, f"memory/{HOSTILE.replace('/', '')}/peak_gb": 1.0}) + "\n")
    refused = Entry(HOSTILE, None, f"refused: {HOSTILE}")
    html = render(
        [Entry(f"{HOSTILE} seed=1", run), Entry("b", other), refused], title=HOSTILE, folder=tmp_path
    )
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "&lt;script src=" in html
    assert page.words.count(HOSTILE) >= 4
    assert "␛[31m\\u202e" in page.words


@pytest.mark.usefixtures("undrawn")
def test_links_lead_to_the_runs_own_pages(tmp_path: Path) -> None:
    run = small_run(tmp_path / "sweep" / "0-a b#?%<é")
    (run / "report.html").write_text("x", encoding="utf-8")
    links = [
        attrs["href"]
        for tag, attrs in page_of([Entry("a", run)], folder=tmp_path / "sweep").tags
        if tag == "a"
    ]
    assert "./0-a%20b%23%3F%25%3C%C3%A9/report.html" in links
    assert all(str(link).startswith(("#", "./")) for link in links)


@pytest.mark.usefixtures("undrawn")
def test_jobs_without_a_run_are_rows_with_their_reasons(tmp_path: Path) -> None:
    died = small_run(tmp_path / "died", status="failed")
    summary = json.loads((died / "summary.json").read_text(encoding="utf-8"))
    write_json(died / "summary.json", summary | {"error": "out of memory in backward"})
    told = [Entry("a", None, "refused: cannot train"), Entry("b", None, "error: no option 'x'"), Entry("c", died, "failed"),
            Entry("d", tmp_path / "gone", "finished"), Entry("e", None, "not started")]  # fmt: skip
    page = page_of(told)
    text = " ".join(page.words.split())
    for said in ("1 refused, 1 error, 1 failed, 1 finished, 1 not started", "cannot train", "no option 'x'",
                 "out of memory in backward (last logged step 20)", "its directory is gone", "not finished: failed"):  # fmt: skip
        assert said in text, said


@pytest.mark.usefixtures("undrawn")
def test_nothing_to_compare_makes_a_page_too() -> None:
    for entries in ([], [Entry("a", None, "refused: no")]):
        assert "None of these runs left anything to compare." in page_of(entries).words


@pytest.mark.usefixtures("undrawn")
def test_groups_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    made = [Entry(f"{kind} seed={seed}", small_run(tmp_path / f"{kind}-{seed}", adapter=kind, quant="nf4", seed=seed, losses={0: 4.0, 20: 1.0 * seed}))
            for kind in ("lora", "qlora") for seed in (1, 2)]  # fmt: skip
    assert (
        "lora and qlora have the same val/loss for every seed: their curves lie on one another."
        in page_of(made).words
    )


@pytest.mark.usefixtures("undrawn")
def test_one_run_only(tmp_path: Path) -> None:
    page = page_of([Entry("alone", small_run(tmp_path / "a"))])
    assert "One seed: differences may be chance" in page.words
    assert "No setting but the seed" in page.words
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert "curves" in ids
    assert not ids & {"paired", "budgets"}


def test_no_validation_at_all(tmp_path: Path) -> None:
    made = [Entry(kind, small_run(tmp_path / kind, adapter=kind, losses={})) for kind in ("none", "lora")]
    page = page_of(made)
    assert "No run has a val/loss." in page.words
    assert [tag for tag, _ in page.tags].count("figure") == 4 + 2  # train/loss and memory
    assert verdicts(made)["val/loss"] == "cannot be told"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "summary.json", "config.yaml", "run.json"]
)
@pytest.mark.parametrize(
    "content",
    [None, "", '{"step": 1, "val/loss": {', "[1]", "a: [*x, &x b]", "\x00\ufffd", "a: " + "[" * 3000],
)
@pytest.mark.usefixtures("undrawn")
def test_any_file_may_be_torn_or_missing(ablation: list[Entry], name: str, content: str | None) -> None:
    folder = ablation[0].folder
    assert folder is not None
    if content is None:
        (folder / name).unlink(missing_ok=True)
    else:
        (folder / name).write_text(content, encoding="utf-8")
    page = page_of(ablation)
    assert "adapter=lora" in page.words
    if name == "config.yaml" and content and content != "[1]":
        assert "config.yaml is broken: this run stands alone." in page.words
    if content is None and name in ("metrics.jsonl", "summary.json", "config.yaml"):
        assert f"Not there: {name}." in page.words


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_of_the_wrong_kind_do_not_stop_the_page(
    ablation: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ablation[0].folder
    assert folder is not None
    names = {
        name
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for name in json.loads(line)
    }
    odd = [None, "x", True, [1], {"a": 1}, math.nan, 1e308, -1e308, 10**400, 0]
    write_lines(
        folder / "metrics.jsonl",
        [{**dict.fromkeys(names - {"step"}, value), "step": n} for n, value in enumerate(odd)],
    )
    page_of(ablation)
    monkeypatch.setattr(group_plots, "draw", lambda panel: "<svg></svg>")
    for value in odd:
        keys = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        write_json(folder / "summary.json", dict.fromkeys(keys, value))
        write_lines(
            folder / "samples.jsonl", [{"step": 20, **dict.fromkeys(("prompt", "sampler", "text"), value)}]
        )
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"seed": str(value), "adapter": str(value)}), encoding="utf-8"
        )
        page_of(ablation)


@pytest.mark.usefixtures("undrawn")
def test_a_baseline_can_be_named(ablation: list[Entry]) -> None:
    assert "Differences to adapter=lora" in page_of(ablation, baseline="adapter=lora").words
    with pytest.raises(
        UserError, match=r"no group is called 'adapter=lor' \(--baseline\): did you mean 'adapter=lora'\?"
    ):
        render(ablation, title="x", baseline="adapter=lor")
    with pytest.raises(UserError, match=r"choose one of 'adapter=none', 'adapter=lora'"):
        render(ablation, title="x", baseline="zzz")


# --- results.csv ----------------------------------------------------------------------------------------------------


def test_results_csv_says_what_the_summaries_say(ablation: list[Entry], tmp_path: Path) -> None:
    refused = Entry('a,"b"', None, "refused: no, never")
    write_results(tmp_path, rows_of([*ablation, refused]))
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["job", "overrides", "status", "exit_code", "seconds", *FIGURES, "directory"]
    first, last = rows[0], rows[-1]
    assert (first["status"], first["exit_code"], first["seconds"], first["best/val_loss"]) == (
        "finished",
        "0",
        "24.5",
        "1.0",
    )
    assert (last["overrides"], last["status"], last["directory"]) == ('a,"b"', "refused: no, never", "")


def test_a_sweep_is_read_from_its_table_even_after_it_was_moved(
    ablation: list[Entry], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    rows = rows_of(ablation[:2])
    for place, row in enumerate(rows):
        Path(row["directory"]).rename(sweep / f"{place}-x")
        row |= {
            "overrides": f"data=skills adapter=none seed={place}",
            "directory": f"outputs/sweeps/elsewhere/{place}-x",
            "seconds": 7,
        }
    refused = dict.fromkeys(rows[0], "") | {
        "job": 2,
        "overrides": "data=skills quant=nf4",
        "status": "refused: no",
        "exit_code": 2,
    }
    write_results(sweep, [*rows, refused])
    first, second, third = entries_of(sweep)
    assert (first.label, first.folder, first.status, first.seconds) == (
        "adapter=none seed=0",
        sweep / "0-x",
        "finished",
        7.0,
    )
    assert second.folder == sweep / "1-x"
    assert (third.label, third.folder, third.exit_code) == ("quant=nf4", None, 2)
    assert read_result(first).figures["wall"] == 7.0
    (sweep / "results.csv").unlink()
    assert [entry.label for entry in entries_of(sweep)] == ["0-x", "1-x"]


@pytest.mark.parametrize(
    "content",
    ["", "job\n1\n", "job,overrides,status\n1,a=1\n", 'job,overrides\n1,"torn', "\ufffd\u0001,,\n,,"],
)
@pytest.mark.usefixtures("undrawn")
def test_a_torn_table_makes_a_page(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.csv").write_text(content, encoding="utf-8")
    assert page_of(entries_of(tmp_path)).words


def test_what_is_neither_a_run_nor_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run directory nor a sweep's"):
        entries_of(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        entries_of(tmp_path / "nowhere")


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the report"):
        write_comparison(tmp_path / "nowhere", [], title="x")


def test_every_figure_paired_or_listed_is_a_measure() -> None:
    keys = {measure.key for measure in groups.MEASURES}
    assert {*compare.PAIRED, *compare.SHOWN_OF_A_RUN} <= keys


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``report(*arguments)``: exit code and both streams of scripts/report.py."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        code = script().main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.usefixtures("undrawn")
def test_the_script_compares_several_runs(
    ablation: list[Entry],
    report: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LMLAB_OUTPUT_ROOT", str(tmp_path / "out"))
    folders = [entry.folder for entry in ablation]
    code, out, err = report(*folders)
    assert (code, err) == (0, "")
    page = Path(out.strip())
    assert page.parent.parent == tmp_path / "out" / "reports"
    assert re.fullmatch(r"\d{8}-\d{6}-none-1-none-2-none-3-lora-1-lora-2-lora-4", page.parent.name)
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "results.csv"]
    assert "2 groups of runs" in Page(page.read_text(encoding="utf-8")).words
    to = tmp_path / "to" / "there"
    assert report(folders[0], "--compare", "--to", to) == (0, f"{to / 'report.html'}\n", "")
    assert report(folders[0]) == (0, f"{folders[0]}/report.html\n", "")


@pytest.mark.usefixtures("undrawn")
def test_the_script_leaves_a_sweeps_table_alone(
    ablation: list[Entry], report: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    write_results(tmp_path, rows_of(ablation))
    before = (tmp_path / "results.csv").read_bytes() + b"# kept\n"
    (tmp_path / "results.csv").write_bytes(before)
    assert report(tmp_path) == (0, f"{tmp_path / 'report.html'}\n", "")
    assert (tmp_path / "results.csv").read_bytes() == before


def test_the_script_says_what_is_wrong_in_one_line(
    ablation: list[Entry], report: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    first, second = ablation[0].folder, ablation[3].folder
    assert report(first, second, "--to", tmp_path / "x", "--baseline", "nobody") == (
        2, "", "error: no group is called 'nobody' (--baseline): choose one of 'none-1', 'lora-1'\n"
    )  # fmt: skip
    code, _, err = report(first, second, "--to", first)
    assert (code, err) == (
        2,
        f"error: a run's directory keeps its own report ({first}): name another folder with --to\n",
    )
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, _, err = report(first, second, "--to", tmp_path / "file")
    assert code == 2
    assert err.startswith("error: the comparison cannot be made, ")
    code, _, err = report(first, tmp_path / "nowhere")
    assert (code, err.count("\n")) == (2, 1)

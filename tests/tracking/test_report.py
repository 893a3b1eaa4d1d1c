"""The HTML report: numbers, escaping, torn and missing files, and the data behind the plots.

For looking at the page: ``python tests/tracking/test_report.py DIR``. Plots are tested on the data handed to them, not on pixels, which change with matplotlib.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lmlab.records import Sample, UserError
from lmlab.tracking import plots
from lmlab.tracking.report import RunFiles, flatten, read_run, render, status, write_report
from lmlab.tracking.sample_view import sample_groups, word_diff

from .pages import (
    HOSTILE,
    Page,
    assert_only_our_script,
    metric_rows,
    script,
    write_json,
    write_lines,
    write_run,
)


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "adapter-qlora-a1b2")


def test_a_finished_run_shows_its_numbers(run_dir: Path) -> None:
    page = page_of(run_dir)
    text = " ".join(page.words.split())
    for shown in ("adapter-qlora-a1b2", "✓ finished", "1.298at step 150, from 3.48 at step 0", "4.127", "2.04% of 4,812,288",
                  "1.21 GBin backward", "60.0%", "train.py adapter=qlora quant=nf4",
                  "records_dropped: empty response", "0.5% of those read", "301,222", "37.1% of the tokens",
                  "17 trained", "paged_adamw8bit", "versions/torch"):  # fmt: skip
        assert shown in text, shown
    assert sorted(p.name for p in run_dir.iterdir() if "report" in p.name) == [
        "data_report.json",
        "report.html",
    ]


def test_the_page_is_well_formed_offline_and_accessible(run_dir: Path) -> None:
    page = page_of(run_dir)
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attrs.get(name) or "#").startswith("#"), (tag, attrs)
        assert tag not in ("link", "iframe", "img")
        referred = re.findall(r"url\(([^)]*)\)", " ".join(str(value) for value in attrs.values()))
        assert all(target.lstrip("#") in ids for target in referred)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") > 4
    assert tags.count("svg") == tags.count("figure") == 6
    labels = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(labels) == 6
    assert "best 1.298 at step 150" in str(labels[0])
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "http://" not in html
    assert_only_our_script(html)
    assert html.count("https://evil.example") > 0, "as text"
    assert not [value for _, attrs in page.tags for value in attrs.values() if value and "://" in value]
    assert "var(--c1)" in html
    assert "#0a0b" not in html


@pytest.mark.usefixtures("undrawn")
def test_sample_text_is_escaped_and_kept_as_it_is(run_dir: Path) -> None:
    page = page_of(run_dir)
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "&lt;script src=" in html
    assert html.count("<script") == 1, "ours"
    assert HOSTILE in page.words
    assert "(no text)" in page.words
    assert "(only white space: 3 characters, 2 line breaks)" in page.words
    assert "with 200 words removed.\n\n    >>> ' x '.strip()\n    'x'" in page.words


@pytest.mark.usefixtures("undrawn")
def test_odd_characters_do_not_break_the_page(run_dir: Path) -> None:
    odd = Sample(
        300, 0, "p\u2028q", "<i>_k", 1, "a\x00b\x1b[0m \ud800 \u202e", 3, "eos", {"note": "<b>"}
    ).row()
    with open(run_dir / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(odd) + "\n")
    words = page_of(run_dir).words
    assert "a␀b␛[0m \\ud800" in words
    assert "note: <b>" in words
    assert "<i>_k" in words


@pytest.mark.usefixtures("undrawn")
def test_a_torn_last_line_is_ignored_and_said(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 210, "time": 99.1, "train/lo')
    page = page_of(run_dir)
    assert "The last line of metrics.jsonl is cut off (line 207): that line alone is ignored." in page.words
    assert len(read_run(run_dir).metrics) == len(metric_rows())


@pytest.mark.usefixtures("undrawn")
def test_broken_lines_in_the_middle_are_counted(run_dir: Path) -> None:
    write_lines(
        run_dir / "metrics.jsonl",
        [{"step": 1, "train/loss": 2.0}, {"no": "step"}, {"step": 2, "train/loss": 1.0}],
    )
    assert "metrics.jsonl: 1 broken line ignored, the first is line 2." in page_of(run_dir).words


@pytest.mark.parametrize("gone", ["metrics.jsonl", "samples.jsonl", "summary.json", "data_report.json", "config.yaml",
                                  "run.json", "mask_preview.txt"])  # fmt: skip
@pytest.mark.usefixtures("undrawn")
def test_any_file_may_be_missing(run_dir: Path, gone: str) -> None:
    (run_dir / gone).unlink()
    assert f"Not in the run directory: {gone}." in page_of(run_dir).words


@pytest.mark.parametrize(
    "left", ["metrics.jsonl", "samples.jsonl", "summary.json", "data_report.json", "config.yaml", "run.json"]
)
@pytest.mark.parametrize("content", [None, "", '{"step": 1, "val/loss": {', "[1]", "\x00\ufffd"])
@pytest.mark.usefixtures("undrawn")
def test_one_file_of_any_content_makes_a_page(run_dir: Path, left: str, content: str | None) -> None:
    for path in run_dir.iterdir():
        if path.name != left:
            path.unlink()
        elif content is not None:
            path.write_text(content, encoding="utf-8")
    assert "Not in the run directory" in page_of(run_dir).words


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_of_the_wrong_kind_do_not_stop_the_page(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [
        *dict.fromkeys(name for row in metric_rows() for name in row if name != "step"),
        "memory/$<b>_/peak_gb",
    ]
    odd = [None, "x", True, [1], {"a": 1}, math.nan, 1e308, -1e308, 10**400, 0]
    rows = [{"step": step, **dict.fromkeys(names, value)} for step, value in enumerate(odd)]
    write_lines(run_dir / "metrics.jsonl", [*rows, {"step": 10**400}, {"step": None}])
    samples = [
        {"step": 1, **dict.fromkeys(("prompt_id", "prompt", "sampler", "text", "extra"), value)}
        for value in odd
    ]
    write_lines(run_dir / "samples.jsonl", [*samples, {"step": 2}])
    assert "The plot 'Loss' could not be drawn" in page_of(run_dir).words
    monkeypatch.setattr(plots, "draw", lambda panel: "<svg></svg>")
    for value in odd:
        for name in ("summary.json", "data_report.json", "run.json"):
            keys = json.loads((run_dir / name).read_text(encoding="utf-8"))
            write_json(run_dir / name, dict.fromkeys([*keys, "error", "traceback"], value))
        render(read_run(run_dir))


def test_a_failed_run_says_so_first(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "died", failed=True)
    words = page_of(run_dir).words
    assert "✗ failed, exit code 1, last logged step 83" in " ".join(words.split())
    assert words.index("CUDA out of memory in <backward>: 2.1 GB more asked for") < words.index(
        "Best val/loss"
    )
    assert "OutOfMemoryError" in words


@pytest.mark.usefixtures("undrawn")
def test_status_without_a_summary_is_not_called_finished(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"status": "fin', encoding="utf-8")
    run = read_run(run_dir)
    assert status(run)["kind"] == "open"
    assert "summary.json is incomplete" in " ".join(run.notices)


@pytest.mark.parametrize(
    ("summary", "kind"),
    [({"exit_code": 143, "status": "interrupted"}, "open"), ({"exit_code": None, "status": "running"}, "open"),
     ({"exit_code": 1}, "bad"), ({"exit_code": 0}, "good"), ({"status": "failed"}, "bad")],
)  # fmt: skip
def test_how_a_run_ended(summary: dict[str, Any], kind: str) -> None:
    told = status(RunFiles(Path("x"), summary=summary))
    assert told["kind"] == kind
    assert ("still going" in told["reason"]) == (summary.get("status") == "running")


def test_one_wrong_timing_does_not_flatten_the_throughput_plot() -> None:
    rows = [{"step": step, "perf/tokens_per_second": 2e12 if step == 1 else 1000.0} for step in range(1, 6)]
    panel = plots.panels(rows, {})[0]
    assert (panel.top, panel.note) == (3000.0, "1 value above 3,000 cut off")
    assert flatten({"dropped": {}, "gpus": []}) == {"dropped": "none", "gpus": "none"}


def test_values_that_are_not_finite_are_named(run_dir: Path) -> None:
    rows = [
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": math.nan},
        {"step": 3, "train/loss": "Infinity"},
    ]
    write_lines(run_dir / "metrics.jsonl", [*rows, {"step": 4, "train/loss": None, "train/lr": 10**400}])
    run = read_run(run_dir)
    assert run.notices == [
        "train/loss is not a finite number at 3 log points, first at step 2. The curves leave these out."
    ]
    assert plots.panels(run.metrics, {})[0].lines == (plots.Line("train/loss", {1: 2.0}),)
    render(run)


def test_a_resumed_log_keeps_the_later_values() -> None:
    rows = [
        {"step": 10, "val/loss": 3.0},
        {"step": 20, "val/loss": 9.0},
        {"step": 20, "val/loss": 2.0},
        {"step": 15, "val/loss": 2.5},
    ]
    assert list(plots.series(rows, "val/loss").items()) == [(10, 3.0), (15, 2.5), (20, 2.0)]
    assert plots.best_validation([{"step": 0, "val/loss": 1.0}, *rows]) == (20, 2.0)


def test_the_data_handed_to_the_plots() -> None:
    rows = [
        {"step": s, "train/loss": float(s % 2), "train/lr": s / 10, "perf/tokens_per_second": 100.0 * s}
        for s in range(1, 4)
    ]
    rows += [
        {"step": 0, "val/loss": 4.0, "memory/eval/peak_gb": 0.5},
        {"step": 3, "val/loss": 3.5, "memory/eval/peak_gb": 0.7},
    ]
    rows += [{"step": 3, "memory/rss_gb": 1.5, "train/grad_norm": 0.25, "memory/load/planned_gb": 0.4}]
    golden = [
        plots.Panel("loss", "Loss", (plots.Line("train/loss", {1: 1.0, 2: 0.0, 3: 1.0}),
                                     plots.Line("val/loss", {0: 4.0, 3: 3.5}, "marked", 1)), mark=("best", 3, 3.5)),
        plots.Panel("lr", "Learning rate", (plots.Line("train/lr", {1: 0.1, 2: 0.2, 3: 0.3}),)),
        plots.Panel("grad_norm", "Gradient norm", (plots.Line("train/grad_norm", {3: 0.25}),)),
        plots.Panel("memory_phases", "Peak memory per phase, GB",
                    bars=(plots.Bar("load", 0.3, 0.4), plots.Bar("eval", 0.7), plots.Bar("zeta", 0.1))),
        plots.Panel("memory_steps", "Memory over the run, GB", (plots.Line("rss_gb", {3: 1.5}, "plain", 2),)),
        plots.Panel("throughput", "Tokens per second",
                    (plots.Line("non-padding tokens/s", {1: 100.0, 2: 200.0, 3: 300.0}),
                     plots.Line("median", {1: 200.0, 3: 200.0}, "dashed", 1))),
    ]  # fmt: skip
    assert plots.panels(rows, {"final/memory/load/peak_gb": 0.3, "memory/zeta/peak_gb": 0.1}) == golden


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-4, "2e-4"), (1.5e-5, "1.5e-5"), (1e-10, "1e-10"), (0.0, "0"), (3.14159, "3.142"), (9101.7, "9,102"), (12, "12"),
     (1e300, "1.000e+300"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert plots.short(value) == text


def test_smoothing_keeps_a_straight_line_and_thinning_keeps_spikes() -> None:
    straight = {step: 2.0 * step for step in range(1, 101)}
    assert plots.smooth(straight) == pytest.approx(straight)
    long = dict.fromkeys(range(100_000), 1.0) | {54_321: 50.0, 77_777: -3.0}
    thinned = plots.thin(long)
    assert len(thinned) <= plots.MAX_POINTS + 2
    assert (thinned[54_321], thinned[77_777]) == (50.0, -3.0)
    assert (min(thinned), max(thinned)) == (0, 99_999)


def test_a_long_list_of_sampling_steps_is_cut_evenly_and_said() -> None:
    group = sample_groups(
        [{"step": step, "prompt_id": 0, "prompt": "p", "text": "t"} for step in range(0, 1000, 10)]
    )[0]
    assert (group["step"], group["earlier_steps"][0], group["earlier_steps"][-1]) == (990, 980, 0)
    assert len(group["earlier_steps"]) + group["left_out"] + 1 == 100


def test_a_word_diff_gives_both_texts_back() -> None:
    old, new = "The cat sat on the mat.\n    It purred.", "The dog sat on a red mat.\n    It barked loudly."
    changes = word_diff(old, new)
    assert changes is not None
    assert "".join(text for kind, text in changes if kind != "gone") == new
    assert "".join(text for kind, text in changes if kind != "new") == old
    assert changes[:4] == [("same", "The "), ("gone", "cat"), ("new", "dog"), ("same", " sat on ")]
    assert word_diff("a b c d", "w x y z") == [("gone", "a b c d"), ("new", "w x y z")], (
        "one change, not four"
    )
    assert word_diff(old, old) == [("same", old)]
    assert word_diff("", "") == []
    assert word_diff("x" * 10_001, "y" * 10_000) is None
    assert word_diff("! " * 4000, "! " * 4000) is None, "few characters, but 4000 x 4000 pairs"
    assert word_diff("a b", "a\nb c") == [
        ("same", "a"), ("gone", " "), ("new", "\n"), ("same", "b"), ("new", " c")
    ]  # fmt: skip
    unlike = [" ".join(f"{mark}{number}" for number in range(1000)) for mark in "ab"]
    assert word_diff(*unlike) == [("gone", unlike[0]), ("new", unlike[1])]


@pytest.mark.usefixtures("undrawn")
def test_samples_are_shown_with_their_figures_and_what_has_changed(run_dir: Path) -> None:
    def row(step: int, text: str, **figures: object) -> dict[str, object]:
        return Sample(step, 0, "p", "greedy", 0, text, 3, "eos", dict(figures)).row()

    rows = [
        row(0, "the <b>cat</b>", distinct_1=0.5, similarity=None),
        row(10, "the cat", distinct_1=1.0, mean_entropy=1.23456, similarity=0.25),
        row(20, "the cat", distinct_1=1.0, similarity=1.0),
        row(30, "the dog", distinct_1=1.0, similarity=0.5),
    ]
    assert "extra" not in rows[0]
    write_lines(run_dir / "samples.jsonl", rows)
    html = page_of(run_dir) and (run_dir / "report.html").read_text(encoding="utf-8")
    assert "the <del>cat</del><ins>dog</ins>" in html
    assert "the <del>&lt;b&gt;</del>cat<del>&lt;/b&gt;</del>" in html
    assert "the same as at step 10" in html
    assert html.count("<details open><summary>since step") == 1, "the newest is open, the others are not"
    assert "<span>entropy: 1.235 nats</span>" in html
    assert html.count("similarity:") == 3, "what was not measured is left out"
    write_lines(run_dir / "samples.jsonl", [row(0, "x " * 9000), row(1, "y " * 9000)])
    assert "too long to be compared with step 0" in page_of(run_dir).words


@pytest.mark.usefixtures("undrawn")
def test_the_script_prints_paths_and_one_line_errors(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = run_dir.parent / "empty"
    empty.mkdir()
    assert script().main([str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"
    fix = "give a directory that train.py made, e.g. outputs/sft/NAME"
    for wrong, what in ((empty, "no run directory"), (empty / "nowhere", "no such directory")):
        assert script().main([str(wrong)]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"error: {what} ({wrong}): {fix}\n")
    with pytest.raises(UserError):
        write_report(empty)


if __name__ == "__main__":
    for kind in ("finished", "failed"):
        print(write_report(write_run(Path(sys.argv[1]) / kind, failed=kind == "failed")))

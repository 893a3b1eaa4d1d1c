"""The page that compares runs, from whole, hostile, torn and missing files; results.csv; the script."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lmlab.records import Sample, UserError
from lmlab.tracking import compare, group_plots, groups
from lmlab.tracking.compare import render, write_comparison
from lmlab.tracking.groups import Entry, read_result
from lmlab.tracking.results import FIGURES, entries_of, rows_of, write_results

from .pages import HOSTILE, Page, assert_only_our_script, page_of, small_run, write_json, write_lines

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
def test_only_our_script_may_run(ablation: list[Entry]) -> None:
    assert_only_our_script(render(ablation, title="a sweep"))


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
    assert re.search(r"val/loss\s+holds if .*?\? cannot be told", page.words, re.DOTALL)


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
    assert err.startswith("error: the page cannot be made, ")
    code, _, err = report("a" * 300)
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = report(first, tmp_path / "nowhere")
    assert (code, err.count("\n")) == (2, 1)

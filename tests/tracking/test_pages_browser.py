"""The pages in a real browser, where one is installed: width on a phone, colours, sorting, filtering, keyboard, following."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmlab.tracking.compare import write_comparison
from lmlab.tracking.groups import Entry
from lmlab.tracking.index import write_index
from lmlab.tracking.report import write_report
from lmlab.tracking.results import write_results

from .browser import Browser, needs_browser
from .pages import small_run, write_json, write_run

pytestmark = needs_browser

SEEN = "Array.from(document.querySelectorAll('#runs tbody tr')).filter(r => !r.hidden).map(r => r.cells[0].querySelector('a')?.textContent ?? r.cells[0].childNodes[r.querySelector('.fold') ? 1 : 0].textContent)"
TYPE = """(query, column) => {{ const box = document.querySelector('.filter'); box.querySelector('select').value = column;
  box.querySelector('select').dispatchEvent(new Event('change')); const field = box.querySelector('input'); field.value = query;
  field.dispatchEvent(new Event('input')); return box.querySelector('output').textContent; }}"""
INK = "getComputedStyle(document.documentElement).getPropertyValue('--fg').trim()"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three runs alone and a sweep of two."""
    ends = {"one": 3.0, "two": 1.0, "three": 2.0}
    for place, (name, end) in enumerate(ends.items()):
        run = small_run(
            tmp_path / "sft" / name,
            losses={0: 4.0, 20: end},
            status="failed" if name == "two" else "finished",
        )
        write_json(run / "run.json", {"started": f"2026-11-2{place}T10:00:00+00:00"})
    sweep = tmp_path / "sweeps" / "grid"
    rows = []
    for job, end in ((0, 2.5), (1, 1.5)):
        small_run(sweep / f"{job}-lr={job}", adapter="lora", losses={0: 4.0, 20: end})
        rows.append(
            {"job": job, "overrides": f"lr={job}", "status": "finished", "directory": f"x/{job}-lr={job}"}
        )
    write_results(sweep, rows)
    return tmp_path


def type_in(browser: Browser, query: str, column: int = -1) -> str:
    """Write into the first table's filter; what it says then."""
    return browser.run(f"({TYPE.replace('{{', '{').replace('}}', '}')})({json.dumps(query)}, '{column}')")


# --- every page -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pages(root: Path, tmp_path: Path) -> list[Path]:
    """A run's page, one that compares, and the list."""
    long = "experiment=" + "a_very_long_name_" * 8
    report = write_report(write_run(tmp_path / "reports" / "run-with-a-long-name-that-goes-on"))
    entries = [
        Entry(f"{long}{kind}", small_run(tmp_path / "c" / kind, adapter=kind)) for kind in ("none", "lora")
    ]
    compared = write_comparison(tmp_path / "c", entries, title="a sweep with a long name of many words")
    return [report, compared, write_index(root)]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_pages_are_no_wider_than_the_screen_and_ask_for_nothing(
    browser: Browser, pages: list[Path], width: int, dark: bool
) -> None:
    for page in pages:
        browser.open(page.as_uri(), width=width, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") == width, page
        assert browser.requests == [page.as_uri()]
        assert browser.errors == [], "the policy forbids nothing that the page wants"
        small = browser.run(
            "Array.from(document.querySelectorAll('body *')).filter(e => e.childNodes.length && e.getClientRects().length"
            " && !e.closest('svg') && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && parseFloat(getComputedStyle(e).fontSize) < 12)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )
        assert small == [], "no text below 12 px"
        # What lies on what: WCAG's contrast of text against the background of the page.
        ink, paper = (
            browser.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
        )
        assert contrast(ink, paper) > 10
        for name in ("--muted", "--c1", "--c2", "--c3", "--good", "--bad", "--open"):
            shade = browser.run(
                f"getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()"
            )
            assert contrast(shade, paper) >= 4.5, (name, shade)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours, ``#rrggbb`` or ``rgb(r, g, b)``."""
    light = []
    for colour in (one, other):
        parts = (
            [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
            if colour.startswith("#")
            else [int(n) for n in re.findall(r"\d+", colour)[:3]]
        )
        linear = [
            v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in parts
        ]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_colours_follow_the_system_until_they_are_chosen(browser: Browser, pages: list[Path]) -> None:
    page = pages[0].as_uri()
    browser.open(page)
    assert browser.run("localStorage.clear()") is None
    browser.open(page, dark=True)
    dark = browser.run(INK)
    browser.open(page)
    light = browser.run(INK)
    assert light != dark
    line = "getComputedStyle(document.querySelector('figure svg path[style*=stroke]')).stroke"
    drawn = browser.run(line)
    press = "document.querySelector('.colours').click(), document.querySelector('.colours').textContent"
    assert browser.run(press) == "Colours: light"
    assert browser.run(INK) == light
    assert browser.run(press) == "Colours: dark"
    assert browser.run(INK) == dark
    assert browser.run(line) != drawn, "the plots too"
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.run(INK) == light, "paper is light"
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.open(page)
    assert browser.run(INK) == dark, "it is remembered"
    assert browser.run(press) == "Colours: system"
    assert browser.run(INK) == light


def test_no_other_script_runs(browser: Browser, pages: list[Path]) -> None:
    page = pages[1]
    html = page.read_text(encoding="utf-8")
    page.write_text(
        html.replace("</body>", "<script>document.title = 'theirs'</script></body>"), encoding="utf-8"
    )
    browser.open(page.as_uri())
    assert browser.run("document.title") != "theirs"
    page.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8")), encoding="utf-8")
    browser.open(page.as_uri())
    assert browser.run("document.title") == "theirs", "without the policy it would"


# --- tables ---------------------------------------------------------------------------------------------------------


def test_the_comparing_page_sorts(browser: Browser, tmp_path: Path) -> None:
    ends = {1: 3.0, 2: 1.0, 3: 2.0}
    entries = [
        Entry(f"lr={lr}", small_run(tmp_path / str(lr), optim={"lr": lr}, losses={0: 4.0, 20: end}))
        for lr, end in ends.items()
    ]
    page = write_comparison(tmp_path, entries, title="a sweep")
    assert "<button" not in page.read_text(encoding="utf-8"), "complete without the script"
    browser.open(page.as_uri())
    order = "Array.from(document.querySelectorAll('[aria-label=\"Results table\"] tbody .name')).map(n => n.textContent)"
    assert browser.run(order) == ["lr=1", "lr=2", "lr=3"]
    browser.run("document.querySelectorAll('[aria-label=\"Results table\"] thead button')[2].click()")
    assert browser.run(order) == ["lr=2", "lr=3", "lr=1"]


def test_the_list_folds_sweeps_and_sorts_by_keyboard(browser: Browser, root: Path) -> None:
    browser.open(write_index(root).as_uri())
    assert browser.run(SEEN) == ["three", "two", "one", "grid"], "newest first, and the jobs folded away"
    heads = "document.querySelectorAll('#runs thead th')"
    assert browser.run(f"{heads}[3].getAttribute('aria-sort')") == "descending"
    browser.run(f"{heads}[5].querySelector('button').focus()")
    browser.key("Enter", 13, "\r")
    assert browser.run(SEEN) == ["two", "grid", "three", "one"], "of the sweep its lowest, 1.5"
    assert browser.run(f"Array.from({heads}).map(h => h.getAttribute('aria-sort'))").count(None) == 12
    browser.run("document.querySelector('.fold').focus()")
    assert browser.run("document.activeElement.getAttribute('aria-label')") == "jobs of grid"
    browser.key(" ", 32, " ")
    assert browser.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert browser.run(SEEN) == ["two", "grid", "1-lr=1", "0-lr=0", "three", "one"], "sorted inside too"
    browser.run(f"{heads}[5].querySelector('button').click()")
    assert browser.run(SEEN) == ["one", "three", "grid", "0-lr=0", "1-lr=1", "two"]
    assert browser.run(f"{heads}[6].querySelector('button')") is None, "curves have no order"


def test_the_list_filters_by_words_and_by_a_column(browser: Browser, root: Path) -> None:
    browser.open(write_index(root).as_uri())
    assert type_in(browser, "") == "5 rows"
    assert type_in(browser, "t") == "5 of 5"
    assert type_in(browser, "FAILED") == "1 of 5"
    assert browser.run(SEEN) == ["two"]
    assert type_in(browser, "!failed sft") == "4 of 5"
    assert type_in(browser, "grid") == "2 of 5"
    assert browser.run(SEEN) == ["grid"], "the sweep as it is, folded"
    assert type_in(browser, "lr=1", 0) == "1 of 5"
    assert browser.run(SEEN) == ["grid", "1-lr=1"], "a job shows its sweep, folded or not"
    assert type_in(browser, "< 2.5", 5) == "3 of 5"
    assert browser.run(SEEN) == ["three", "two", "grid", "1-lr=1"]
    assert type_in(browser, ">=2.5 ", 5) == "2 of 5"
    assert type_in(browser, "nowhere") == "0 of 5"
    assert browser.run(SEEN) == []
    type_in(browser, "")
    assert browser.run(SEEN) == ["three", "two", "one", "grid"]
    label = browser.run("document.querySelector('.filter input').closest('label').textContent.trim()")
    assert label == "Filter"
    assert browser.run("document.querySelector('.filter output').getAttribute('aria-live')") == "polite"


def test_a_long_table_of_a_report_filters_and_a_short_one_has_no_filter(
    browser: Browser, pages: list[Path]
) -> None:
    browser.open(pages[0].as_uri())
    tables = browser.run(
        "Array.from(document.querySelectorAll('table.sortable')).map(t => [t.tBodies[0].rows.length,"
        " t.closest('.scroll').previousElementSibling?.className === 'filter'])"
    )
    assert all(filtered == (rows >= 8) for rows, filtered in tables)
    assert {filtered for _, filtered in tables} == {True, False}
    widths = browser.run(
        "Array.from(document.querySelectorAll('table.sortable')).map(t => t.closest('.scroll').offsetWidth)"
    )
    assert min(widths) > 150, "a filter takes no table's place in a grid"


# --- served ---------------------------------------------------------------------------------------------------------


def test_the_served_list_follows_the_runs(browser: Browser, root: Path) -> None:
    def shows(where: str, text: str) -> None:
        found = f"document.querySelector('{where}').textContent.includes('{text}')"
        wait = f"new Promise(done => {{ const look = () => {found} ? done(true) : setTimeout(look, 100); look(); }})"
        assert browser.run(wait)

    script = Path(__file__).parents[2] / "scripts" / "report.py"
    told = [sys.executable, str(script), str(root), "--serve", "--port", "0"]
    with subprocess.Popen(told, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[1]
            browser.open(url)
            type_in(browser, "n", 0)
            browser.run("document.querySelector('.fold').click()")
            link = "Array.from(document.querySelectorAll('#runs a')).find(a => a.textContent === 'one')"
            browser.run(f"{link}.focus()")
            with open(root / "sft" / "one" / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write('{"step": 30, "val/loss": 0.25}\n')
            small_run(root / "sft" / "new")
            small_run(root / "sft" / "xyz")
            shows("#runs", "0.2500")
            shows("#tally", "7 runs")
            assert browser.run(f"document.activeElement === {link}"), "where the keyboard was, in the new row"
            assert sorted(browser.run(SEEN)) == ["new", "one"], "the filter holds for what came"
            type_in(browser, "")
            assert {"grid", "0-lr=0", "1-lr=1", "xyz"} < set(browser.run(SEEN)), "and what was unfolded is"
            assert set(browser.requests) == {url}
            assert browser.errors == []
        finally:
            server.kill()
    shows("#live", "does not answer")

"""The comparing page in a real browser, where one is installed: the policy lets its script run and no other, and it sorts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lmlab.tracking.compare import write_comparison
from lmlab.tracking.groups import Entry

from .pages import small_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]
CLICKS = """<script>document.querySelectorAll("table.sortable")[0].querySelectorAll("thead button")[2].click()</script>"""


def dom(page: Path) -> str:
    """The page as the browser has it after its scripts ran."""
    told = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    done = subprocess.run(
        [*told, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def order(html: str) -> list[str]:
    """The groups of the results table, from top to bottom."""
    table = html.split('aria-label="Results table"')[1].split("</table>")[0]
    return re.findall(r'<span class="name">(lr=\d)</span>', table)


def test_tables_sort_and_nothing_else_runs(tmp_path: Path) -> None:
    ends = {1: 3.0, 2: 1.0, 3: 2.0}
    entries = [
        Entry(f"lr={lr}", small_run(tmp_path / str(lr), optim={"lr": lr}, losses={0: 4.0, 20: end}))
        for lr, end in ends.items()
    ]
    page = write_comparison(tmp_path, entries, title="a sweep")
    html = page.read_text(encoding="utf-8")
    assert "<button" not in html, "complete without the script"
    shown = dom(page)
    assert shown.count('<button type="button">') > 10, "its own script ran"
    assert order(shown) == ["lr=1", "lr=2", "lr=3"]
    page.write_text(html.replace("</body>", CLICKS + "</body>"), encoding="utf-8")
    assert order(dom(page)) == ["lr=1", "lr=2", "lr=3"], "a foreign script ran in spite of the policy"
    page.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", CLICKS + "</body>"), encoding="utf-8"
    )
    assert order(dom(page)) == ["lr=2", "lr=3", "lr=1"]

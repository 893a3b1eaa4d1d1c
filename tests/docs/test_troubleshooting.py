"""docs/troubleshooting.md: every line that lmlab can say is on it, and what it quotes is really said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .error_lines import BEGIN, ERRORS, GAP, PAGE, ROOT, Module, lines, page, sources

PASSED_ON = {
    "certify.py": "the error of the process that compares, as it came",
    "chat/dialogue.py": "what the template's own author wrote into raise_exception",
    "chat/writing.py": "an error of the prompt, with its place",
    "config/compose.py": "an unknown key, once more with what a + would do",
    "config/errors.py": "Hydra's sentence about an interpolation; two problems of one key",
    "data/formats.py": "what the template's own author wrote into raise_exception",
    "data/intake.py": "the reasons of data-errors.md",
    "data/tables.py": "the reasons of data-errors.md",
    "generation/constraints.py": "the error of a constraint, with its place",
    "sweeps/feasible.py": "the plan's own sentence",
    "sweeps/search.py": "the error of the first job, for a search that cannot start",
    "tokenizer_lab/texts.py": "what is wrong with a file, with lab.texts as its place",
    "scripts/check.py": "the flag that does not go with the others",
    "scripts/tokenize_corpus.py": "argparse's sentence about a value",
}
"""Where an error is passed on whose text is fixed in another place, and which one."""


def test_the_page_is_that_of_the_sources() -> None:
    assert page() == PAGE.read_text(encoding="utf-8"), "write it anew: python -m tests.docs.error_lines"


def test_every_error_has_a_text_that_can_be_looked_up() -> None:
    written = [re.sub(r"\\([|])", r"\1", PAGE.read_text(encoding="utf-8"))]
    written.append((ROOT / "docs" / "data-errors.md").read_text(encoding="utf-8"))
    found = lines()
    assert sum(line.kind in ERRORS for line in found) > 350
    assert {line.file for line in found if line.is_open} == PASSED_ON.keys()
    missing = [line for line in found if not line.is_open and not any(line.fixed in each for each in written)]
    assert missing == []


def test_no_error_goes_by_another_name() -> None:
    """A class of its own or an alias would be passed over by the search for calls."""
    names = "|".join(ERRORS)
    for file in sources():
        text = file.read_text(encoding="utf-8")
        heirs = re.findall(rf"^ *class (\w+)\((?:{names})\)", text, re.MULTILINE)
        assert set(heirs) <= set(ERRORS), file
        assert not re.search(
            rf"\b(?:{names}) as (?!error\b|problem\b)\w+,?$|= (?:{names})$", text, re.MULTILINE
        ), file


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise UserError('a', fix='b')", [("a", "b")]),
        ("raise UserError(f'a {x} b', fix=f'use {y!r}')", [(f"a {GAP} b", f"use {GAP}")]),
        ("raise UserError(f'a{\" c\" if x else \"\"} b')", [("a c b", ""), ("a b", "")]),
        ("what = 'a' if x else f'b {x}'\n    raise UserError(what, fix='c')", [("a", "c"), (f"b {GAP}", "c")]),
        ("what, fix = 'a', 'b'\n    if x:\n        what, fix = 'c', 'd'\n    raise UserError(what, fix=fix)",
         [("a", "b"), ("c", "d")]),
        ("raise RunFailedError('a ' + ('b' if x else 'c'))", [("a b", ""), ("a c", "")]),
        ("raise UserError(str(x))", [(GAP, "")]),
        ("print('not an error'); raise ValueError('a')", []),
    ],
)  # fmt: skip
def test_the_forms_of_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr("tests.docs.error_lines.name_of", lambda file: file.name)
    file = tmp_path / "one.py"
    file.write_text(f"def work(x, y):\n    {source}\n", encoding="utf-8")
    assert [(line.what, line.fix) for line in Module(file).errors()] == said


def test_a_text_that_callers_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.error_lines.name_of", lambda file: file.name)
    file = tmp_path / "one.py"
    file.write_text(
        "def refuse(what, fix):\n    raise UserError(what, fix=fix)\n"
        "def one():\n    refuse('a', 'b')\n"
        "def two(n):\n    refuse(f'c {n}', fix='d')\n",
        encoding="utf-8",
    )
    assert [(line.what, line.fix) for line in Module(file).errors()] == [("a", "b"), (f"c {GAP}", "d")]


def test_what_the_first_part_quotes_is_really_said() -> None:
    """Also of the lines that are no class of lmlab's: out of memory, W&B, the warnings."""
    head = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0].partition("## The most common ones")[2]
    quoted = re.findall(r"`(?:error: |warning: |W&B: )([^`]+)`", head)
    assert len(quoted) > 15
    said = [line.what.replace("error: ", "", 1) for line in lines()]
    reasons = (ROOT / "docs" / "data-errors.md").read_text(encoding="utf-8")
    for quote in quoted:
        known = any(quote in text for text in said) or f"`{quote}" in reasons
        assert known, quote


def test_links_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    links = re.findall(r"\]\(([\w.-]+)\)", text)
    assert links
    assert [link for link in links if not (PAGE.parent / link).is_file()] == []

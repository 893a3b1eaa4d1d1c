"""Each file and function that docs/how-it-works.md names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .pages import ROOT

TEXT = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
PLACES = sorted(set(re.findall(r"`([\w/-]+(?:\.py|/))(?:::([\w.]+))?`", TEXT)))


def defined(tree: ast.Module, name: str) -> bool:
    """Whether ``function``, ``Class`` or ``Class.method`` is defined at the top of the module."""
    body: list[ast.stmt] = tree.body
    for part in name.split("."):
        there = [
            node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        ]
        if not there:
            return False
        body = there[0].body
    return True


def test_the_search_itself() -> None:
    tree = ast.parse("class A:\n    def b(self): ...\ndef c(): ...")
    assert [defined(tree, name) for name in ("A", "A.b", "c", "b", "A.c")] == [True, True, True, False, False]
    assert len(PLACES) > 60


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_a_place_is_there(file: str, name: str) -> None:
    places: list[Path] = [ROOT / "src" / "lmlab" / file, ROOT / file]
    path = next((place for place in places if place.exists()), None)
    assert path is not None, f"no {file}"
    if name:
        assert defined(ast.parse(path.read_text(encoding="utf-8")), name), f"{file} has no {name}"

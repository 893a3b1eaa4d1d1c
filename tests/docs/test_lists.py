"""The README's tree and the guide's table of groups have everything that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.partition("## The tree")[2].partition("\n## ")[0]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
PRESETS = ("model", "data", "sweep")
"""Groups with many options, which have pages of their own."""


def _spellings(path: Path) -> set[str]:
    """Ways in which the tree may name it: a script without its ending, a package with a stroke."""
    return {path.name, f"{path.name}/"} | ({path.stem} if path.parent.name == "scripts" else set())


def test_the_readme_is_a_page() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("folder", ["src/lmlab", "scripts", "docs"])
def test_the_tree_is_whole(folder: str) -> None:
    names = [path for path in sorted((ROOT / folder).iterdir()) if not path.name.startswith(("_", "."))]
    words = set(re.findall(r"[\w./-]+", TREE))
    missing = [
        path.name
        for path in names
        if not (_spellings(path) & words or path.name in ("img", "data-errors.md"))
    ]
    assert not missing, f"{folder}: {missing} stand nowhere in the README's tree"


def test_the_groups_are_whole() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", GUIDE, flags=re.MULTILINE))
    for group in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir()):
        if group.name in PRESETS:
            continue
        assert group.name in rows, f"{group.name} is missing in docs/guide.md"
        told = set(re.findall(r"\w+", rows[group.name]))
        options = {file.stem for file in group.glob("[!_]*.yaml")}
        assert options <= told, f"{group.name}: {sorted(options - told)} are missing in docs/guide.md"

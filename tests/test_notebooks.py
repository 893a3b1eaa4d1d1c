"""Every notebook runs from top to bottom where Jupyter would run it, draws figures that can be read, and carries no outputs.

The cells are run by ``exec`` in one namespace: no kernel is needed, so it works with the package's own dependencies.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
CHAPTERS = ("pretraining", "tokenizers", "lora_qlora", "sampling")
QUICK: tuple[str, ...] = ()


def cells_of(chapter: str, kind: str) -> list[dict[str, Any]]:
    """The notebook's cells of one kind."""
    cells = json.loads((FOLDER / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def source(chapter: str) -> str:
    """All code of a notebook."""
    return "\n".join("".join(cell["source"]) for cell in cells_of(chapter, "code"))


def marked(chapters: tuple[str, ...]) -> list[Any]:
    """As parameters; what takes more than some seconds is slow."""
    return [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in chapters]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ``plt.show()`` has shown, drawn."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: list[Any] = []

    def show() -> None:
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            figure.canvas.draw()
            shown.append(figure)
        pyplot.close("all")

    monkeypatch.setattr(pyplot, "show", show)
    return shown


def run(chapter: str) -> None:
    """Run the cells of a notebook in order, as one program."""
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells_of(chapter, "code")):
        exec(compile("".join(cell["source"]), f"{chapter}.ipynb, code cell {number}", "exec"), names)


def check_readable(figure: Any) -> None:
    """Something is drawn, and each axis says what it shows (of shared ones, the outer does)."""
    canvas = FigureCanvasAgg(figure)  # a closed figure has lost the one it was shown on
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 20
    assert figure.axes
    for axes in figure.axes:
        assert axes.has_data()
    columns = {axes.get_xlabel() for axes in figure.axes}
    rows = {axes.get_ylabel() for axes in figure.axes}
    assert columns - {""}
    assert rows - {""}
    text = " ".join(columns | rows) + " ".join(axes.get_title() for axes in figure.axes)
    assert "Traceback" not in text


def test_there_is_one_for_each_chapter() -> None:
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(CHAPTERS)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_carries_no_outputs(chapter: str) -> None:
    cells = cells_of(chapter, "code")
    assert cells
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_section_ends_with_something_to_do(chapter: str) -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells_of(chapter, "markdown"))
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) >= 4
    for section in sections:
        assert "**Question.**" in section or "**Exercise.**" in section, section.splitlines()[0]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_uses_public_names_only(chapter: str) -> None:
    used = set[str]()
    for node in ast.walk(ast.parse(source(chapter))):
        if isinstance(node, ast.ImportFrom):
            used |= {str(node.module), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
    assert any(name.startswith("lmlab.") for name in used)
    assert not [name for name in used if re.search(r"(^|\.)_", name)]


@pytest.mark.parametrize("chapter", marked(CHAPTERS))
def test_runs(
    chapter: str,
    figures: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(FOLDER)  # where Jupyter starts it
    before = set(ROOT.iterdir()) | set(FOLDER.iterdir())
    run(chapter)
    assert capsys.readouterr().out
    assert len(figures) >= 3
    for figure in figures:
        check_readable(figure)
    assert source(chapter).count("plt.show()") == len(figures)
    assert set(ROOT.iterdir()) | set(FOLDER.iterdir()) == before, "it leaves nothing behind"

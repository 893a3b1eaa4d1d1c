"""Heat maps of layers.jsonl: what is in them, how they are drawn, and that they stay readable and small."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from lmlab.tracking import layer_plots
from lmlab.tracking.layer_plots import MAX_COLUMNS, HeatMap, draw, heat_maps, newest, panels, picture, place
from lmlab.tracking.report import read_run, render

from .pages import assert_only_our_script

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
HOSTILE = "model.layers.0.<script>alert(1)</script>&\u202e"


def layer_rows(blocks: int = 7, validations: int = 20, every: int = 50) -> list[dict[str, Any]]:
    """As a run leaves them: deeper layers move more, and v_proj twice as far as the rest."""
    rows = []
    for step in range(every, every * validations + 1, every):
        for block in range(blocks):
            for index, linear in enumerate(LINEARS):
                grown = 1 - math.exp(-step / (every * validations / 3))
                ratio = 0.01 * grown * (1 + block / blocks) * (2 if "v_proj" in linear else 1)
                rank = 1 + 6 * grown * (1 - 0.05 * index)
                rows.append({"step": step, "layer": f"model.layers.{block}.{linear}", "update_ratio": ratio,
                             "effective_rank": rank, "grad_norm": 0.1 + 0.01 * index})  # fmt: skip
    return rows


def svg_of(heat_map: HeatMap) -> ET.Element:
    return ET.fromstring(draw(heat_map))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", ("self_attn.q_proj", 3)),
        ("transformer.h.11.attn.c_attn", ("attn.c_attn", 11)),
        ("model.layers.2.mlp.experts.17.gate_proj", ("mlp.experts.*.gate_proj", 2)),
        ("lm_head", ("lm_head", None)),
        ("blocks.4", ("blocks.4", None)),
        ("", ("", None)),
    ],
)
def test_the_place_of_a_layer(name: str, expected: tuple[str, int | None]) -> None:
    assert place(name) == expected


def test_rows_are_put_together_by_kind_and_depth() -> None:
    rows = layer_rows(blocks=12)
    update, rank = heat_maps(list(reversed(rows)))
    assert [band.label for band in update.bands] == [linear.split(".")[1] for linear in reversed(LINEARS)]
    assert all(band.depths == tuple(range(12)) for band in update.bands), (
        "by number, not by name: 2 before 10"
    )
    assert update.steps == tuple(range(50, 1001, 50))
    values = {(row["layer"], row["step"]): row["update_ratio"] for row in rows}
    (v_proj,) = (band for band in update.bands if band.label == "v_proj")
    assert v_proj.values[11][-1] == values["model.layers.11.self_attn.v_proj", 1000]
    assert (update.low, update.high) == (0.0, max(values.values()))
    assert rank.low == min(row["effective_rank"] for row in rows)
    assert "highest 0.03642 in v_proj of block 11" in update.description


def test_experts_are_averaged_and_it_is_said() -> None:
    rows = [{"step": 5, "layer": f"model.layers.{b}.mlp.experts.{e}.up_proj", "update_ratio": float(e)}
            for b in range(2) for e in range(4)]  # fmt: skip
    (found,) = heat_maps(rows)
    assert [band.values for band in found.bands] == [((1.5,), (1.5,))]
    assert found.note == "mean over experts"


def test_many_validations_are_thinned_evenly_and_it_is_said() -> None:
    (found, _) = heat_maps(layer_rows(blocks=1, validations=500, every=1))
    assert len(found.steps) == MAX_COLUMNS
    assert (found.steps[0], found.steps[-1]) == (1, 500)
    assert found.note == "460 validations left out"


def test_what_is_not_there_is_not_drawn() -> None:
    assert heat_maps([]) == []
    rows = [{"step": 1, "layer": "a.0.b", "update_ratio": 0.5, "effective_rank": None, "grad_norm": None},
            {"step": 1, "layer": "a.1.b", "update_ratio": "nan"}, {"step": 1, "layer": ["x"], "update_ratio": 1.0},
            {"step": 2}]  # fmt: skip
    (found,) = heat_maps(rows)
    assert [band.depths for band in found.bands] == [(0,)]
    assert "0.5" in "".join(svg_of(found).itertext())
    (found,) = heat_maps([{"step": s, "layer": "a.0.b", "effective_rank": 2.0} for s in (1, 2)])
    assert "everywhere 2" in "".join(svg_of(found).itertext())


def test_a_step_logged_twice_counts_as_logged_last() -> None:
    row = {"step": 1, "layer": "a.0.b", "update_ratio": 1.0}
    (found,) = heat_maps([row, {**row, "update_ratio": 3.0}])
    assert found.bands[0].values == ((3.0,),)
    assert [row["figures"][0] for row in newest([row, {**row, "update_ratio": 3.0}])] == ["3"]


@pytest.mark.parametrize(("blocks", "limit"), [(7, 60_000), (29, 160_000)])
def test_the_drawing_follows_the_page_and_stays_small(blocks: int, limit: int) -> None:
    for found in heat_maps(layer_rows(blocks=blocks)):
        drawn = draw(found)
        assert len(drawn) < limit
        assert "var(--c1)" in drawn
        assert not re.search(r"fill: #|stroke: #", drawn), "a colour that does not follow the page"
        words = "".join(svg_of(found).itertext())
        assert all(linear.split(".")[1] in words for linear in LINEARS)
        assert str(blocks - 1) in words


def test_a_cell_is_as_opaque_as_its_value() -> None:
    rows = [{"step": step, "layer": "a.0.b", "update_ratio": value} for step, value in ((1, 0.0), (2, 1.0))]
    (found,) = heat_maps(rows)
    assert [level for *_, level in layer_plots._runs(found.bands[0].values[0], found)] == [1, 12]


def test_the_picture_is_a_png_of_the_same() -> None:
    (found, _) = heat_maps(layer_rows())
    assert picture(found).startswith(b"\x89PNG\r\n")


def test_the_page_has_curves_maps_and_the_table(tmp_path: Path) -> None:
    import json

    rows = [*layer_rows(blocks=2), {"step": 1000, "layer": HOSTILE, "update_ratio": 0.001}]
    metrics = [{"step": s, "layers/update_ratio": s / 1e5, "layers/effective_rank": 2.0, "layers/grad_norm_max": 0.3}
               for s in range(50, 1001, 50)]  # fmt: skip
    (tmp_path / "summary.json").write_text("{}")
    for name, lines in (("layers", rows), ("metrics", metrics)):
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    with (tmp_path / "layers.jsonl").open("a") as file:
        file.write('{"step": 1050, "layer": "torn')
    run = read_run(tmp_path)
    assert any("layers.jsonl is cut off" in notice for notice in run.notices)
    assert [panel.title for panel in panels(run.metrics)] == [
        "Update against weight, mean over layers",
        "Effective rank of the update, mean over layers",
        "Largest gradient norm of a layer",
    ]
    page = render(run)
    assert "Every layer at step 1,000" in page
    assert page.count("<figure>") == 5
    assert_only_our_script(page)
    (tmp_path / "layers.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_text("")
    run = read_run(tmp_path)
    assert "layers.jsonl" not in run.missing, "a run may go without"
    assert 'id="layers"' not in render(run)

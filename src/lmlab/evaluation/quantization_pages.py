"""The quantization report as files: tables (Markdown, CSV, JSON) and plots (PNG) of what was measured."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.journal import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "fp16": "#9aa0a6",
    "bf16": "#5f6368",
    "int8": "#1f77b4",
    "fp4": "#ff7f0e",
    "int4": "#d62728",
    "nf4": "#2ca02c",
    "nf4+dq": "#17a589",
}
SMALLEST_ERROR = 1e-2
"""Percent: where the plot of errors ends below. A model kept in bf16 is stored in 16 bits all but exactly."""
NAMES_UP_TO = 48
"""Layers whose names fit under a plot; more are numbered."""


def write_pages(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write all files into ``folder`` and return ``found`` with their names under ``files``."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
        "error_per_layer.png": _draw_errors,
        "quality_against_bits.png": _draw_quality,
        "kl_per_kind.png": _draw_kl,
    }
    for name, paint in plots.items():
        _save(folder / name, paint, found)
    kinds = [{k: v for k, v in row.items() if k != "nll_per_text"} for row in found["kinds"]]
    _write_csv(folder / "quantization.csv", kinds)
    _write_csv(folder / "layers.csv", _layer_rows(found))
    (folder / "quantization.md").write_text(markdown(found, list(plots)), encoding="utf-8")
    names = ["quantization.md", "quantization.csv", "layers.csv", *plots, "quantization.json"]
    found = found | {"files": [str(folder / name) for name in names]}
    write_json(folder / "quantization.json", found)
    return found


def _layer_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    spread = {row["layer"]: row for row in found["weights"]}
    return [
        {"kind": kind, **row, **{k: spread[row["layer"]][k] for k in ("outlier_share", "largest_in_sigmas")}}
        for kind, rows in found["layers"].items()
        for row in rows
    ]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The whole report as one Markdown page."""
    parameters, tokens = found["parameters"], found["tokens"]
    share = parameters["linear"] / parameters["total"]
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    skipped = f" ({found['skipped_texts']} without two tokens left out)" if found["skipped_texts"] else ""
    return "\n".join(
        [
            f"# Storage of {found['model']}",
            "",
            f"{found['texts']} texts{skipped}, {tokens:,} tokens predicted in windows of {found['window']}; products in fp32 "
            f"on {found['device']}; {versions}.",
            "",
            f"Of {parameters['total']:,} parameters {share:.1%} lie in linear layers. int8 and the 4-bit kinds store these and "
            "leave embeddings, head and norms in 32 bits; fp16 and bf16 store all but the norms. *Quantized* is the share of "
            "all parameters in fewer than 32 bits, *bits* those of a parameter of the linear layers (of the whole model), "
            "all scales and tables counted.",
            "",
            _kinds_table(found["kinds"]),
            "",
            "Differences are to fp32 on the same texts, ± one standard error over the texts. KL is KL(fp32 || kind) of the next "
            "token. *Weight error* is the Frobenius norm of the error of all linear layers over that of their weights.",
            "",
            "## Order by perplexity",
            "",
            _order_table(found["order"]),
            "",
            "## Layers",
            "",
            f"Relative error of each kind (cosine to the original in layers.csv). *Outliers*: {found['definitions']['outlier']}.",
            "",
            _layers_table(found),
            "",
            *(f"![{name}]({name})" for name in plots),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _kinds_table(kinds: Sequence[Mapping[str, Any]]) -> str:
    head = ["kind", "bits", "MB", "quantized", "weight error", "perplexity", "nll more", "KL", "same token"]
    rows = [
        [
            row["kind"],
            f"{row['bits_per_param']:.3f} ({row['model_bits_per_param']:.2f})",
            f"{row['base_bytes'] / 1e6:.3f}",
            f"{row['quantized_share']:.1%}",
            f"{row['weight_error']:.3%}",
            f"{row['perplexity']:.4f}",
            _with_error(row["nll_increase"], row["nll_increase_error"], sign=True),
            _with_error(row["kl"], row["kl_error"]),
            f"{row['same_token']:.2%}",
        ]
        for row in kinds
    ]
    return _table(head, rows)


def _with_error(value: float, error: float | None, *, sign: bool = False) -> str:
    text = f"{value:+.2e}" if sign else f"{value:.2e}"
    return text if error is None else f"{text} ± {error:.1e}"


def _order_table(rows: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for place, row in enumerate(rows, 1):
        more, error = row["nll_more"], row["error"]
        if more is None:
            words = ""
        elif error is None:
            words = "one text: no spread"
        else:
            words = "apart" if more > 2 * error else "not apart: less than two standard errors"
        told.append([str(place), row["kind"], "" if more is None else _with_error(more, error), words])
    return _table(["", "kind", "nll more than the one before", ""], told)


def _layers_table(found: Mapping[str, Any]) -> str:
    kinds = list(found["layers"])
    head = ["layer", "shape", "outliers", "largest", *kinds]
    rows = [
        [
            spread["layer"],
            " x ".join(map(str, spread["shape"])),
            f"{spread['outlier_share']:.4%}",
            f"{spread['largest_in_sigmas']:.1f} σ",
            *(f"{found['layers'][kind][index]['relative_error']:.3%}" for kind in kinds),
        ]
        for index, spread in enumerate(found["weights"])
    ]
    return _table(head, rows)


# --- plots ------------------------------------------------------------------------------------------------------------


def _save(path: Path, paint: Callable[[Axes, Mapping[str, Any]], None], found: Mapping[str, Any]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        paint(axes, found)
        figure.savefig(path, dpi=150)


def _colour(kind: str) -> str:
    return COLOURS.get(kind, "#8c564b")


def _measured(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in found["kinds"] if row["kind"] != "fp32"]


def _draw_errors(axes: Axes, found: Mapping[str, Any]) -> None:
    names = [row["layer"] for row in found["weights"]]
    for kind, rows in found["layers"].items():
        errors = [100 * row["relative_error"] for row in rows]
        dashed = "--" if kind.endswith("+dq") else "-"
        axes.plot(errors, dashed, marker="o", markersize=3, linewidth=1, color=_colour(kind), label=kind)
    axes.set_yscale("log")
    lowest = axes.get_ylim()[0]
    axes.set_ylim(bottom=max(lowest, SMALLEST_ERROR))
    below = f" (below {SMALLEST_ERROR:g} not shown)" if lowest < SMALLEST_ERROR else ""
    axes.set_ylabel(f"relative error of the weight, %{below}")
    axes.set_title(f"Error of each linear layer, {Path(found['model']).name}", loc="left")
    axes.grid(axis="y", alpha=0.3)
    if len(names) <= NAMES_UP_TO:
        short = [name.replace("model.layers.", "").replace("transformer.h.", "") for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=6)
    else:
        axes.set_xlabel("linear layer, in the model's order")
    axes.legend(ncols=len(found["layers"]), loc="lower left", bbox_to_anchor=(0, 1.06), frameon=False)


def _draw_quality(axes: Axes, found: Mapping[str, Any]) -> None:
    """Cost against size; on a scale that is linear around 0, as 16 bits may come out better than fp32 by chance."""
    rows = _measured(found)
    for row in rows:
        error = row["nll_increase_error"]
        axes.errorbar(
            row["bits_per_param"],
            row["nll_increase"],
            yerr=error,
            fmt="o",
            markersize=6,
            capsize=3,
            color=_colour(row["kind"]),
            label=row["kind"],
        )
    axes.axhline(0, color="#5f6368", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=1e-3)
    ends = [row["nll_increase"] + side * (row["nll_increase_error"] or 0) for row in rows for side in (-1, 1)]
    axes.set_ylim(min(0.0, 2 * min(ends)), max(0.0, 2 * max(ends)) or 1.0)
    axes.set_xscale("log", base=2)
    ticks = sorted({round(row["bits_per_param"], 1) for row in rows if row["bits_per_param"] > 5} | {4, 4.5})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bits per parameter of the linear layers, as stored")
    axes.set_ylabel("nats per token more than fp32")
    axes.set_title(f"Quality against size, {Path(found['model']).name}", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_kl(axes: Axes, found: Mapping[str, Any]) -> None:
    rows = _measured(found)
    values = [row["kl"] for row in rows]
    errors = [row["kl_error"] or 0.0 for row in rows]
    places = range(len(rows))
    axes.barh(
        places, values, xerr=errors, color=[_colour(row["kind"]) for row in rows], height=0.6, capsize=3
    )
    axes.set_yticks(places, [row["kind"] for row in rows])
    axes.invert_yaxis()
    positive = [value for value in values if value > 0]
    if positive:  # a logarithmic axis has no place for anything else
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 3, max(positive) * 6)
    for place, value, error in zip(places, values, errors, strict=True):
        axes.text((value + error) * 1.15, place, f"{value:.2e}", va="center")
    axes.set_xlabel("KL(fp32 || kind) of the next token, nats")
    axes.set_title(f"Divergence of the predictions, {Path(found['model']).name}", loc="left")
    axes.grid(axis="x", alpha=0.3)

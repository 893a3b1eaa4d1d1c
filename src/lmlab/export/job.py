"""What is asked of an export, and what of it cannot be done; nothing is loaded here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmlab.export.certificate import DTYPES
from lmlab.journal import RunDir, read_json
from lmlab.records import UserError

STORED = ("none", "fp16", "bf16", "int8", "int4", "nf4", "fp4", "quantized")
"""How a base can be stored; none of it is what an adapter is merged into."""


@dataclass(frozen=True)
class ExportJob:
    """What is to be exported and how.

    Attributes:
        run: the run's directory.
        best: its best weights instead of the last.
        dtype: ``fp32``, ``bf16`` or ``fp16``: how the merged weights are stored.
        base: ``dequantized`` (what the adapter was trained on) or ``original`` (not certified but reported).
        adapters: further adapters, name -> (run or adapter directory, weight); the run's own is ``default``.
        adapter_only: the adapter's directory without its base.
        base_name: what an adapter says of its base; None: its hub id, or the name of its folder.
        accelerator: ``auto``, ``cpu`` or ``gpu``, for the merge and the comparison.
    """

    run: str
    best: bool = False
    dtype: str = "fp32"
    base: str = "dequantized"
    adapters: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    adapter_only: bool = False
    base_name: str | None = None
    accelerator: str = "cpu"

    def check(self) -> Path:
        """The folder of the weights, before anything is loaded.

        Raises:
            UserError: no run, no weights in it, an unknown dtype or base, or options that contradict one another.
        """
        if self.dtype not in DTYPES:
            raise UserError(
                f"unknown dtype '{self.dtype}'", where="--dtype", fix=f"one of {', '.join(DTYPES)}"
            )
        if self.base in STORED:
            raise UserError(
                f"an adapter is not merged into a quantized base ('{self.base}'): rounding would undo it",
                where="--base",
                fix="use --base dequantized, and quantize the export afterwards",
            )
        if self.base not in ("dequantized", "original"):
            raise UserError(f"unknown base '{self.base}'", where="--base", fix="dequantized or original")
        run = RunDir(self.run)
        if not run.config.is_file() or not run.info.is_file():
            what = "not a run's directory" if run.path.is_dir() else "no such directory"
            raise UserError(what, where=self.run, fix="name one that train.py made, e.g. outputs/sft/NAME")
        root = run.best if self.best else run.path
        folder = next((root / name for name in ("adapter", "model") if (root / name).is_dir()), None)
        if folder is None:
            status = read_json(run.summary).get("status") or "it was not finished"
            raise UserError(
                f"the run has no {'best ' if self.best else ''}weights yet ({status})",
                where=self.run,
                fix="finish it with resume=auto" + (", or leave --best out" if self.best else ""),
            )
        if folder.name == "model" and (self.adapter_only or self.adapters or self.base == "original"):
            raise UserError(
                "the run trained all weights, so it has no adapter",
                where="--adapter-only, --adapters, --base",
                fix="leave them out",
            )
        if self.adapter_only and (self.adapters or self.base == "original" or self.dtype != "fp32"):
            raise UserError(
                "an adapter alone is exported as it was saved",
                where="--adapter-only",
                fix="leave --adapters, --base and --dtype out",
            )
        return folder


def parse_adapters(text: str) -> dict[str, tuple[str, float]]:
    """``name=DIR:weight,...`` as name -> (directory, weight); ``default:weight`` (no directory) weighs the run's own.

    Raises:
        UserError: not of that form, a weight that is no number, a place for ``default``, or a name twice.
    """
    found: dict[str, tuple[str, float]] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, rest = part.partition("=")
        place, colon, weight = (rest if equals else name).rpartition(":")
        if not equals:
            name, place = place, ""
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not colon or not name or not math.isfinite(value) or (not place and name != "default"):
            raise UserError(
                f"'{part}' is no adapter with a weight",
                where="--adapters",
                fix="write NAME=DIR:WEIGHT, as code=outputs/sft/other:0.5",
            )
        if place and name == "default":
            raise UserError(
                "'default' is the run's own adapter, so it has no other place",
                where=f"--adapters {part}",
                fix="name this one differently; default:WEIGHT weighs the run's own",
            )
        if name in found:
            raise UserError(f"two adapters named '{name}'", where="--adapters", fix="name them differently")
        found[name] = (place, value)
    return found

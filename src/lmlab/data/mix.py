"""Several sources mixed by weight: a list of partial configs, each completed to one of its own kind.

A source names what is its own: where its records are, its weight, and any key of its kind. Keys of the kind alone that
it leaves out come from conf/data/KIND.yaml, keys that every source has from the mix. How rows are drawn by weight is
said in order.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from lmlab.data.config import DataConfig
from lmlab.data.intake import Intake
from lmlab.records import Record, UserError
from lmlab.registry import data_sources, suggest

CONF = Path(__file__).resolve().parents[3] / "conf" / "data"
ONE_FOR_ALL = (
    "max_length",
    "packing",
    "cross_document_attention",
    "val_fraction",
    "test_fraction",
    "chat_template",
)
"""Keys that cut rows and sides, or belong to the tokenizer: one value must hold for every source."""
EXAMPLE = "data.sources=[{path: a.jsonl, weight: 3}, {kind: text, path: b.txt, weight: 1}]"


@data_sources.register
class MixData(DataConfig):
    """Sources mixed by weight; ``parts()`` are what is read, and the mix itself has no records.

    Attributes:
        sources: partial configs, each with ``weight``; ``kind`` may be left out beside ``path`` (jsonl) or ``name`` (hub).
    """

    kind: Literal["mix"]
    sources: list[dict[str, Any]] = Field(min_length=1)

    # Errors of a source are raised as what they are (`UserError`), since pydantic's location would be the whole list.

    @field_validator("sources", mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Every source with its kind and all its kind's own keys, so that the frozen config says all of it."""
        if not isinstance(given, list):
            return given
        if not given:
            raise UserError("a mix of no sources", where="data.sources", fix=f"'{EXAMPLE}'")
        return [_completed(source, f"data.sources[{number}]") for number, source in enumerate(given)]

    @model_validator(mode="after")
    def _check(self) -> MixData:
        self.parts()
        return self

    def parts(self) -> list[tuple[str, float, DataConfig]]:
        """(unique short name, weight of a sum of 1, complete config) of each source, in order.

        Raises:
            UserError: a value that its kind does not take.
        """
        total = sum(source["weight"] for source in self.sources)
        common = self.model_dump(exclude={"kind", "sources"})
        names: list[str] = []
        parts = []
        for number, source in enumerate(self.sources):
            config = _config(source, common, f"data.sources[{number}]")
            names.append(_free_name(config, names))
            parts.append((names[-1], source["weight"] / total, config))
        return parts

    def format_for(self, task: str) -> str:
        """The formats of the parts, each once."""
        return ", ".join(dict.fromkeys(config.format_for(task) for _, _, config in self.parts()))

    def content_key(self) -> str:
        parts = [[weight, config.content_key()] for _, weight, config in self.parts()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        """Never called: a mix is prepared part by part."""
        raise TypeError("a mix has no records of its own: read its parts()")


def _completed(source: Any, where: str) -> dict[str, Any]:
    if not isinstance(source, Mapping):
        raise UserError(f"{source!r} is no source", where=where, fix="write {path: FILE, weight: NUMBER}")
    kind = _kind(source, where)
    common = set(DataConfig.model_fields)
    own = [name for name in data_sources.class_of(kind).model_fields if name not in common]
    for key in source:
        if key in ONE_FOR_ALL:
            raise UserError(
                f"{key} is one for the whole mix", where=f"{where}.{key}", fix=f"set data.{key} instead"
            )
        allowed = ["weight", *own, *sorted(common.difference(ONE_FOR_ALL))]
        if key not in allowed:
            raise UserError("unknown key", where=f"{where}.{key}", fix=suggest(str(key), allowed))
    return {"kind": kind, "weight": _weight(source, where), **_defaults(kind, own), **_told(source)}


def _kind(source: Mapping[Any, Any], where: str) -> str:
    kind = source.get("kind") or ("jsonl" if "path" in source else "hub" if "name" in source else None)
    known = [name for name in data_sources.names() if name != "mix"]
    if kind is None:
        fix = "name its kind, or give path (local files) or name (a hub data set)"
        raise UserError("a source without kind, path or name", where=where, fix=fix)
    if kind == "mix":
        raise UserError("a mix inside a mix", where=where, fix="list its sources here, by their weights")
    if kind not in known:
        raise UserError(f"{kind!r} is not allowed", where=f"{where}.kind", fix=suggest(str(kind), known))
    return kind


def _weight(source: Mapping[Any, Any], where: str) -> float:
    weight = source.get("weight")
    if weight is None:
        raise UserError(
            "a source without a weight", where=where, fix="add weight: 1, or another number above 0"
        )
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight <= 0:
        raise UserError(f"{weight!r} is not allowed", where=f"{where}.weight", fix="must be a number above 0")
    return float(weight)


def _told(source: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in source.items() if key != "weight" and value != "???"}


def _defaults(kind: str, own: list[str]) -> dict[str, Any]:
    """Values of the kind's own keys in conf/data; a plugin's kind may have none there."""
    import yaml

    file = CONF / f"{kind}.yaml"
    if not file.is_file():
        return {}
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values = values.get("data", values)
    return {key: values[key] for key in own if key in values and values[key] != "???"}


def _config(source: Mapping[str, Any], common: Mapping[str, Any], where: str) -> DataConfig:
    values = {key: value for key, value in source.items() if key != "weight"}
    if isinstance(values.get("columns"), Mapping):
        for field in values["columns"]:
            if field not in common["columns"]:
                fix = suggest(str(field), common["columns"])
                raise UserError("unknown field", where=f"{where}.columns.{field}", fix=fix)
        values["columns"] = {**common["columns"], **values["columns"]}
    try:
        config = data_sources.class_of(source["kind"]).model_validate({**common, **values})
    except ValidationError as error:
        entry = error.errors()[0]
        place = ".".join([where, *(str(part) for part in entry["loc"])])
        if entry["type"] == "missing":
            key = str(entry["loc"][-1])
            raise UserError("a value is missing", where=place, fix=f"add {key}: ...") from error
        allowed = re.sub(r"^(Input|Value) should ", "must ", entry["msg"])
        raise UserError(f"{entry['input']!r} is not allowed", where=place, fix=allowed) from error
    assert isinstance(config, DataConfig)
    return config


def _free_name(config: DataConfig, taken: list[str]) -> str:
    """A short name for reports: of the file, folder or data set, else the kind."""
    told = str(getattr(config, "path", None) or getattr(config, "name", None) or config.kind)
    last = Path(told).name.partition(".")[0]
    name = re.sub(r"[^\w-]+", "-", last).strip("-") or config.kind
    number = 1
    while (free := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return free

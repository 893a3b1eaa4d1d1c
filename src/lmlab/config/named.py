"""A sampler by its name in conf/sampler, for scripts: what `sampler=NAME` composes to on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmlab.config.compose import CONF
from lmlab.generation.samplers import SamplerConfig, load_sampler
from lmlab.records import UserError
from lmlab.registry import suggest


def named_sampler(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    also: Mapping[str, Mapping[str, Any]] | None = None,
) -> SamplerConfig:
    """The sampler ``name`` with some values changed.

    Args:
        name: a file of conf/sampler (``top_p``); the files of its defaults list come first, as for Hydra.
        also: further samplers by name, as those in a run's config; a file of conf/sampler goes before them.
        overrides: field -> value; a constraint of the base class or a field of that kind.

    Raises:
        UserError: no such sampler, a field that it does not have, or a value out of range.
    """
    if name not in sampler_names():  # also a path, which would be read as a file
        if also and name in also:
            return load_sampler({**also[name], **(overrides or {})})
        known = sorted({*sampler_names(), *(also or ())})
        raise UserError(f"unknown sampler '{name}'", where="sampler", fix=suggest(name, known))
    return load_sampler({**_values(CONF / "sampler" / f"{name}.yaml"), **(overrides or {})})


def sampler_names() -> list[str]:
    """The names that `named_sampler` takes, sorted."""
    return sorted(file.stem for file in (CONF / "sampler").glob("[!_]*.yaml"))


def _values(file: Path) -> dict[str, Any]:
    import yaml

    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    values: dict[str, Any] = {}
    for entry in own.pop("defaults", ["_self_"]):
        values |= own if entry == "_self_" else _values(file.with_name(f"{entry}.yaml"))
    return values

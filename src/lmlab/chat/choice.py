"""What a command line chooses: a sampler by name or the run's own, further adapters, and the one to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from lmlab.records import UserError
from lmlab.registry import suggest

if TYPE_CHECKING:
    from lmlab.generation.samplers import SamplerConfig
    from lmlab.load import UsableModel

BASE = "base"
"""How the model without any adapter is called."""


def chosen_sampler(
    own: Mapping[str, Any],
    name: str | None,
    changes: Mapping[str, Any],
    *,
    also: Mapping[str, Mapping[str, Any]] | None = None,
) -> SamplerConfig:
    """The sampler ``name``; None: the run's ``own`` ({} for none: greedy). With ``changes`` over it.

    Args:
        also: samplers besides those of conf/sampler, see `lmlab.plugged.samplers_of`.

    Raises:
        UserError: no such sampler, a setting it does not have, or a value out of range.
    """
    from lmlab.config.named import named_sampler
    from lmlab.generation.samplers import load_sampler

    if name is None and own:
        return load_sampler({**own, **changes})
    return named_sampler(name or "greedy", changes, also=also)


def common_settings(sampler: SamplerConfig) -> dict[str, Any]:
    """What any other sampler takes over from ``sampler``: how much is written, and all constraints."""
    from lmlab.generation.samplers import SamplerConfig

    return {name: getattr(sampler, name) for name in SamplerConfig.model_fields if name != "kind"}


def check_seed(seed: int, *, where: str, texts: int = 1) -> None:
    """Raise UserError if ``seed``, or the last of ``texts`` that follow it one by one, is none: 0 to 2^63 - 1."""
    last = seed + texts - 1
    if seed < 0 or last >= 1 << 63:
        what = f"the seed {seed if seed < 0 else last} is out of range"
        raise UserError(what, where=where, fix="choose one from 0 to 2^63 - 1")


def further_adapters(given: Sequence[str]) -> dict[str, str]:
    """``["name=DIR", ...]`` as name -> directory.

    Raises:
        UserError: not of that form, or a name that is taken.
    """
    found: dict[str, str] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not (name and sign and folder):
            raise UserError(f"not a name and a directory: '{text}'", where="--adapter", fix="write NAME=DIR")
        if name in found or name == BASE:
            raise UserError(f"the name '{name}' is taken", where="--adapter", fix="choose another name")
        found[name] = folder
    return found


def check_adapter(name: str, known: Sequence[str]) -> None:
    """Raise UserError if ``name`` is neither ``base`` nor among the adapters ``known``."""
    if name != BASE and name not in known:
        raise UserError(f"no adapter '{name}'", where="adapter", fix=suggest(name, [*known, BASE]))


def using(usable: UsableModel, adapter: str | None) -> AbstractContextManager[UsableModel]:
    """The model with the named adapter, or alone (``base``); None: with the first, where there are any.

    Raises:
        UserError: it has no such adapter.
    """
    if adapter is not None:
        check_adapter(adapter, usable.adapter_names)
    if not usable.adapter_names:
        return nullcontext(usable)
    return usable.using(None if adapter == BASE else adapter or usable.adapter_names[0])

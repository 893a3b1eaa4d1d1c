"""What a run of one's own brings along: its plugins, and the samplers that its config names.

Only a run's config.yaml is believed, never a file beside weights: a downloaded model or adapter names no code to import.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmlab.journal import RunDir, read_json
from lmlab.registry import load_plugins


def samplers_of(name_or_path: str, *, wanted: Iterable[str | None]) -> dict[str, dict[str, Any]]:
    """The samplers in the config of a run, name -> values: those of ``samplers``, and its own under its kind.

    Args:
        name_or_path: what a script was given; {} for all but a run's directory.
        wanted: names that will be looked up; plugins are imported only if one of them is no name of conf/sampler.

    Raises:
        UserError: a plugin of the run cannot be imported, or its config cannot be read.
    """
    from lmlab.config.named import sampler_names

    if {name for name in wanted if name} <= set(sampler_names()):
        return {}
    config = _own_config(Path(name_or_path))
    load_plugins(config.get("plugins") or [])
    named = config.get("samplers") or {}
    own = config.get("sampler")
    return named | ({own["kind"]: own} if isinstance(own, dict) and own.get("kind") not in named else {})


def load_plugins_of(weights: Path) -> None:
    """Import plugins where a sampler, storage or architecture is theirs: those installed, and those of the run around ``weights``.

    Raises:
        UserError: a plugin cannot be imported, or the run's config cannot be read.
    """
    from lmlab.generation.samplers import samplers
    from lmlab.models.quantize import quants

    info = read_json(weights / "lmlab.json")
    needed = ((samplers, info.get("sampler")), (quants, info.get("quant")))
    known = all(
        not isinstance(values, dict) or values.get("kind") in registry.names() for registry, values in needed
    )
    if known and _knows_architecture(weights):
        return
    run = weights.parent.parent if weights.parent.name == "best" else weights.parent
    load_plugins(_own_config(run).get("plugins") or [])


def _own_config(folder: Path) -> dict[str, Any]:
    """The config of a run of one's own; {} where run.json or config.yaml is missing: files of others, or published weights."""
    from lmlab.config.compose import frozen_values

    run = RunDir(folder)
    return frozen_values(run.config) if run.info.is_file() and run.config.is_file() else {}


def _knows_architecture(weights: Path) -> bool:
    """Whether transformers has the model's type; True for an adapter, whose base tells."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = read_json(weights / "config.json").get("model_type")
    return kind is None or kind in CONFIG_MAPPING

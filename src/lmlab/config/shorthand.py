"""What a command line may say shortly (an optimizer by its name, the sampler in the sample grid), and what it said of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmlab import registry

CONF = Path(__file__).resolve().parents[3] / "conf"


def named_optimizer(values: dict[str, Any]) -> dict[str, Any]:
    """``optim.name=sgd`` is as good as ``optim=sgd``: fields the named optimizer lacks go, those it needs come from its YAML."""
    from omegaconf import OmegaConf

    given = values.get("optim")
    if not isinstance(given, dict) or given.get("name") not in registry.optimizers.names():
        return values
    fields = registry.optimizers.class_of(given["name"]).model_fields
    file = CONF / "optim" / f"{given['name']}.yaml"
    usual = values_of_defaults("optim")
    foreign = [key for key in given if key not in fields and given[key] == usual.get(key)]
    if not foreign or not file.is_file():
        return values
    own: Any = OmegaConf.to_container(OmegaConf.load(file))
    kept = {key: value for key, value in given.items() if key not in foreign}
    return {**values, "optim": {**own, **kept}}


def own_sampler_by_name(values: dict[str, Any]) -> dict[str, Any]:
    """The run's sampler under its kind beside the named ones, so that `samples.grid` may name a plugin's without more."""
    own, named = values.get("sampler"), values.get("samplers")
    kind = own.get("kind") if isinstance(own, dict) else None
    if not isinstance(kind, str) or not isinstance(named, dict) or kind in named:
        return values
    return {**values, "samplers": {**named, kind: own}}


def values_of_defaults(group: str) -> dict[str, Any]:
    """The YAML of a group's default option, as train.yaml names it."""
    from omegaconf import OmegaConf

    defaults: Any = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml"), resolve=False)
    option = next(d[group] for d in defaults["defaults"] if isinstance(d, dict) and group in d)
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
    return content


def told_config_dir(arguments: Sequence[str]) -> list[str]:
    """``--config-dir FOLDER`` of a command line, for commands that compose the same config again; else nothing."""
    for place, word in enumerate(arguments):
        name, mark, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            return ["--config-dir", *([value] if mark else arguments[place + 1 : place + 2])]
    return []

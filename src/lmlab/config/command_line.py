"""Hydra's command line, checked before Hydra sees it, so that a slip is one line with its fix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lmlab.config.errors import unknown_key
from lmlab.config.plaintext import without_secrets
from lmlab.config.shorthand import CONF
from lmlab.records import UserError
from lmlab.registry import suggest

PLAIN_VALUE = re.compile(r"[\w./~-][\w./~=+@:-]*")
"""A path that may be typed as it is; where it has a =, as names made of settings have, Hydra gets it in quotes."""


def read_command_line(arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Hydra's flags, and the arguments with all settings before the flags.

    Hydra refuses settings on both sides of ``--cfg job`` as unrecognized; behind a bare ``--info`` one is its value.

    Raises:
        UserError: an unknown flag, an unreadable setting, or a key under ``hydra.`` that Hydra does not have.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign,assignment]
    flags = parser.parse_intermixed_args(list(arguments))
    if flags.shell_completion:
        verbs = ("install=", "uninstall=", "query=")
        if not any(text.startswith(verbs) for text in flags.overrides):
            raise UserError("no shell is named", where="--shell-completion", fix="-sc install=bash")
        return flags, list(arguments)
    others = list(arguments)
    for text in flags.overrides:
        others.remove(text)
    flags.overrides = [_checked(text) for text in flags.overrides]
    return flags, [*flags.overrides, *others]


def _refuse(message: str) -> None:
    raise UserError(
        message, where="command line", fix="settings are key=value, as trainer.max_steps=50; see --help"
    )


def _checked(text: str) -> str:
    """The setting, in quotes where Hydra wants them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, _, value = text.partition("=")
        if "=" in value and PLAIN_VALUE.fullmatch(value):
            return _checked(f"{key}='{value}'")
        reason = str(error).splitlines()[0]
        _refuse(without_secrets(f"cannot read '{text}', {reason}"))
        raise
    key, value = override.key_or_group, override.value()
    if not key:
        _refuse(f"'{text}' has no key")
    if key == "sweep":  # a folder beside the groups, and for Hydra one of them
        raise UserError(
            "the files of conf/sweep are for W&B",
            where="sweep",
            fix=f"wandb sweep conf/sweep/{value}.yaml, then wandb agent with the id it prints",
        )
    if isinstance(value, int | float | dict | None) and (CONF / key).is_dir() and not override.is_delete():
        options = sorted(file.stem for file in (CONF / key).glob("[!_]*.yaml"))
        shown = "null" if value is None else value  # Hydra fails on these with a ValueError
        raise UserError(f"no option '{shown}'", where=key, fix=suggest(str(shown), options))
    if key.startswith("hydra.") and not _hydra_has(key):
        raise unknown_key(key)
    return text


def _hydra_has(key: str) -> bool:
    """Whether Hydra's own configuration has ``key``; below a free dictionary it has every key."""
    from hydra.conf import HydraConf
    from omegaconf import DictConfig, OmegaConf

    node: Any = OmegaConf.structured(HydraConf)
    for part in key.split(".")[1:]:
        if not isinstance(node, DictConfig) or OmegaConf.get_type(node) in (None, dict):
            return True
        if OmegaConf.is_missing(node, part):
            return True
        if part not in OmegaConf.get_type(node).__dataclass_fields__:  # type: ignore[union-attr]
            return False
        node = node[part]
    return True

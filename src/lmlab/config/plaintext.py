"""Secrets in plain text: what looks like one never enters a config, and so no file that a run leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from lmlab.records import UserError

_SECRET_WORDS = {"key", "apikey", "token", "secret", "password", "passwd"}
_SPECIAL_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask"}  # bos_token and the like are no secrets
_SECRET_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_KNOWN_SECRETS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|wandb_v1_[A-Za-z0-9_]{16,}|(ghp|github_pat)_[A-Za-z0-9_]{16,})"
)


def without_secrets(text: str) -> str:
    """``text`` with what has the shape of a known token blotted out, for an error line."""
    return _KNOWN_SECRETS.sub("***", text)


def refuse_secrets(values: Any, path: str = "", *, by_key: bool = True) -> None:
    """Refuse a literal secret: config.yaml, W&B and checkpoints would all carry it.

    A value is one if it has the shape of a known token, is what WANDB_API_KEY, HF_TOKEN or AWS's variables hold, or stands under a
    key one of whose words is key, token, secret or password (eos_token and its like aside) and is not empty.

    Args:
        by_key: whether a key makes a value one. Never within a json_schema, whose keys are the user's names of things.

    Raises:
        UserError: names the key, never the value.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            if _is_secret(str(key)):
                raise _refusal(path)
            refuse_secrets(
                value, f"{path}.{key}" if path else str(key), by_key=by_key and key != "json_schema"
            )
    elif isinstance(values, list):
        for index, value in enumerate(values):
            refuse_secrets(value, f"{path}[{index}]", by_key=by_key)
    elif isinstance(values, str) and values:
        words = set(re.split(r"[^a-z]+", path.rsplit(".", 1)[-1].lower()))
        special_token = "token" in words and words & _SPECIAL_TOKENS
        if _is_secret(values) or (by_key and words & _SECRET_WORDS and not special_token):
            raise _refusal(path)


def _is_secret(text: str) -> bool:
    """By its shape, or because the environment keeps it."""
    ours = [os.environ.get(name, "") for name in _SECRET_VARIABLES]
    return bool(_KNOWN_SECRETS.search(text)) or any(len(secret) >= 8 and secret in text for secret in ours)


def _refusal(path: str) -> UserError:
    return UserError(
        "a secret in the configuration",
        where=path,
        fix="put it in .env (see .env.example) and leave it out of the command line",
    )

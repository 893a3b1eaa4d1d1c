"""What ``train_tokenizer.py -m`` can be told besides a run's config: the keys under ``lab:``."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from lmlab.config.errors import combined, validation_problems
from lmlab.registry import Config

LAB = "lab"
"""The key of conf/train_tokenizer.yaml that a run's config does not have."""


class LabConfig(Config):
    """``lab:`` of conf/train_tokenizer.yaml; the comments there say what each key means."""

    texts: list[str]
    group_by: list[str]
    against: list[str]
    hidden_size: int | None = Field(ge=1)
    max_chars: int = Field(ge=1)
    excerpt_chars: int = Field(ge=0)


class _Keys(Config):
    """For pydantic's errors to name ``lab.texts``."""

    lab: LabConfig


def lab_of(composed: Any) -> LabConfig:
    """The ``lab`` of a composed config.

    Raises:
        UserError: what is wrong in it.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(composed[LAB], resolve=True)
    try:
        return _Keys.model_validate({LAB: values}).lab
    except ValidationError as error:
        raise combined(validation_problems(error, _Keys)) from error


def without_lab(composed: Any) -> Any:
    """The composed config as train.py would have it."""
    from omegaconf import OmegaConf

    return OmegaConf.masked_copy(composed, [key for key in composed if key != LAB])

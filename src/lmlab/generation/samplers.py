"""How the next token is drawn: the config classes behind ``sampler=...`` on the command line.

A sampler says two things: whether a token is drawn or the most likely one is taken, and which of transformers' logits
processors shape the distribution first, in the order transformers applies them (temperature, then top-k, then top-p).
Each class has only the fields that act on it, so that no setting is accepted and then ignored. Trade-off:
transformers' processors work on the whole vocabulary, sorted for top-p; that is slower than a fused kernel, and equal
to what every other user of transformers gets. torch and transformers are imported where used: reading a config needs
neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field, ValidationError

from lmlab.records import UserError
from lmlab.registry import Config, samplers, suggest

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessorList

MIN_TEMPERATURE = 1e-6
"""Below this, but not 0, a division in fp32 can overflow, and the result could not be told from argmax anyway."""


def _usable_temperature(value: float) -> float:
    """``value`` if sampling with it is meaningful in fp32; pydantic turns the ValueError into a field error."""
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"temperature must be 0 (the most likely token) or at least {MIN_TEMPERATURE}")
    return value


Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_usable_temperature)]
TopK = Annotated[int, Field(ge=1)]
TopP = Annotated[float, Field(gt=0, le=1)]


def build_processors(
    temperature: float = 1.0, top_k: int | None = None, *, top_p: float = 1.0
) -> LogitsProcessorList:
    """transformers' warpers for these settings, in transformers' order; one that would change nothing is left out.

    Args:
        temperature: the logits are divided by it; 0 gives no warper at all (the caller takes the argmax).
        top_k: only the k most likely tokens stay (and those tied with the last of them). None keeps all.
        top_p: only the most likely tokens stay whose probabilities together first reach ``top_p``.

    Returns:
        A callable ``(input_ids [rows, width], scores [rows, vocab]) -> scores [rows, vocab]``.
    """
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList()
    if temperature == 0:
        return processors
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors


def draw(scores: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One token per row from softmax(scores), by inverting the cumulative distribution.

    One uniform per token, drawn on the CPU whatever the scores' device: a seed then gives the same text on a CPU and
    on a GPU as far as their logits agree (``torch.multinomial`` has another stream on each and uses one number per
    vocabulary entry). In fp64, so that rounding of the running sum cannot favour a token.

    Args:
        scores: ``[rows, vocab]``, -inf where a token is ruled out; such a token is never drawn.
        generators: one CPU generator per row, each advanced by one number.

    Returns:
        int64 ``[rows]`` on the scores' device.
    """
    import torch

    uniform = torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in generators])
    cumulative = scores.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    # right=True finds the first entry strictly above the target: one that adds nothing to the sum is passed over.
    token = torch.searchsorted(cumulative, uniform.to(total.device) * total, right=True)
    # The product can round up to the total itself; the first entry that reaches it is the last with any weight.
    return torch.minimum(token, torch.searchsorted(cumulative, total)).squeeze(-1)


class SamplerConfig(Config):
    """Base of every sampler; a plugin's own sampler overrides `processors` and, if it never draws, `draws`.

    Attributes:
        kind: the sampler's name on the command line.
        max_new_tokens: at most this many new tokens per prompt.
    """

    kind: str
    max_new_tokens: int = Field(ge=1)

    @property
    def draws(self) -> bool:
        """Whether a token is drawn at random from the processed scores; otherwise the argmax is taken."""
        return True

    def processors(self) -> LogitsProcessorList:
        """What shapes the scores ``[rows, vocab]`` (fp32) before a token is chosen; none in the base class."""
        return build_processors()


@samplers.register
class GreedySampler(SamplerConfig):
    """The most likely token, always: the same text for every seed."""

    kind: Literal["greedy"]

    @property
    def draws(self) -> bool:
        """False: nothing is drawn."""
        return False


class _TemperedSampler(SamplerConfig):
    """A sampler with a temperature, where 0 stands for the limit: the most likely token."""

    temperature: Temperature

    @property
    def draws(self) -> bool:
        """False at temperature 0."""
        return self.temperature > 0


@samplers.register
class TemperatureSampler(_TemperedSampler):
    """Draws from softmax(logits / temperature) (Ackley, Hinton, Sejnowski 1985, Boltzmann machines)."""

    kind: Literal["temperature"]

    def processors(self) -> LogitsProcessorList:
        """The temperature warper."""
        return build_processors(self.temperature)


@samplers.register
class TopKSampler(_TemperedSampler):
    """Draws among the k most likely tokens (Fan, Lewis, Dauphin 2018, arXiv:1805.04833)."""

    kind: Literal["top_k"]
    top_k: TopK

    def processors(self) -> LogitsProcessorList:
        """The temperature warper, then top-k. A k beyond the vocabulary keeps every token."""
        return build_processors(self.temperature, self.top_k)


@samplers.register
class TopPSampler(SamplerConfig):
    """Draws from the nucleus, at temperature 1 (Holtzman et al. 2019, arXiv:1904.09751)."""

    kind: Literal["top_p"]
    top_p: TopP

    def processors(self) -> LogitsProcessorList:
        """The top-p warper."""
        return build_processors(top_p=self.top_p)


@samplers.register
class TopPTemperatureSampler(_TemperedSampler):
    """Draws from the nucleus of softmax(logits / temperature): the temperature acts first, as in transformers."""

    kind: Literal["top_p_temperature"]
    top_p: TopP

    def processors(self) -> LogitsProcessorList:
        """The temperature warper, then top-p."""
        return build_processors(self.temperature, top_p=self.top_p)


def load_sampler(values: Mapping[str, Any]) -> SamplerConfig:
    """A sampler from plain values.

    Raises:
        UserError: an unknown kind, a field that kind does not have, or a value out of range.
    """
    kind = str(values.get("kind"))
    if kind not in samplers.names():
        raise UserError(f"unknown sampler '{kind}'", where="sampler", fix=suggest(kind, samplers.names()))
    try:
        return cast(SamplerConfig, samplers.class_of(kind).model_validate(dict(values)))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        fix = f"{kind} has no {name}; choose a sampler that has" if unknown else first["msg"]
        raise UserError(
            f"{name}={first.get('input')!r} is not allowed", where=f"sampler {kind}", fix=fix
        ) from error

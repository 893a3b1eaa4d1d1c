"""How the next token is drawn: the config classes behind ``sampler=...`` on the command line.

A sampler says two things: whether a token is drawn or the most likely one is taken, and which of transformers' logits
processors shape the distribution first, in the order transformers applies them (temperature, top-k, top-p, min-p,
typical). Each class has only the fields that act on it, so that no setting is accepted and then ignored. What every
sampler takes besides (penalties, banned words, stop strings, a JSON schema) are the base class's fields, and `constraints`
is where they act. Trade-off: transformers' processors work on the whole vocabulary, sorted for top-p; that is slower
than a fused kernel, and equal to what every other user of transformers gets. torch and transformers are imported where
used: reading a config needs neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

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
MinP = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


def json_grammar(schema: Mapping[str, Any]) -> str:
    """llguidance's grammar of the JSON texts that ``schema`` allows.

    Between two marks stands nothing, one blank, or a new line with up to 16 blanks: enough for every usual layout, and
    a model cannot write white space for ever.

    Raises:
        ValueError: no schema, or one with keywords that llguidance does not know.
        ModuleNotFoundError: llguidance is not installed.
    """
    from llguidance import LLMatcher

    blanks: Any = {"whitespace_pattern": r"(\n {0,16}| )?"}
    grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=blanks)
    is_wrong, problems = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_wrong:
        raise ValueError(problems[0].splitlines()[0])
    return grammar


def _usable_schema(value: Any) -> Any:
    """A schema, or the path of a .json file with one, as the schema itself: a frozen config then needs no file."""
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"give a JSON schema, or the path of a .json file with one: {error}") from error
    if not isinstance(value, Mapping):
        return value  # pydantic says what it should be
    try:
        json_grammar(value)
    except ModuleNotFoundError as error:
        raise ValueError("llguidance is missing: pip install 'lmlab[json]'") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"give a JSON schema that llguidance knows: {error}") from error
    return value


JsonSchema = Annotated[dict[str, Any], BeforeValidator(_usable_schema)]


def build_processors(
    temperature: float | None = None,
    top_k: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
) -> LogitsProcessorList:
    """transformers' warpers for these settings, in transformers' order; one that would change nothing is left out.

    Args:
        temperature: the logits are divided by it; 0 gives no warper at all (the caller takes the argmax).
        top_k: only the k most likely tokens stay (and those tied with the last of them). None keeps all.
        top_p: only the most likely tokens stay whose probabilities together first reach ``top_p``.
        min_p: only tokens stay that are at least ``min_p`` times as likely as the most likely one.
        typical_p: only the tokens stay whose information is nearest to the entropy, as many as together first reach
            ``typical_p``.

    Returns:
        A callable ``(input_ids [rows, width], scores [rows, vocab]) -> scores [rows, vocab]``.
    """
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    processors = LogitsProcessorList()
    if temperature == 0:
        return processors
    if temperature is not None and temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    if typical_p is not None and typical_p < 1:
        processors.append(TypicalLogitsWarper(typical_p))
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

    The fields after ``max_new_tokens`` act before `processors`, in the order of `constraints.Constraints`, whatever the
    kind. conf/sampler/_constraints.yaml has them all; their neutral defaults are for configs frozen before they existed
    and for plugins' YAML.

    Attributes:
        kind: the sampler's name on the command line.
        max_new_tokens: at most this many new tokens per prompt.
        repetition_penalty: logits of tokens already in the row (prompt and text) are divided by it if positive, else
            multiplied (Keskar et al. 2019, CTRL, arXiv:1909.05858). 1 changes nothing; below 1 repetition is favoured.
        no_repeat_ngram_size: no n-gram of this many tokens comes twice in a row's prompt and text (Paulus, Xiong, Socher
            2017, arXiv:1705.04304); 0: any may.
        bad_words: strings that do not come in the text, however they are cut into tokens and also as a part of a word;
            compared character by character, so another case or spelling is another string. The name of a special token
            bans that token; if it is the end mark, a text goes on to its full length.
        begins_with: the text begins with this (its usual tokens are forced); "" for none. The model reads it as if it had
            written it, and it counts as new tokens.
        stop: the text ends before the first of these strings that comes, wherever tokens are cut.
        json_schema: the text is JSON that this schema allows (a mapping, or the path of a .json file, read at once), by
            llguidance. It ends as soon as nothing can follow.
    """

    kind: str
    max_new_tokens: int = Field(ge=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    bad_words: list[Text] = Field(default_factory=list)
    begins_with: str = ""
    stop: list[Text] = Field(default_factory=list)
    json_schema: JsonSchema | None = None

    @field_validator("json_schema")
    @classmethod
    def _repeats_its_marks(cls, value: Any, others: ValidationInfo) -> Any:
        if value is not None and others.data.get("no_repeat_ngram_size"):
            raise ValueError("JSON repeats its marks: no_repeat_ngram_size=0 with json_schema")
        return value

    @field_validator("begins_with")
    @classmethod
    def _holds_no_bad_word(cls, value: str, others: ValidationInfo) -> str:
        for word in others.data.get("bad_words", ()):
            if word in value:
                raise ValueError(f"it holds {word!r}, which bad_words rules out")
        return value

    @property
    def needs_tokenizer(self) -> bool:
        """Whether what it rules out depends on the tokens' texts."""
        return bool(self.bad_words or self.begins_with or self.json_schema is not None)

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


@samplers.register
class MinPSampler(_TemperedSampler):
    """Draws among tokens at least ``min_p`` times as likely as the best (Nguyen et al. 2024, arXiv:2407.01082)."""

    kind: Literal["min_p"]
    min_p: MinP

    def processors(self) -> LogitsProcessorList:
        """The temperature warper, then min-p. 0 keeps every token, 1 the most likely one."""
        return build_processors(self.temperature, min_p=self.min_p)


@samplers.register
class TypicalSampler(_TemperedSampler):
    """Draws among the tokens whose information is nearest to the entropy (Meister et al. 2022, arXiv:2202.00666)."""

    kind: Literal["typical"]
    typical_p: TopP

    def processors(self) -> LogitsProcessorList:
        """The temperature warper, then typical decoding. 1 keeps every token."""
        return build_processors(self.temperature, typical_p=self.typical_p)


@samplers.register
class CombinedSampler(SamplerConfig):
    """All of them at once, each null where it is not wanted; they act in the order of the fields."""

    kind: Literal["combined"]
    temperature: Temperature | None
    top_k: TopK | None
    top_p: TopP | None
    min_p: MinP | None
    typical_p: TopP | None

    @property
    def draws(self) -> bool:
        """False at temperature 0."""
        return self.temperature != 0

    def processors(self) -> LogitsProcessorList:
        """The warpers that are not null."""
        return build_processors(
            self.temperature, self.top_k, top_p=self.top_p, min_p=self.min_p, typical_p=self.typical_p
        )


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
        said = first["msg"].removeprefix("Value error, ")
        fix = f"{kind} has no {name}; choose a sampler that has" if unknown else said
        given = repr(first.get("input"))
        raise UserError(
            f"{name}={given if len(given) <= 80 else given[:77] + '...'} is not allowed",
            where=f"sampler {kind}",
            fix=fix,
        ) from error

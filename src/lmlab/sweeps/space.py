"""What a search may try: Hydra's override grammar as Optuna's distributions, and its values as overrides again.

``interval(a, b)`` is every number between, ends included, ``range(a, b, step)`` the numbers of Python's range (b is left
out), ``choice(...)``, ``glob(...)`` and plain lists are categories. ``tag(log, ...)`` draws evenly in the logarithm, and
``int(interval(a, b))`` (or ``tag(int, ...)``) whole numbers. Everything else on the command line stays as it was typed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from lmlab.records import UserError
from lmlab.registry import suggest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial


@dataclass(frozen=True)
class Axis:
    """One searched override.

    Attributes:
        key: as typed, with its ``+`` if it has one.
        distribution: of its values.
        texts: of categories, how each is written in Hydra's grammar.
    """

    key: str
    distribution: BaseDistribution
    texts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the parameter in the study."""
        return self.key.lstrip("+")

    def override(self, value: Any) -> str:
        """``value`` as it is typed."""
        if self.texts:
            choices = list(self.distribution.choices)  # type: ignore[attr-defined]
            return f"{self.key}={self.texts[choices.index(value)]}"
        low, step = self.distribution.low, getattr(self.distribution, "step", None)  # type: ignore[attr-defined]
        if isinstance(value, float) and step is not None:  # 0.3, and not 0.1 + 0.2 in binary
            value = _stepped(low, step, round((value - low) / step))
        return f"{self.key}={value!r}"

    def suggest(self, trial: Trial) -> Any:
        """The trial's value, drawn now if it has none."""
        each: Any = self.distribution
        if self.texts:
            return trial.suggest_categorical(self.name, each.choices)
        draw: Any = trial.suggest_float if isinstance(each.low, float) else trial.suggest_int
        return draw(self.name, each.low, each.high, step=each.step, log=each.log)

    def first(self) -> Any:
        """A value to check a configuration with before any trial: the first category, or the low end."""
        return self.distribution.choices[0] if self.texts else self.distribution.low  # type: ignore[attr-defined]

    def values(self) -> list[Any]:
        """All of them, in order.

        Raises:
            UserError: there is no end of them.
        """
        from optuna.distributions import CategoricalDistribution, IntDistribution

        each = self.distribution
        if isinstance(each, CategoricalDistribution):
            return list(each.choices)
        if isinstance(each, IntDistribution) and not each.log:
            return list(range(each.low, each.high + 1, each.step))
        step = getattr(each, "step", None)
        if isinstance(each, IntDistribution) or step is None:
            raise UserError(
                "hparams_search.sampler=grid needs a list of values",
                where=self.key,
                fix="use choice(...) or range(...), or another sampler: tpe, random, nsga2",
            )
        count = round((each.high - each.low) / step) + 1  # type: ignore[attr-defined]
        return [_stepped(each.low, step, n) for n in range(count)]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Space:
    """The command line of a search: overrides as typed, and axes in their places."""

    parts: tuple[str | Axis, ...]

    @property
    def axes(self) -> list[Axis]:
        """What is searched."""
        return [part for part in self.parts if isinstance(part, Axis)]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Parameter -> its distribution, as `optuna.study.Study.ask` takes them."""
        return {axis.name: axis.distribution for axis in self.axes}

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """What to type for a point."""
        return [part if isinstance(part, str) else part.override(params[part.name]) for part in self.parts]

    def first(self) -> list[str]:
        """The point of every axis' first value."""
        return self.overrides({axis.name: axis.first() for axis in self.axes})

    def grid(self) -> list[tuple[Any, ...]]:
        """Every combination of the axes' values, the last axis turning fastest, as Hydra has it.

        Raises:
            UserError: an axis has no list of values.
        """
        return list(itertools.product(*(axis.values() for axis in self.axes)))


def parse_space(arguments: Sequence[str], config_loader: Any = None) -> Space:
    """Read a command line.

    Args:
        config_loader: Hydra's, which glob() needs.

    Raises:
        UserError: a sweep no distribution can be made of, or one key searched twice.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create(config_loader=config_loader)
    parts: list[str | Axis] = []
    for override in parser.parse_overrides(list(arguments)):
        parts.append(_axis(override) if override.is_sweep_override() else str(override.input_line))
    space = Space(tuple(parts))
    names = [axis.name for axis in space.axes]
    for name in names:
        if names.count(name) > 1:
            raise UserError("searched twice", where=name, fix=f"give one {name}=...")
    return space


def _axis(override: Override) -> Axis:
    key = override.get_key_element()
    value: Any = override.value()
    if override.is_choice_sweep():
        _check_tags(getattr(value, "tags", set()), (), override)
        return _categories(key, override)
    if override.is_range_sweep():
        _check_tags(value.tags, ("log",), override)
        return Axis(key, _range(value, override))
    _check_tags(value.tags, ("log", "int"), override)
    return Axis(key, _interval(value, override))


def _check_tags(tags: set[str], allowed: tuple[str, ...], override: Override) -> None:
    for tag in sorted(tags - set(allowed)):
        fix = suggest(tag, allowed) if allowed else "leave it out: a list has no tags"
        raise UserError(f"tag '{tag}' means nothing in {override.input_line}", where=_key(override), fix=fix)


def _key(override: Override) -> str:
    return str(override.get_key_element())


def _categories(key: str, override: Override) -> Axis:
    from hydra.core.override_parser.types import QuotedString, Transformer
    from optuna.distributions import CategoricalDistribution

    choices: dict[str, Any] = {}  # how it is written -> what the study calls it
    for item in override.sweep_iterator(transformer=Transformer.identity):
        text = str(Transformer.str(item))
        plain = item.text if isinstance(item, QuotedString) else item
        choices.setdefault(text, plain if isinstance(plain, str | int | float | bool | None) else text)
    if not choices:
        raise UserError(f"{override.input_line} has no values", where=key, fix="list what to choose from")
    if len(set(choices.values())) < len(
        choices
    ):  # 1, 1.0, true and '1' are several texts, but equal in Python
        choices = {text: text for text in choices}
    return Axis(key, CategoricalDistribution(list(choices.values())), tuple(choices))


def _range(value: RangeSweep, override: Override) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    assert value.start is not None
    log = "log" in value.tags
    # Of the numbers as they are written: Hydra adds up their binary values and may get to the end itself.
    start, stop, width = (Decimal(str(number)) for number in (value.start, value.stop, value.step))
    count = math.ceil((stop - start) / width) if width else 0
    if count <= 0:
        raise UserError(
            f"{override.input_line} has no values", where=_key(override), fix="its end is left out"
        )
    whole = isinstance(value.start, int) and isinstance(value.step, int)
    last = value.start + (count - 1) * value.step if whole else _stepped(value.start, value.step, count - 1)
    low, high = sorted((value.start, last))
    step = abs(value.step) if count > 1 else 1
    if log and (step != 1 or not whole or low <= 0):
        raise UserError(
            f"{override.input_line} cannot be drawn in the logarithm",
            where=_key(override),
            fix="use tag(log, interval(...)), int() around the interval for whole numbers, or choice(...)",
        )
    if whole:
        return IntDistribution(int(low), int(high), log=log, step=int(step))
    return FloatDistribution(float(low), float(high), step=float(step))


def _interval(value: IntervalSweep, override: Override) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    assert value.start is not None
    assert value.end is not None
    low, high, log = value.start, value.end, "log" in value.tags
    if low > high:
        raise UserError(
            f"{override.input_line} has its ends the wrong way round",
            where=_key(override),
            fix=f"write interval({high}, {low})",
        )
    if log and low <= 0:
        raise UserError(
            f"{override.input_line} cannot be drawn in the logarithm",
            where=_key(override),
            fix="begin above 0",
        )
    if "int" in value.tags or (isinstance(low, int) and isinstance(high, int)):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _stepped(low: float, step: float, count: int) -> float:
    """``low + count * step`` of the numbers as they are written: a tenth and not what is nearest to it in binary."""
    return float(Decimal(str(low)) + count * Decimal(str(step)))

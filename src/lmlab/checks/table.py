"""What a check is, what it finds, and the table that says so; the one place where checks are known by name.

A check is a function ``(Bench) -> Iterable[Part]``: each part is one comparison with the size of its difference and what
is allowed. A plugin adds one with `check`, as the checks here do.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lmlab.records import RunFailedError, UserError
from lmlab.registry import suggest

if TYPE_CHECKING:
    from lmlab.checks.bench import Bench

WIDTH = 80
"""Of the table, in characters."""
Status = Literal["equal", "within", "differs", "failed", "skipped"]


class SkippedError(Exception):
    """The check says nothing about this config; the message says why."""


@dataclass(frozen=True)
class Part:
    """One comparison of a check.

    Attributes:
        what: is compared.
        difference: its size; 0.0 for equal bit for bit, infinite for what has no size, nan counts as different.
        allowed: the largest difference that is not red.
        detail: what differs, for a person.
    """

    what: str
    difference: float
    allowed: float = 0.0
    detail: str = ""

    @property
    def status(self) -> Status:
        """Of this comparison alone."""
        if self.difference == 0.0:
            return "equal"
        return "within" if self.difference <= self.allowed else "differs"

    @property
    def excess(self) -> float:
        """By how much of what is allowed it is apart: the larger, the worse."""
        if self.status == "equal":
            return 0.0
        return (
            self.difference / self.allowed if self.allowed and not math.isnan(self.difference) else math.inf
        )


@dataclass(frozen=True)
class Check:
    """A check by its name.

    Attributes:
        compares: one line, ``this = that``.
        trains: it trains runs in processes of their own, beside which the bench's model is not kept.
    """

    name: str
    compares: str
    trains: bool
    function: Callable[[Bench], Iterable[Part]]


CHECKS: dict[str, Check] = {}
"""Every check known by now, in the order in which they are run."""
Function = Callable[["Bench"], Iterable[Part]]


def check(name: str, compares: str, *, trains: bool = False) -> Callable[[Function], Function]:
    """Function decorator: make a check known; see `Check`.

    Raises:
        ValueError: another function has that name.
    """

    def add(function: Function) -> Function:
        known = CHECKS.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise ValueError(f"check {name} is registered twice")
        CHECKS[name] = Check(name, compares, trains, function)
        return function

    return add


def chosen(names: Sequence[str]) -> list[Check]:
    """The checks of these names, all for none, those that train last.

    Raises:
        UserError: one is unknown.
    """
    for name in names:
        if name not in CHECKS:
            raise UserError(
                f"unknown check '{name}'",
                where="command line",
                fix=f"{suggest(name, CHECKS)}; or the path of a run, or key=value",
            )
    wanted = [CHECKS[name] for name in CHECKS if not names or name in names]
    return sorted(wanted, key=lambda each: each.trains)


@dataclass(frozen=True)
class Outcome:
    """A row of the table.

    Attributes:
        parts: what was compared, the worst first.
        reason: why it was skipped, or how it failed.
    """

    check: Check
    parts: tuple[Part, ...]
    seconds: float
    reason: str = ""
    failed: bool = False

    @property
    def status(self) -> Status:
        """Of the whole check: that of its worst part."""
        if self.failed:
            return "failed"
        return self.parts[0].status if self.parts else "skipped"

    @property
    def is_red(self) -> bool:
        """Whether the invariant does not hold."""
        return self.status in ("differs", "failed")

    def as_json(self) -> dict[str, Any]:
        """For checks.json; a difference without a size is written as a string, as JSON has no infinity."""
        parts = [
            {
                "what": part.what,
                "status": part.status,
                "difference": part.difference if math.isfinite(part.difference) else str(part.difference),
                "allowed": part.allowed,
                **({"detail": part.detail} if part.detail else {}),
            }
            for part in self.parts
        ]
        return {
            "check": self.check.name,
            "compares": self.check.compares,
            "status": self.status,
            **({"reason": self.reason} if self.reason else {}),
            "parts": parts,
            "seconds": round(self.seconds, 2),
        }

    def lines(self) -> Iterator[str]:
        """Its row, and for whatever is not green, what it is."""
        worst = self.parts[0] if self.parts else None
        numbers = "" if worst is None else f"{worst.difference:<11.2g} {worst.allowed or 'none':<8}"
        name, compares = self.check.name, self.check.compares
        yield f"{name:<13}{self.status:<9}{numbers:<20} {self.seconds:>5.1f}  {compares}"
        for part in self.parts:
            if part.status == "differs":
                detail = f": {part.detail}" if part.detail else ""
                yield from _indented(
                    f"{part.what} differs by {part.difference:.3g}, allowed {part.allowed:g}{detail}"
                )
        if self.reason:
            yield from _indented(self.reason)


HEADER = f"{'check':<13}{'result':<9}{'difference':<11} {'allowed':<8} {'s':>5}  compares"


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")[:6]


def run_check(one: Check, bench: Bench) -> Outcome:
    """Run it; whatever it raises but a user's error is its outcome.

    Raises:
        UserError: what a start with that config would say.
    """
    began = time.monotonic()

    def outcome(parts: Iterable[Part] = (), reason: str = "", *, failed: bool = False) -> Outcome:
        worst_first = sorted(parts, key=lambda part: -part.excess)
        return Outcome(one, tuple(worst_first), time.monotonic() - began, reason, failed)

    try:
        return outcome(list(one.function(bench)))
    except SkippedError as error:
        return outcome(reason=str(error))
    except UserError:
        raise
    except RunFailedError as error:
        return outcome(reason=str(error), failed=True)
    except (
        Exception
    ) as error:  # broken code may raise whatever it likes: the other checks still say something
        where = _place(error)
        text = " ".join(str(error).split())[:300]
        return outcome(reason=f"{type(error).__name__}: {text} ({where})", failed=True)


def _place(error: BaseException) -> str:
    """The innermost line of lmlab's own that an error came through."""
    place, trace = "?", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name.startswith("lmlab"):
            place = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place

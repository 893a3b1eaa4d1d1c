"""The largest of some differences, in which none that is no number gets lost."""

from __future__ import annotations

import math
from collections.abc import Iterable


def largest(sizes: Iterable[float]) -> float:
    """The largest size; 0.0 of none, infinite where one of them is NaN.

    Python's own ``max`` keeps or drops a NaN by its place: ``max(0.0, nan)`` is 0.0, as if nothing were apart.
    """
    return max((math.inf if math.isnan(size) else size for size in sizes), default=0.0)

"""Numbers as the records of a run print them. What is missing, not finite or no number is a dash."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

NONE = "–"
NO_SPREAD = "no spread"  # in place of an interval, where results are equal


def number(value: Any) -> float | None:
    """``value`` if it is a finite number."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def known(value: Any) -> str:
    """``value`` as text."""
    return NONE if value is None or value == "" else str(value)


def percent(fraction: Any, digits: int = 2) -> str:
    """A fraction in percent: ``79.51 %``."""
    finite = number(fraction)
    return NONE if finite is None else f"{100 * finite:.{digits}f} %"


def fixed(value: Any, digits: int) -> str:
    """A number with so many digits behind the point: ``1,234.50``."""
    finite = number(value)
    return NONE if finite is None else f"{finite:,.{digits}f}"


def significant(value: Any) -> str:
    """A number in four significant digits: ``0.04392``."""
    finite = number(value)
    return NONE if finite is None else f"{finite:.4g}"


def count(value: Any) -> str:
    """A count or a rate, in three significant digits or more: ``1,234``, ``12.3``."""
    finite = number(value)
    if finite is None:
        return NONE
    return f"{finite:,.0f}" if finite >= 100 or finite == int(finite) else f"{finite:.3g}"

"""Figures as text: with their interval, a true minus sign, and no line break inside."""

from __future__ import annotations

import math
from collections.abc import Iterable

from newllm.experiments.statistics import Difference, Estimate, estimate

NO_BREAK = "\u00a0"


def number(value: float, places: int, signed: bool = False) -> str:
    """1,234.5 with a true minus sign; 1.2e+09 where a model has come apart: counts alone are that large."""
    kind = f",.{places}f" if abs(value) < (1e7 if places else 1e12) else ".1e"
    return f"{value:{'+' if signed else '-'}z{kind}}".replace("-", "−")


def with_interval(text: str, estimate_: Estimate, places: int) -> str:
    """Appends ± half the interval, where there is one that is not zero; the line never breaks inside."""
    return f"{text}{NO_BREAK}±{NO_BREAK}{number(estimate_.half_width, places)}" if estimate_.half_width else text


def figure(value: Estimate | None, places: int, signed: bool = False, unit: str = "") -> str:
    """61.23 ± 0.81, or a dash where nothing was measured."""
    if value is None:
        return "—"
    return with_interval(number(value.mean, places, signed), value, places) + unit


def mean_figure(values: Iterable[float | None], places: int) -> str:
    """The mean of the values that are there, with its interval: a perplexity that came out infinite is None."""
    return figure(estimate(value for value in values if value is not None), places)


def percent(estimate_: Estimate) -> str:
    """−3.6 % ± 1.1, or −3.6 % where there is no interval (one seed, or an exact figure)."""
    places = 2 if estimate_.half_width and estimate_.half_width < 0.1 else 1
    return with_interval(number(estimate_.mean, places, signed=True) + NO_BREAK + "%", estimate_, places)


def difference_percent(difference: Difference) -> str:
    """As `percent`; where the interval is wide, that of the geometric mean of the ratios: +1,000 % [+260, +3,300]."""
    ratio = difference.log_ratio
    if ratio is None or ratio.half_width is None or not difference.wide:
        return percent(difference.percent)
    mean, low, high = (_percent_of(ratio.mean + side * ratio.half_width) for side in (0, -1, 1))
    return f"{mean}{NO_BREAK}%{NO_BREAK}[{low},{NO_BREAK}{high}]"


def _percent_of(log_ratio: float) -> str:
    """Of two digits: the interval says that no more are known."""
    try:
        value = 100 * math.expm1(log_ratio)
    except OverflowError:  # a model that has come apart
        return "+∞"
    digits = math.floor(math.log10(abs(value))) if value else 0
    rounded = round(value, 1 - digits)
    return number(rounded, max(0, min(1, 1 - digits)), signed=True)

"""Means with intervals over seeds, and differences to a baseline paired by seed. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

CONFIDENCE = 0.95
WIDE = math.log(1.25)  # of ln(ratio): from a mean to a quarter above it, and a fifth below


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) for Student's t with an integer number of degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine_squared = math.cos(theta) ** 2
    if degrees == 1:
        return 2 * theta / math.pi
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = term
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine_squared * (k - 1) / k
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


@cache
def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence, found by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half width of its 95 % interval; None where fewer than two seeds give no interval."""

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Difference:
    """Model against baseline, seed by seed: in the metric's own unit, in percent of the baseline, and as ln(ratio).

    The ratio is None where a value is not positive. Of perplexities its logarithm is the difference of losses. What it
    says decides: seeds of one model that lie factors apart have a mean and an interval that only the largest makes.
    """

    absolute: Estimate
    percent: Estimate
    log_ratio: Estimate | None

    @property
    def deciding(self) -> Estimate:
        """What tells whether there is a difference, and in which direction."""
        return self.log_ratio or self.absolute

    @property
    def verdict(self) -> str:
        """What may be said of it: 'lower', 'higher', 'same', 'no difference shown', or 'one seed: cannot tell'."""
        if self.deciding.half_width is None:
            return "one seed: cannot tell"
        if self.deciding.mean == 0 and self.deciding.half_width == 0:
            return "same"
        if not self.deciding.excludes_zero:
            return "no difference shown"
        return "lower" if self.deciding.mean < 0 else "higher"

    @property
    def wide(self) -> bool:
        """Whether an interval as long above the mean as below would mislead: it is wide, or says something else."""
        if self.log_ratio is None or self.log_ratio.half_width is None:
            return False
        others = (self.absolute.excludes_zero, self.percent.excludes_zero)
        return self.log_ratio.half_width > WIDE or any(other != self.log_ratio.excludes_zero for other in others)


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean and 95 % t-interval; None without any value."""
    values = list(values)
    if not values:
        return None
    count = len(values)
    half_width = t_quantile(count - 1) * stdev(values) / math.sqrt(count) if count > 1 else None
    return Estimate(fmean(values), half_width, count)


def estimate_share(shares: Sequence[Mapping[str, float]], scale: float = 1.0) -> Estimate | None:
    """As `estimate`, of shares {"value", "low", "high"}; the interval of a single seed is that of its own sample."""
    if len(shares) == 1:
        value, low, high = (scale * shares[0][key] for key in ("value", "low", "high"))
        return Estimate(value, max(value - low, high - value), 1)
    return estimate(scale * share["value"] for share in shares)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compares {seed: value} over the seeds both have; None where they share none.

    Pairing removes what a seed does to both models (the order of the data): the interval is of the difference itself.
    """
    seeds = [seed for seed in values if baseline.get(seed)]
    absolute = estimate(values[seed] - baseline[seed] for seed in seeds)
    percent = estimate(100 * (values[seed] - baseline[seed]) / baseline[seed] for seed in seeds)
    if absolute is None or percent is None:
        return None
    positive = all(values[seed] > 0 and baseline[seed] > 0 for seed in seeds)
    log_ratio = estimate(math.log(values[seed] / baseline[seed]) for seed in seeds) if positive else None
    return Difference(absolute, percent, log_ratio)

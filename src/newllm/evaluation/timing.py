"""How a step is timed, and what is told of many."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable

import torch


def repeat(
    step: Callable[[], object], device: torch.device, steps: int = 1, seconds: float = 0.0, most: float = math.inf
) -> list[float]:
    """Seconds of each repetition: at least `steps`, for at least `seconds`, but never more than `most`."""
    times: list[float] = []
    while len(times) < most and (len(times) < steps or sum(times) < seconds):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def mean_of_medians(usual: Iterable[float], rare: Iterable[float], share: float) -> float:
    """What a step takes on average, of which `share` are rare ones."""
    return (1 - share) * statistics.median(usual) + share * statistics.median(rare)

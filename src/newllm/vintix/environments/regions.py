"""Where hidden parameters are drawn from, so that no test task lies near a training task."""

from __future__ import annotations

from typing import Any

import numpy as np


def ring(held_out: bool, count: int, chance: np.random.Generator, options: dict[str, Any]) -> np.ndarray:
    """(count, 2) points of a ring around the origin, which is cut into `sectors`.

    Every `held_out_every`-th sector is for tests, and test points keep `margin` of a sector's width away from both of
    its borders: between a training and a test point there are at least 2·r·sin(margin·π / sectors), r the inner radius.
    """
    sectors, every = options["sectors"], options["held_out_every"]
    of_test = np.arange(sectors) % every == every - 1
    sector = chance.choice(np.flatnonzero(of_test == held_out), count)
    margin = options["margin"] if held_out else 0.0
    angle = 2 * np.pi / sectors * (sector + chance.uniform(margin, 1 - margin, count))
    inner, outer = options["goal_radius"]
    radius = np.sqrt(chance.uniform(inner**2, outer**2, count))
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def cells(held_out: bool, count: int, chance: np.random.Generator, options: dict[str, Any]) -> np.ndarray:
    """(count, k) points of the box `ranges` [k pairs], which is cut into `bins` along each side.

    Cells whose indices add up to −1 modulo `held_out_every` are for tests, and test points keep `margin` of a cell's
    width away from its borders: between a training and a test point there is at least that much along one side.
    """
    low, high = np.array(options["ranges"], dtype=float).T
    bins, every = options["bins"], options["held_out_every"]
    indices = np.indices([bins] * len(low)).reshape(len(low), -1).T  # (cells, k)
    of_test = indices.sum(axis=1) % every == every - 1
    cell = chance.choice(indices[of_test == held_out], count)
    margin = options["margin"] if held_out else 0.0
    return low + (high - low) / bins * (cell + chance.uniform(margin, 1 - margin, cell.shape))

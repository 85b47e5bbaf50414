"""The report's section on context vectors: how long they keep what they hold."""

from __future__ import annotations

from typing import Any

from newllm.experiments.figures import figure
from newllm.experiments.statistics import estimate
from newllm.experiments.summary import ModelSummary, rows_of

KEY = "contexts"


def contexts_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """A row for each valid model whose contexts fade, best perplexity first; None where there is no such model."""
    return rows_of(summaries, KEY, cells)


def cells(records: list[dict[str, Any]]) -> list[str]:
    """Median and largest time scale, layer by layer; one record for each seed."""
    layers = list(zip(*(record["layers"] for record in records), strict=True))  # of each layer, its entry in every seed
    return [", ".join(_scale([entry[key] for entry in entries]) for entries in layers) for key in ("median", "largest")]


def _scale(tokens: list[float | None]) -> str:
    """The mean over seeds; 'never' where in one of them nothing fades."""
    finite = [value for value in tokens if value is not None]
    if len(finite) < len(tokens):
        return "never"
    return figure(estimate(finite), 0 if max(finite) >= 100 else 1)

"""The report's section on compressive memories: how far gates have opened, and what closing them costs."""

from __future__ import annotations

from typing import Any

from newllm.experiments.figures import mean_figure, number, percent
from newllm.experiments.statistics import estimate
from newllm.experiments.summary import ModelSummary, rows_of

KEY = "memories"


def memories_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """A row for each valid model with memories, best perplexity first; None where there is no such model."""
    return rows_of(summaries, KEY, cells)


def cells(records: list[dict[str, Any]]) -> list[str]:
    """Gates, costs of closing them, the fine gate and the cost of closing that; one record for each seed."""
    layers = list(zip(*(record["layers"] for record in records), strict=True))  # of each layer, its entry in every seed
    return [
        "; ".join(_gates(entries) for entries in layers),
        _cost(records, "closed_ppl"),
        "; ".join(mean_figure((entry["fine_open"] for entry in entries), 2) for entries in layers),
        _cost(records, "fine_closed_ppl"),
    ]


def _gates(entries: tuple[dict[str, Any], ...]) -> str:
    """'layer 0: 0.31–0.62' over the layer's heads and all seeds."""
    gates = [gate for entry in entries for gate in entry["gates"]]
    low, high = number(min(gates), 2), number(max(gates), 2)
    return f"layer {entries[0]['layer']}: {low if low == high else f'{low}–{high}'}"


def _cost(records: list[dict[str, Any]], key: str) -> str:
    """By how much perplexity rises, in percent."""
    finite = [record for record in records if None not in (record[key], record["ppl"])]  # null where it is infinite
    rise = estimate(100 * (record[key] / record["ppl"] - 1) for record in finite)
    return "—" if rise is None else percent(rise)

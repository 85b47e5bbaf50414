"""The report's section on compressive memories: how far gates have opened, and what closing them costs."""

from __future__ import annotations

from typing import Any

from newllm.experiments.results import ModelSummary, number, percent, ranked, with_interval
from newllm.experiments.statistics import estimate

KEY = "memories"


def memories_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """A row for each valid model with memories, best perplexity first; None where there is no such model."""
    rows = []
    for summary in ranked(summaries):
        records = [row[KEY] for row in summary.rows if row.get(KEY)]
        if records and summary.valid:
            rows.append({"model": summary.model, "cells": cells(records)})
    return {"rows": rows} if rows else None


def cells(records: list[dict[str, Any]]) -> list[str]:
    """Gates, costs of closing them, the fine gate and the cost of closing that; one record for each seed."""
    layers = list(zip(*(record["layers"] for record in records), strict=True))  # of each layer, its entry in every seed
    return [
        "; ".join(_gates(entries) for entries in layers),
        _cost(records, "closed_ppl"),
        "; ".join(_mean([entry["fine_open"] for entry in entries]) for entries in layers),
        _cost(records, "fine_closed_ppl"),
    ]


def _gates(entries: tuple[dict[str, Any], ...]) -> str:
    """'layer 0: 0.31–0.62' over the layer's heads and all seeds."""
    gates = [gate for entry in entries for gate in entry["gates"]]
    low, high = number(min(gates), 2), number(max(gates), 2)
    return f"layer {entries[0]['layer']}: {low if low == high else f'{low}–{high}'}"


def _mean(values: list[float | None]) -> str:
    mean = estimate(value for value in values if value is not None)
    return "—" if mean is None else with_interval(number(mean.mean, 2), mean, 2)


def _cost(records: list[dict[str, Any]], key: str) -> str:
    """By how much perplexity rises, in percent."""
    rise = estimate(100 * (record[key] / record["ppl"] - 1) for record in records if record[key] is not None)
    return "—" if rise is None else percent(rise)

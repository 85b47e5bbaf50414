"""The figures of a comparison, one summary for each model over its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from newllm.experiments.columns import ALL_COLUMNS, EXACT, LEAD, Column
from newllm.experiments.results import Results, Row
from newllm.experiments.statistics import Difference, Estimate, estimate, paired_difference


def by_seed(rows: list[Row], column: Column) -> dict[int, float]:
    """A model's values by seed; of a figure measured once for each model one value, under 0: copies are no sample."""
    values = {row["seed"]: value for row in rows if (value := column.get(row)) is not None}
    return {0: next(iter(values.values()))} if column.once and values else values


@dataclass
class ModelSummary:
    """The figures of one model over its seeds; `differences` are to the baseline, None without one."""

    model: str
    rows: list[Row]
    is_baseline: bool
    values: dict[str, Estimate | None]
    differences: dict[str, Difference | None]

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    @property
    def valid(self) -> bool:
        """False when a run failed a check without which its perplexity means nothing: finite, future, rows."""
        return all(row["valid"] for row in self.rows)

    @property
    def layers(self) -> str:
        return self.rows[0].get("layers") or ""

    def by_seed(self, column: Column) -> dict[int, float]:
        return by_seed(self.rows, column)

    def records(self, key: str) -> list[dict[str, Any]]:
        """What was recorded under a key of the rows, one record for each seed that has one."""
        return [row[key] for row in self.rows if row.get(key)]

    def mean(self, column: Column) -> float | None:
        value = self.values[column.key]
        return None if value is None else value.mean


def summarise(results: Results) -> list[ModelSummary]:
    """One summary for each model, in the order of the comparison."""
    rows_of: dict[str, list[Row]] = {}
    for row in results["rows"]:
        rows_of.setdefault(row["model"], []).append(row)
    baseline_rows = rows_of.get(results["baseline"], [])
    baseline_is_valid = all(row["valid"] for row in baseline_rows)
    summaries = []
    for model, rows in rows_of.items():
        is_baseline = model == results["baseline"]
        summary = ModelSummary(model, rows, is_baseline, {}, {})
        for key, column in ALL_COLUMNS.items():
            own = summary.by_seed(column)
            summary.values[key] = estimate(own.values())
            theirs = by_seed(baseline_rows, column)
            comparable = not is_baseline and baseline_is_valid and summary.valid
            summary.differences[key] = paired_difference(own, theirs) if comparable else None
        summaries.append(summary)
    return summaries


def ranked(summaries: Iterable[ModelSummary]) -> list[ModelSummary]:
    """Lowest test perplexity first; models without one, then invalid ones, last."""
    return sorted(summaries, key=lambda s: (not s.valid, s.mean(LEAD) is None, s.mean(LEAD) or 0.0))


def competitors(summaries: Iterable[ModelSummary]) -> list[ModelSummary]:
    """Valid models with a test perplexity, best first."""
    return [s for s in ranked(summaries) if s.valid and s.values[LEAD.key]]


def measured(summaries: Iterable[ModelSummary], key: str) -> list[ModelSummary]:
    """The valid models with records under a key of their rows, best perplexity first."""
    return [s for s in ranked(summaries) if s.valid and s.records(key)]


def rows_of(
    summaries: Iterable[ModelSummary], key: str, cells: Callable[[list[dict[str, Any]]], list[str]]
) -> dict[str, Any] | None:
    """A table of the `measured` models: for each the cells that its records make. None where there is no such model."""
    rows = [{"model": summary.model, "cells": cells(summary.records(key))} for summary in measured(summaries, key)]
    return {"rows": rows} if rows else None


def interval_over(shown: list[ModelSummary], key: str, sample: str) -> str:
    """Over what the intervals of shares recorded under a key are (`estimate_share`): seeds, or one seed's sample."""
    single = {len(summary.records(key)) == 1 for summary in shown}
    if single == {True}:
        return f"over the {sample}"
    return f"over seeds, of a model with one seed over the {sample}" if True in single else "over seeds"


def best_models(summaries: Iterable[ModelSummary], column: Column) -> set[str]:
    """The models with the best mean of a column; empty where no direction is better or all are equal.

    Runs marked invalid do not compete.
    """
    means = {s.model: mean for s in summaries if s.valid and (mean := s.mean(column)) is not None}
    if not column.better or len(set(means.values())) < 2:
        return set()
    best = min(means.values()) if column.better == "lower" else max(means.values())
    return {model for model, mean in means.items() if mean == best}


def decimals(summaries: Iterable[ModelSummary], column: Column) -> int:
    """Decimal places that give a typical value of the column its significant digits."""
    means = [abs(mean) for s in summaries if s.valid and (mean := s.mean(column))]
    if column.key in EXACT and all(mean == int(mean) for mean in means):
        return 0
    return max(0, column.digits - 1 - math.floor(math.log10(median(means)))) if means else 0

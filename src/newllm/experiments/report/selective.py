"""The report's section on selective output: perplexity as the gates weigh it, beside that of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from newllm.experiments.results import ModelSummary, number, ranked, with_interval
from newllm.experiments.statistics import estimate

KEY = "selective"


def selective_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """A row for each valid model with such gates, best perplexity first; None where there is no such model."""
    rows = []
    for summary in ranked(summaries):
        records = [row[KEY] for row in summary.rows if row.get(KEY)]
        if records and summary.valid:
            rows.append({"model": summary.model, "cells": cells(records)})
    return {"rows": rows} if rows else None


def cells(records: list[dict[str, Any]]) -> list[str]:
    """Unweighted and weighted PPL, weight of a token, and of every pass: tokens emitted from it, PPL if it alone spoke.

    One record for each seed.
    """
    passes = range(1 + records[0]["max_skip"])
    return [
        _mean(records, lambda record: record["ppl"], 2),
        _mean(records, lambda record: record["weighted_ppl"], 2),
        _mean(records, lambda record: record["weight"], 3),
        "; ".join(_mean(records, lambda record, p=p: 100 * record["passes"][p]["emitted"], 1) for p in passes),  # type: ignore[misc]
        "; ".join(_mean(records, lambda record, p=p: record["passes"][p]["ppl"], 2) for p in passes),  # type: ignore[misc]
    ]


def _mean(records: list[dict[str, Any]], figure: Callable[[dict[str, Any]], float | None], places: int) -> str:
    """A dash where a perplexity was infinite."""
    mean = estimate(value for value in map(figure, records) if value is not None)
    return "—" if mean is None else with_interval(number(mean.mean, places), mean, places)

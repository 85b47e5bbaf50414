"""The report's section on diverse projections: how the first phase has converged, and what it has made."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from newllm.experiments.report.plots import Figure, label, trace
from newllm.experiments.results import ModelSummary, number, ranked, with_interval
from newllm.experiments.statistics import estimate

KEY = "projection"


def measured(summaries: list[ModelSummary]) -> list[ModelSummary]:
    """The valid models with such a first phase, best perplexity first."""
    return [s for s in ranked(summaries) if s.valid and records(s)]


def records(summary: ModelSummary) -> list[dict[str, Any]]:
    """What the first phase said of itself, one record for each seed."""
    return [row[KEY] for row in summary.rows if row.get(KEY)]


def convergence(summary: ModelSummary) -> dict[int, float]:
    """Share of converged tokens in percent by iteration, mean over the seeds that came so far."""
    shares: dict[int, list[float]] = {}
    for record in records(summary):
        for line in record["curve"]:
            shares.setdefault(line["iteration"], []).append(100 * line["converged"])
    return {iteration: fmean(values) for iteration, values in shares.items()}


def projection_plots(summaries: list[ModelSummary]) -> dict[str, Figure]:
    """{element id: figure}: converged tokens against iterations."""
    lines = []
    for summary in measured(summaries):
        points, model = convergence(summary), summaries.index(summary)
        hover = f"<b>{label(summary.model)}</b>, iteration %{{x}}<br>%{{y:.1f}} %<extra></extra>"
        x, y = list(points), list(points.values())
        lines.append(trace(model, "line", x, y, mode="lines+markers", hovertemplate=hover))
    if not lines:
        return {}
    x_axis = {"title": {"text": "iterations over the text"}, "rangemode": "tozero"}
    y_axis = {"title": {"text": "converged tokens, %"}, "range": [-3, 103]}
    return {"plot-projection": {"data": lines, "layout": {"xaxis": x_axis, "yaxis": y_axis}}}


def projection_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """A row for each of these models; None where there is none."""
    rows = [{"model": s.model, "cells": cells(records(s))} for s in measured(summaries)]
    return {"rows": rows} if rows else None


def cells(found: list[dict[str, Any]]) -> list[str]:
    """Iterations, converged tokens, loss, effective rank, passes; each of the last three as before → after."""
    ranks = [[record[when]["effective_rank"] for record in found] for when in ("before", "after")]
    passes = [[record[when]["passes"] for record in found] for when in ("before", "after")]
    losses = [[record["curve"][place]["loss"] for record in found] for place in (0, -1)]
    return [
        _mean([record["iterations"] for record in found], 0 if len(found) == 1 else 1),
        _mean([100 * record["converged"] for record in found], 1),
        " → ".join(_mean(values, 4) for values in losses),
        " → ".join(_mean(values, 1) for values in ranks) + f" of {found[0]['size']}",
        " → ".join(_mean(values, 0 if len(found) == 1 else 1) for values in passes),
    ]


def _mean(values: list[float], places: int) -> str:
    mean = estimate(values)
    assert mean is not None
    return with_interval(number(mean.mean, places), mean, places)

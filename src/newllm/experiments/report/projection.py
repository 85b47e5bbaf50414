"""The report's section on diverse projections: how the first phase has converged, and what it has made."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from newllm.experiments.figures import mean_figure
from newllm.experiments.report.plots import Figure, label, trace
from newllm.experiments.summary import ModelSummary, measured, rows_of

KEY = "projection"


def convergence(summary: ModelSummary) -> dict[int, float]:
    """Share of converged tokens in percent by iteration, mean over the seeds that came so far."""
    shares: dict[int, list[float]] = {}
    for record in summary.records(KEY):
        for line in record["curve"]:
            shares.setdefault(line["iteration"], []).append(100 * line["converged"])
    return {iteration: fmean(values) for iteration, values in shares.items()}


def projection_plots(summaries: list[ModelSummary]) -> dict[str, Figure]:
    """{element id: figure}: converged tokens against iterations."""
    lines = []
    for summary in measured(summaries, KEY):
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
    return rows_of(summaries, KEY, cells)


def cells(found: list[dict[str, Any]]) -> list[str]:
    """Iterations, converged tokens, loss, effective rank, passes; each of the last three as before → after."""
    ranks = [[record[when]["effective_rank"] for record in found] for when in ("before", "after")]
    passes = [[record[when]["passes"] for record in found] for when in ("before", "after")]
    losses = [[record["curve"][place]["loss"] for record in found] for place in (0, -1)]
    return [
        mean_figure((record["iterations"] for record in found), 0 if len(found) == 1 else 1),
        mean_figure((100 * record["converged"] for record in found), 1),
        " → ".join(mean_figure(values, 4) for values in losses),
        " → ".join(mean_figure(values, 1) for values in ranks) + f" of {found[0]['size']}",
        " → ".join(mean_figure(values, 0 if len(found) == 1 else 1) for values in passes),
    ]

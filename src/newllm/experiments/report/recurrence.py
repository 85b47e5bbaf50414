"""The report's section on models that feed a state back: perplexity after a few parallel passes, and the true one."""

from __future__ import annotations

from typing import Any

from newllm.experiments.figures import figure
from newllm.experiments.report.plots import Figure, curves, error_bars, label, thin_out, trace
from newllm.experiments.statistics import Estimate, estimate
from newllm.experiments.summary import ModelSummary, measured

KEY = "recurrence"
TRUE = "true"


def numbers(summaries: list[ModelSummary]) -> list[str]:
    """The numbers of passes that were measured, whether or not anything finite came out."""
    entries = [entry for summary in summaries for record in summary.records(KEY) for entry in record["passes"]]
    return list(dict.fromkeys(str(entry["passes"]) for entry in entries))


def after(summary: ModelSummary, which: str = "ppl") -> dict[str, Estimate]:
    """Perplexity or residual over seeds, by number of passes as text."""
    found: dict[str, list[float]] = {}
    for record in summary.records(KEY):
        for entry in record["passes"]:
            if entry[which] is not None:  # null where it came out infinite
                found.setdefault(str(entry["passes"]), []).append(entry[which])
    return {passes: value for passes, values in found.items() if (value := estimate(values))}


def true(summary: ModelSummary) -> Estimate | None:
    """Perplexity by true recurrence."""
    return estimate(record["ppl"] for record in summary.records(KEY) if record["ppl"] is not None)


def recurrence_plots(summaries: list[ModelSummary]) -> dict[str, Figure]:
    """{element id: figure}: perplexity against passes, and the residual during training."""
    lines, residuals = [], []
    for summary in measured(summaries, KEY):
        model, name = summaries.index(summary), label(summary.model)
        truth = true(summary)
        points = after(summary) | ({TRUE: truth} if truth else {})
        if points:
            values = list(points.values())
            y, hover = [value.mean for value in values], f"<b>{name}</b>, %{{x}}<br>%{{y:.2f}}<extra></extra>"
            bars = error_bars(values)
            lines.append(trace(model, "line", list(points), y, mode="lines+markers", error_y=bars, hovertemplate=hover))
        if curve := curves(summary, "residual"):
            x, y = thin_out(curve)
            hover = f"<b>{name}</b>, %{{x:,.0f}} tokens<br>%{{y:.3f}}<extra></extra>"
            residuals.append(trace(model, "line", x, y, mode="lines", hovertemplate=hover))
    figures: dict[str, Figure] = {}
    if lines:
        x_axis: dict[str, Any] = {"title": {"text": "passes; true recurrence"}, "type": "category"}
        y_axis = {"title": {"text": "perplexity (log scale)"}, "type": "log", "nticks": 6}
        figures["plot-recurrence"] = {"data": lines, "layout": {"xaxis": x_axis, "yaxis": y_axis}}
    if residuals:
        x_axis = {"title": {"text": "training tokens"}, "rangemode": "tozero"}
        y_axis = {"title": {"text": "residual (log scale)"}, "type": "log", "nticks": 6}
        figures["plot-residual"] = {"data": residuals, "layout": {"xaxis": x_axis, "yaxis": y_axis}}
    return figures


def recurrence_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """A row for each such model: perplexity after each number of passes and true, first and last residual; or None.

    A dash stands where a figure came out infinite.
    """
    shown = measured(summaries, KEY)
    passes = numbers(shown)
    rows = []
    for summary in shown:
        by_passes, residual = after(summary), after(summary, "residual")
        cells = [figure(by_passes.get(count), 2) for count in passes] + [figure(true(summary), 2)]
        cells += [figure(residual.get(count), 3) for count in (passes[0], passes[-1])]
        rows.append({"model": summary.model, "cells": cells})
    return {"passes": passes, "rows": rows} if rows else None

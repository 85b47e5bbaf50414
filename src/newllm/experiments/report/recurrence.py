"""The report's section on models that feed a state back: perplexity after a few parallel passes, and the true one."""

from __future__ import annotations

from typing import Any

from newllm.experiments.report.plots import Figure, curves, error_bars, label, thin_out, trace
from newllm.experiments.results import ModelSummary, number, ranked, with_interval
from newllm.experiments.statistics import Estimate, estimate

KEY = "recurrence"
TRUE = "true"


def measured(summaries: list[ModelSummary]) -> list[ModelSummary]:
    """The valid models that feed a state back, best perplexity first."""
    return [s for s in ranked(summaries) if s.valid and any(row.get(KEY) for row in s.rows)]


def numbers(summaries: list[ModelSummary]) -> list[str]:
    """The numbers of passes that were measured, whether or not anything finite came out."""
    records = [row[KEY] for summary in summaries for row in summary.rows if row.get(KEY)]
    return list(dict.fromkeys(str(entry["passes"]) for record in records for entry in record["passes"]))


def after(summary: ModelSummary, which: str = "ppl") -> dict[str, Estimate]:
    """Perplexity or residual over seeds, by number of passes as text."""
    found: dict[str, list[float]] = {}
    for row in summary.rows:
        for record in row[KEY]["passes"] if row.get(KEY) else []:
            if record[which] is not None:  # null where it came out infinite
                found.setdefault(str(record["passes"]), []).append(record[which])
    return {passes: value for passes, values in found.items() if (value := estimate(values))}


def true(summary: ModelSummary) -> Estimate | None:
    """Perplexity by true recurrence."""
    records = [row[KEY]["ppl"] for row in summary.rows if row.get(KEY)]
    return estimate(ppl for ppl in records if ppl is not None)


def recurrence_plots(summaries: list[ModelSummary]) -> dict[str, Figure]:
    """{element id: figure}: perplexity against passes, and the residual during training."""
    lines, residuals = [], []
    for summary in measured(summaries):
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
    shown = measured(summaries)
    passes = numbers(shown)
    rows = []
    for summary in shown:
        by_passes, residual = after(summary), after(summary, "residual")
        cells = [_text(by_passes.get(count), 2) for count in passes] + [_text(true(summary), 2)]
        cells += [_text(residual.get(count), 3) for count in (passes[0], passes[-1])]
        rows.append({"model": summary.model, "cells": cells})
    return {"passes": passes, "rows": rows} if rows else None


def _text(value: Estimate | None, places: int) -> str:
    return "—" if value is None else with_interval(number(value.mean, places), value, places)

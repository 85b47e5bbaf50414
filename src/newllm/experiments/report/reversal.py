"""The report's section on the reversal curse: two plots, two tables, and what is asked."""

from __future__ import annotations

from typing import Any

from newllm.experiments.figures import figure, mean_figure
from newllm.experiments.report.plots import Figure, error_bars, label, trace
from newllm.experiments.statistics import Estimate, estimate_share
from newllm.experiments.summary import ModelSummary, interval_over, measured

KEY = "reversal"
GROUPS = {"never": "never told", "forward": "told forward", "both": "told both ways"}
GUESSING = 0.5  # AUC


def share(summary: ModelSummary, group: str, direction: str, which: str, scale: float = 1.0) -> Estimate:
    """Mean over seeds of an AUC or a share; the interval of one seed is that of its pairs alone."""
    found = [record["groups"][group][direction][which] for record in summary.records(KEY)]
    mean = estimate_share(found, scale)
    assert mean is not None
    return mean


def auc(summary: ModelSummary, group: str = "forward") -> Estimate:
    """Of the backward questions."""
    return share(summary, group, "backward", "auc")


def exact(summary: ModelSummary, group: str, direction: str) -> Estimate:
    """Questions answered exactly, in percent."""
    return share(summary, group, direction, "exact", 100)


def verdict(summary: ModelSummary) -> str:
    """What may be said of the pairs told forward only."""
    needed = 100 * summary.records(KEY)[0]["needed"]
    if not all(record["told"] for record in summary.records(KEY)):
        return "cannot tell: the facts are not learnt"
    if exact(summary, "both", "backward").mean < needed:
        return "cannot tell: the backward questions are not learnt"
    value = auc(summary)
    width = value.half_width or 0
    if value.mean - width > GUESSING:
        return "backward recall"
    return "worse than guessing" if value.mean + width < GUESSING else "no backward recall shown"


def reversal_plots(summaries: list[ModelSummary]) -> dict[str, Figure]:
    """{element id: figure}: AUC of the backward questions by group, and questions answered exactly."""
    shown = measured(summaries, KEY)
    if not shown:
        return {}
    by_group = {name: (group, "backward") for group, name in GROUPS.items()}
    by_question = {
        "asked as told": ("forward", "forward"),
        "asked backward": ("forward", "backward"),
        "asked backward,<br>told both ways": ("both", "backward"),
    }
    guess = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": GUESSING, "y1": GUESSING}
    xaxis = {"type": "category", "range": [-0.3, 2.3]}
    auc_axis = {"title": {"text": "AUC of backward questions"}, "range": [0, 1.04]}
    exact_axis = {"title": {"text": "answered exactly, %"}, "range": [-3, 104]}
    return {
        "plot-reversal": {
            "data": _lines(summaries, by_group, "auc"),
            "layout": {"xaxis": xaxis, "yaxis": auc_axis, "shapes": [guess]},
        },
        "plot-reversal-exact": {
            "data": _lines(summaries, by_question, "exact", 100),
            "layout": {"xaxis": xaxis, "yaxis": exact_axis},
        },
    }


def _lines(
    summaries: list[ModelSummary], places: dict[str, tuple[str, str]], which: str, scale: float = 1.0
) -> list[dict[str, Any]]:
    """A line for each model through its figures at places {name: (group, direction)}."""
    traces = []
    for summary in measured(summaries, KEY):
        values = [share(summary, *place, which, scale) for place in places.values()]
        shown = "%{y:.1f} %" if scale == 100 else "%{y:.3f}"
        traces.append(
            trace(
                summaries.index(summary),
                "line",
                list(places),
                [value.mean for value in values],
                mode="lines+markers",
                error_y=error_bars(values, scale),
                hovertemplate=f"<b>{label(summary.model)}</b><br>{shown}, %{{x}}<extra></extra>",
            )
        )
    return traces


def reversal_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """What the templates show; None where nothing was asked."""
    shown = measured(summaries, KEY)
    if not shown:
        return None
    first = shown[0].records(KEY)[0]
    return {
        **{key: first[key] for key in ("pairs", "kinds", "left_out", "needed", "example")},
        "readings": _readings(shown),
        "interval": interval_over(shown, KEY, "facts"),
        "sizes": {group: first["groups"][group]["pairs"] for group in GROUPS},
        "recall": [{"model": s.model, "cells": recall_cells(s)} for s in shown],
        "more": [{"model": s.model, "cells": more_cells(s)} for s in shown],
    }


def _readings(shown: list[ModelSummary]) -> str:
    """'105–117' where the kept checkpoints differ in how often each sentence had been read."""
    counts = [round(record["readings"]) for summary in shown for record in summary.records(KEY)]
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"


def recall_cells(summary: ModelSummary) -> list[str]:
    """Forward and backward recall of what was told forward, its AUC and p; ceiling, floor, verdict."""
    return [
        figure(exact(summary, "forward", "forward"), 1),
        figure(exact(summary, "forward", "backward"), 1),
        figure(auc(summary), 3),
        _span([record["groups"]["forward"]["backward"]["p"] for record in summary.records(KEY)]),
        figure(exact(summary, "both", "backward"), 1),
        figure(auc(summary, "never"), 3),
        verdict(summary),
    ]


def more_cells(summary: ModelSummary) -> list[str]:
    """Of what was told forward: perplexities of whole sentences, ranks in the pool, AUC among other answers."""
    told = [record["groups"]["forward"] for record in summary.records(KEY)]
    return [
        *(mean_figure((record[key] for record in summary.records(KEY)), 2) for key in ("forward_ppl", "backward_ppl")),
        *(mean_figure((record[key] for record in summary.records(KEY)), 2) for key in ("ratio", "gap")),
        *(mean_figure((group[d]["mean_rank_pool"] for group in told), 1) for d in ("forward", "backward")),
        *(mean_figure((group["backward"][key] for group in told), 3) for key in ("auc_kind", "auc_pool")),
    ]


def _span(values: list[float]) -> str:
    """'0.21–0.77' where seeds differ."""
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low}–{high}"

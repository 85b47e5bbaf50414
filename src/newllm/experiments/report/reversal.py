"""The report's section on the reversal curse: two plots, two tables, and what is asked."""

from __future__ import annotations

from typing import Any

from newllm.experiments.report.plots import Figure, label, trace
from newllm.experiments.results import ModelSummary, number, ranked, with_interval
from newllm.experiments.statistics import Estimate, estimate

KEY = "reversal"
GROUPS = {"never": "never told", "forward": "told forward", "both": "told both ways"}
GUESSING = 0.5  # AUC


def measured(summaries: list[ModelSummary]) -> list[ModelSummary]:
    """The valid models that were asked, best perplexity first."""
    return [s for s in ranked(summaries) if s.valid and any(row.get(KEY) for row in s.rows)]


def records(summary: ModelSummary) -> list[dict[str, Any]]:
    """What was measured, one record for each seed."""
    return [row[KEY] for row in summary.rows if row.get(KEY)]


def share(summary: ModelSummary, group: str, direction: str, which: str, scale: float = 1.0) -> Estimate:
    """Mean over seeds of an AUC or a share; the interval of one seed is that of its pairs alone."""
    found = [record["groups"][group][direction][which] for record in records(summary)]
    if len(found) == 1:
        value, low, high = (scale * found[0][key] for key in ("value", "low", "high"))
        return Estimate(value, max(value - low, high - value), 1)
    mean = estimate(scale * each["value"] for each in found)
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
    needed = 100 * records(summary)[0]["needed"]
    if not all(record["told"] for record in records(summary)):
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
    shown = measured(summaries)
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
    for summary in measured(summaries):
        values = [share(summary, *place, which, scale) for place in places.values()]
        figure = "%{y:.1f} %" if scale == 100 else "%{y:.3f}"
        traces.append(
            trace(
                summaries.index(summary),
                "line",
                list(places),
                [value.mean for value in values],
                mode="lines+markers",
                error_y=_error(values, scale),
                hovertemplate=f"<b>{label(summary.model)}</b><br>{figure}, %{{x}}<extra></extra>",
            )
        )
    return traces


def _error(values: list[Estimate], most: float) -> dict[str, Any]:
    """Error bars that stay within 0 and `most`."""
    half = [value.half_width or 0 for value in values]
    up = [min(width, most - value.mean) for width, value in zip(half, values, strict=True)]
    down = [min(width, value.mean) for width, value in zip(half, values, strict=True)]
    return {"type": "data", "array": up, "arrayminus": down, "symmetric": False, "visible": True}


def reversal_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """What the templates show; None where nothing was asked."""
    shown = measured(summaries)
    if not shown:
        return None
    first = records(shown[0])[0]
    return {
        **{key: first[key] for key in ("pairs", "kinds", "left_out", "needed", "example")},
        "readings": _readings(shown),
        "sizes": {group: first["groups"][group]["pairs"] for group in GROUPS},
        "recall": [{"model": s.model, "cells": recall_cells(s)} for s in shown],
        "more": [{"model": s.model, "cells": more_cells(s)} for s in shown],
    }


def _readings(shown: list[ModelSummary]) -> str:
    """'105–117' where the kept checkpoints differ in how often each sentence had been read."""
    counts = [round(record["readings"]) for summary in shown for record in records(summary)]
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"


def recall_cells(summary: ModelSummary) -> list[str]:
    """Forward and backward recall of what was told forward, its AUC and p; ceiling, floor, verdict."""
    return [
        _text(exact(summary, "forward", "forward"), 1),
        _text(exact(summary, "forward", "backward"), 1),
        _text(auc(summary), 3),
        _span([record["groups"]["forward"]["backward"]["p"] for record in records(summary)]),
        _text(exact(summary, "both", "backward"), 1),
        _text(auc(summary, "never"), 3),
        verdict(summary),
    ]


def more_cells(summary: ModelSummary) -> list[str]:
    """Of what was told forward: perplexities of whole sentences, ranks in the pool, AUC among other answers."""
    told = [record["groups"]["forward"] for record in records(summary)]
    return [
        *(_mean((record[key] for record in records(summary)), 2) for key in ("forward_ppl", "backward_ppl")),
        *(_mean((record[key] for record in records(summary)), 2) for key in ("ratio", "gap")),
        *(_mean((group[d]["mean_rank_pool"] for group in told), 1) for d in ("forward", "backward")),
        *(_mean((group["backward"][key] for group in told), 3) for key in ("auc_kind", "auc_pool")),
    ]


def _span(values: list[float]) -> str:
    """'0.21–0.77' where seeds differ."""
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low}–{high}"


def _mean(values: Any, places: int) -> str:
    """A dash where a perplexity was infinite."""
    mean = estimate(value for value in values if value is not None)
    return "—" if mean is None else _text(mean, places)


def _text(value: Estimate, places: int) -> str:
    return with_interval(number(value.mean, places), value, places)

"""The report's section on recall across segments: two plots, a table, and what a window looks like."""

from __future__ import annotations

import math
from typing import Any

from newllm.experiments.figures import figure, number
from newllm.experiments.report.plots import LABEL_WIDTH, Figure, error_bars, label, trace
from newllm.experiments.statistics import Estimate, estimate_share
from newllm.experiments.summary import ModelSummary, interval_over, measured

KEY = "recall_across_segments"
KNOCK_OUTS = {"zeroed": "memories zeroed", "swapped": "memories of another text"}


def settings(shown: list[ModelSummary]) -> dict[str, Any]:
    """What was asked of every model alike: segment, facts, answers, chance, example."""
    return shown[0].records(KEY)[0]


def at(summary: ModelSummary, distance: int) -> list[dict[str, Any]]:
    """What was measured at a distance, one record for each seed."""
    entries = [entry for record in summary.records(KEY) for entry in record["distances"]]
    return [entry for entry in entries if entry["distance"] == distance]


def distances(summary: ModelSummary) -> list[int]:
    return sorted({entry["distance"] for record in summary.records(KEY) for entry in record["distances"]})


def accuracy(summary: ModelSummary, distance: int, knock_out: str = "", which: str = "accuracy") -> Estimate | None:
    """Mean over seeds in percent; the interval of one seed is that of its windows alone."""
    records = at(summary, distance)
    if knock_out:
        records = [record[knock_out] for record in records if knock_out in record]
    return estimate_share([record[which] for record in records], 100)


def state_bytes(summary: ModelSummary, distance: int) -> float:
    """What one row keeps when the question comes; the same for every seed."""
    return at(summary, distance)[0]["state_bytes"]


def recall_plots(summaries: list[ModelSummary]) -> dict[str, Figure | None]:
    """{element id: figure}: accuracy against the distance, and at the greatest distance against the bytes of state."""
    shown = measured(summaries, KEY)
    if not shown:
        return {}
    index = {s.model: i for i, s in enumerate(summaries)}
    lines, points = [], []
    sizes = {s.model: state_bytes(s, distances(s)[-1]) for s in shown}
    ticks = _ticks(list(sizes.values()))
    for summary in shown:
        model, name = index[summary.model], label(summary.model)
        places = distances(summary)
        for knock_out in ("", *KNOCK_OUTS):
            found = {place: value for place in places if (value := accuracy(summary, place, knock_out))}
            what = f", {KNOCK_OUTS[knock_out]}" if knock_out else ""
            lines.append(
                trace(
                    model,
                    knock_out or "line",
                    [_name(summary, place) for place in found],
                    [value.mean for value in found.values()],
                    mode="lines+markers",
                    hovertemplate=f"<b>{name}</b>{what}<br>%{{y:.1f}} %, %{{x}} segments later<extra></extra>",
                    **({} if knock_out else {"error_y": error_bars(list(found.values()), 100)}),
                )
            )
        last = accuracy(summary, places[-1])
        assert last is not None
        size = sizes[summary.model]
        points.append(
            trace(
                model,
                "point",
                [size or min(ticks)],
                [last.mean],
                error_y=error_bars([last], 100),
                text=[label(summary.model, LABEL_WIDTH)],
                hovertemplate=f"<b>{name}</b><br>%{{y:.1f}} %<br>{number(size, 0)} bytes<extra></extra>",
            )
        )
    recall = settings(shown)
    marks = {"chance": recall["chance"], "chance among the facts told": recall["chance_among_told"]}
    common: dict[str, Any] = {
        "yaxis": {"title": {"text": "questions answered, %"}, "range": [-3, 105]},
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": 100 * share, "y1": 100 * share}
            for share in marks.values()
        ],
    }
    notes = [
        {"xref": "paper", "x": 0.55, "xanchor": "center", "y": 100 * share, "yanchor": "bottom", "text": text}
        | {"showarrow": False, "font": {"size": 11}}
        for text, share in marks.items()
    ]
    x = {"title": {"text": "segments between fact and question"}, "type": "category"}
    bytes_axis: dict[str, Any] = {"title": {"text": "state when the question comes (log scale)"}, "type": "log"}
    bytes_axis |= {"tickvals": list(ticks), "ticktext": list(ticks.values())}
    return {
        "plot-recall": {"data": [t for t in lines if t["x"]], "layout": {"xaxis": x, **common, "annotations": notes}},
        "plot-recall-state": {"data": points, "layout": {"xaxis": bytes_axis, **common}},
    }


def _ticks(sizes: list[float]) -> dict[float, str]:
    """At most six powers of two around sizes in bytes, with their names; left of them "0", where one is."""
    some = [size for size in sizes if size] or [1]
    low, high = (math.floor(math.log2(size)) for size in (min(some), max(some)))
    powers = range(low, high + 2, max(1, math.ceil((high + 2 - low) / 6)))
    units = ["bytes", "KiB", "MiB", "GiB"]
    nothing = {2.0 ** (low - 1): "0"} if 0 in sizes else {}
    return nothing | {2.0**power: f"{2 ** (power % 10)} {units[power // 10]}" for power in powers}


def _name(summary: ModelSummary, distance: int) -> str:
    """A distance, with a star where its windows are longer than those of training."""
    return f"{distance}{' *' if at(summary, distance)[0]['beyond_training'] else ''}"


def recall_table(summaries: list[ModelSummary]) -> dict[str, Any]:
    """Accuracy at each distance; at the greatest one also among the facts told, the knock-outs, and the state."""
    shown = measured(summaries, KEY)
    names = list(dict.fromkeys(_name(s, place) for s in shown for place in distances(s)))
    rows = []
    for summary in shown:
        places = distances(summary)
        by_name = {_name(summary, place): accuracy(summary, place) for place in places}
        rest = [
            accuracy(summary, places[-1], which="accuracy_among_told"),
            *(accuracy(summary, places[-1], knock_out) for knock_out in KNOCK_OUTS),
        ]
        cells = [figure(value, 1) for value in (*map(by_name.get, names), *rest)]
        rows.append({"model": summary.model, "cells": [*cells, number(state_bytes(summary, places[-1]), 0)]})
    return {"distances": names, "rows": rows}


def recall_section(summaries: list[ModelSummary]) -> dict[str, Any] | None:
    """What the templates show; None where no recall was measured."""
    shown = measured(summaries, KEY)
    if not shown:
        return None
    recall = settings(shown)
    return {
        **recall,
        "table": recall_table(summaries),
        "text": "".join(text for _, text in recall["example"]),
        "interval": interval_over(shown, KEY, "windows"),
    }

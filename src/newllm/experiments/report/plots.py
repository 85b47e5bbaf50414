"""The report's plots as plotly JSON. Colours and fonts are set in the browser (report.js), which knows the scheme.

A trace's `meta` says which model it belongs to (an index) and what it is, which decides how it is drawn.
"""

from __future__ import annotations

import math
import re
from html import escape
from statistics import fmean
from typing import Any

from newllm.experiments.columns import ALL_COLUMNS, LEAD
from newllm.experiments.figures import number
from newllm.experiments.statistics import Estimate, estimate, paired_difference
from newllm.experiments.summary import ModelSummary, competitors

CACHE = ALL_COLUMNS["cache_bytes_per_token"]
MAX_POINTS = 80  # of a training loss curve; more would only draw noise

LABEL_WIDTH = 20  # characters
FAR = 2.0  # times the lowest perplexity: beyond it a model is named at the edge, where it presses no others together

Figure = dict[str, Any]


def trace(model: int, role: str, x: list, y: list, **options: Any) -> dict[str, Any]:
    return {"type": "scatter", "x": x, "y": y, "meta": {"model": model, "role": role}, "showlegend": False, **options}


def error_bars(estimates: list[Estimate], most: float | None = None) -> dict[str, Any]:
    """Half widths of intervals; where the values are shares, the bars stay within 0 and `most`."""
    half = [value.half_width or 0 for value in estimates]
    if most is None:
        return {"type": "data", "array": half, "visible": True}
    up = [min(width, most - value.mean) for width, value in zip(half, estimates, strict=True)]
    down = [min(width, value.mean) for width, value in zip(half, estimates, strict=True)]
    return {"type": "data", "array": up, "arrayminus": down, "symmetric": False, "visible": True}


def label(model: str, width: int | None = None) -> str:
    """A model's name as plotly text, which knows some HTML; options wrap into lines of about `width` characters."""
    if width is None:
        return escape(model)
    lines = [""]
    for part in re.findall(r"[^:,]+[:,]?", model):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "<br>".join(escape(line) for line in lines)


def far_off(shown: list[ModelSummary]) -> dict[str, float]:
    """{model: mean perplexity} of those that are beyond what a plot shows."""
    means = {s.model: value.mean for s in shown if (value := s.values[LEAD.key])}
    return {model: mean for model, mean in means.items() if mean > FAR * min(means.values())}


def perplexity_plot(summaries: list[ModelSummary]) -> Figure | None:
    """Every seed as a dot, the mean with its interval, models from best (top) to worst."""
    shown = competitors(summaries)
    if not shown:
        return None
    index = {s.model: i for i, s in enumerate(summaries)}
    traces, notes, beyond = [], [], far_off(shown)
    for place, summary in enumerate(shown):
        value = summary.values[LEAD.key]
        assert value is not None
        if summary.model in beyond:
            at = {"x": 1, "xref": "paper", "xanchor": "right", "y": place, "yref": "y", "showarrow": False}
            notes.append({"text": f"{number(value.mean, 0)}, beyond the plot →", **at})
            continue
        model, seeds = index[summary.model], summary.by_seed(LEAD)
        hover = f"<b>{label(summary.model)}</b><br>%{{x:.2f}}<extra></extra>"
        if len(seeds) > 1:
            per_seed = [f"{label(summary.model)}, seed {seed}: {ppl:.2f}" for seed, ppl in seeds.items()]
            traces.append(
                trace(model, "seed", list(seeds.values()), [place] * len(seeds), text=per_seed, hoverinfo="text")
            )
        traces.append(trace(model, "mean", [value.mean], [place], error_x=error_bars([value]), hovertemplate=hover))
    baseline = next((s for s in shown if s.is_baseline and s.model not in beyond), None)
    lines = []
    if baseline and len(shown) > 1:
        mean = baseline.mean(LEAD)
        lines.append({"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "x0": mean, "x1": mean})
    layout = {
        "xaxis": {"title": {"text": "test perplexity (lower is better)"}},
        "yaxis": {
            "tickvals": list(range(len(shown))),
            "ticktext": [label(s.model, LABEL_WIDTH) for s in shown],
            "range": [len(shown) - 0.4, -0.6],
        },
        "shapes": lines,
        "annotations": notes,
    }
    return {"data": traces, "layout": layout}


def cache_plot(summaries: list[ModelSummary]) -> Figure | None:
    """Perplexity against measured cache bytes per token. One that does not grow (0 bytes) stands at the left."""
    shown = [s for s in summaries if s.valid and s.values[LEAD.key] and s.mean(CACHE) is not None]
    positive = [size for s in shown if (size := s.mean(CACHE))]
    if not shown:
        return None
    low = math.floor(math.log2(min(positive))) if positive else 10
    high = math.ceil(math.log2(max(positive))) if positive else 10
    has_zero = len(positive) < len(shown)
    ticks = {2.0**power: number(2**power, 0) for power in range(low, high + 1, max(1, (high - low) // 5))}
    if has_zero:
        ticks = {2.0 ** (low - 1): "0", **ticks}
    traces, beyond = [], far_off(shown)
    for i, summary in enumerate(summaries):
        value = summary.values[LEAD.key]
        if summary not in shown or value is None or summary.model in beyond:
            continue
        size = summary.mean(CACHE)
        name = label(summary.model)
        hover = f"<b>{name}</b><br>perplexity %{{y:.2f}}<br>{number(size or 0, 0)} bytes/token<extra></extra>"
        x = [size or 2.0 ** (low - 1)]
        traces.append(
            trace(
                i,
                "point",
                x,
                [value.mean],
                error_y=error_bars([value]),
                text=[label(summary.model, LABEL_WIDTH)],
                hovertemplate=hover,
            )
        )
    named = ", ".join(f"{label(model)} {number(mean, 0)}" for model, mean in beyond.items())
    above = f"<br>perplexity beyond the plot: {named}" if beyond else ""
    layout = {
        "xaxis": {
            "title": {"text": f"cache, bytes per token of context (log scale){above}"},
            "type": "log",
            "tickvals": list(ticks),
            "ticktext": list(ticks.values()),
        },
        "yaxis": {"title": {"text": "test perplexity"}},
    }
    return {"data": traces, "layout": layout}


def curves(summary: ModelSummary, kind: str) -> dict[float, list[float]]:
    """{tokens: values over the seeds}, at the points that every seed has reached."""
    points: dict[float, list[float]] = {}
    curves = [row.get("curve") or [] for row in summary.rows]
    for curve in curves:
        for tokens, loss in {p["tokens"]: p[kind] for p in curve if p.get(kind) is not None}.items():
            points.setdefault(tokens, []).append(loss)
    with_kind = sum(any(p.get(kind) is not None for p in curve) for curve in curves)
    return {tokens: losses for tokens, losses in sorted(points.items()) if len(losses) == with_kind}


def thin_out(points: dict[float, list[float]]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS means of neighbouring points."""
    items = [(tokens, fmean(losses)) for tokens, losses in points.items()]
    size = math.ceil(len(items) / MAX_POINTS) or 1
    groups = [items[start : start + size] for start in range(0, len(items), size)]
    return [group[-1][0] for group in groups], [fmean(loss for _, loss in group) for group in groups]


def loss_plot(summaries: list[ModelSummary]) -> Figure | None:
    """Training loss thin, validation loss bold; with seeds their mean, and the validation range as a band."""
    traces, early_losses, lowest = [], [], []
    for i, summary in enumerate(summaries):
        validation, training = curves(summary, "val_loss"), curves(summary, "train_loss")
        hover = f"<b>{label(summary.model)}</b>, %{{x:,.0f}} tokens<br>%{{y:.3f}} nats<extra></extra>"
        if training:
            x, y = thin_out(training)
            traces.append(trace(i, "train", x, y, mode="lines", hoverinfo="skip"))
            if summary.valid:
                lowest.append(min(y))
        if not validation:
            continue
        x, y = list(validation), [fmean(losses) for losses in validation.values()]
        if any(len(losses) > 1 for losses in validation.values()):
            low, high = [min(v) for v in validation.values()], [max(v) for v in validation.values()]
            outline = trace(i, "band", x + x[::-1], high + low[::-1], mode="lines", fill="toself", hoverinfo="skip")
            traces.append(outline)
        traces.append(trace(i, "validation", x, y, mode="lines+markers", hovertemplate=hover))
        if summary.valid:
            early_losses.append(y[len(y) // 5])
            lowest.append(min(y))
    if not traces:
        return None
    # The steep start would flatten everything that matters; a double click shows it.
    y_range = {"range": [min(lowest) - 0.05, max(early_losses) + 0.1]} if early_losses else {}
    layout = {
        "xaxis": {"title": {"text": "training tokens"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "loss, nats per token"}, **y_range},
    }
    return {"data": traces, "layout": layout}


def _by_position(summary: ModelSummary) -> dict[str, dict[int, float]]:
    """{"16–32": {seed: perplexity}}, with a star where the range lies beyond the windows of training."""
    ranges: dict[str, dict[int, float]] = {}
    for row in summary.rows:
        for item in row.get("ppl_by_position") or []:
            if item.get("ppl") is not None:
                name = f"{item['from']}–{item['to']}{' *' if item.get('beyond_training') else ''}"
                ranges.setdefault(name, {})[row["seed"]] = item["ppl"]
    return ranges


def position_estimates(summary: ModelSummary) -> dict[str, Estimate]:
    """Perplexity in each range of positions, over seeds."""
    return {name: value for name, seeds in _by_position(summary).items() if (value := estimate(seeds.values()))}


def position_plots(summaries: list[ModelSummary]) -> tuple[Figure | None, Figure | None]:
    """Perplexity in each range of positions; and the same as paired difference to the baseline in percent."""
    baseline = next((s for s in summaries if s.is_baseline and s.valid), None)
    absolute, relative = [], []
    for i, summary in enumerate(summaries):
        ranges = position_estimates(summary)
        if not ranges:
            continue
        hover = f"<b>{label(summary.model)}</b>, tokens %{{x}}<br>%{{y:.2f}}<extra></extra>"
        x, values = list(ranges), list(ranges.values())
        y = [value.mean for value in values]
        absolute.append(trace(i, "line", x, y, mode="lines+markers", error_y=error_bars(values), hovertemplate=hover))
        if baseline is None or not summary.valid:
            continue
        theirs = _by_position(baseline)
        pairs = {n: paired_difference(seeds, theirs.get(n, {})) for n, seeds in _by_position(summary).items()}
        differences = {name: pair.percent for name, pair in pairs.items() if pair}
        x, values = list(differences), list(differences.values())
        y = [value.mean for value in values]
        hover = hover.replace("%{y:.2f}", "%{y:+.1f} %")
        relative.append(trace(i, "line", x, y, mode="lines+markers", error_y=error_bars(values), hovertemplate=hover))
    axis = {"title": {"text": "position in the window, tokens"}, "type": "category"}
    first = {"xaxis": axis, "yaxis": {"title": {"text": "perplexity (log scale)"}, "type": "log", "nticks": 6}}
    second = {"xaxis": axis, "yaxis": {"title": {"text": "difference to the baseline, %"}, "zeroline": True}}
    return (
        {"data": absolute, "layout": first} if absolute else None,
        {"data": relative, "layout": second} if len(relative) > 1 else None,
    )


def all_plots(summaries: list[ModelSummary]) -> dict[str, Figure]:
    """{element id: figure}, without the figures for which nothing was measured."""
    by_position, relative = position_plots(summaries)
    figures = {
        "plot-perplexity": perplexity_plot(summaries),
        "plot-cache": cache_plot(summaries),
        "plot-loss": loss_plot(summaries),
        "plot-position": by_position,
        "plot-position-relative": relative,
    }
    return {name: figure for name, figure in figures.items() if figure}

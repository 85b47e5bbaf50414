"""The plot of `newllm bench lagged --quality true`."""

from __future__ import annotations

import statistics
from html import escape
from typing import Any

from newllm.commands.bench_lagged import ppl_difference
from newllm.commands.plot_page import COLORS, LAYOUT
from newllm.evaluation.perplexity import perplexity


def quality_figure(result: dict[str, Any]) -> Any:
    """Perplexity against training time, and its difference to the first method's at equal epochs, side by side.

    Curves are means over seeds of the validation perplexity by true recurrence, thick where the run took as long as the
    first method, thin and dashed where it took as many epochs. A run without a finite perplexity has no point.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=2, horizontal_spacing=0.27, column_widths=[0.57, 0.43])
    methods, records = result["settings"]["methods"], result["quality"]
    of_first = {r["seed"]: r["test_ppl"] for r in records if r["method"] == methods[0]}
    for number, method in enumerate(methods):
        color = COLORS[number % len(COLORS)]
        own = {
            equal: [r for r in records if (r["method"], r["equal"]) == (method, equal)] for equal in ("epochs", "time")
        }
        for equal, runs in own.items():
            long = equal == "time" or number == 0  # the first method's time is that of its epochs
            minutes, ppls = mean_curve(runs)
            figure.add_scatter(
                x=minutes,
                y=ppls,
                row=1,
                col=1,
                name=escape(method),
                legendgroup=method,
                showlegend=equal == "epochs",
                mode="lines+markers",
                line={"color": color, "width": 2.5 if long else 1.2, "dash": "solid" if long else "dot"},
                marker={"color": color, "size": 7 if long else 5},
                hovertemplate=f"<b>{escape(method)}</b>, equal {equal}<br>%{{x:.1f}} min: %{{y:.1f}}<extra></extra>",
            )
        difference = ppl_difference(own["epochs"], of_first) if number else None
        if difference is not None:
            figure.add_scatter(
                x=[difference.mean],
                y=[escape(method)],
                row=1,
                col=2,
                showlegend=False,
                legendgroup=method,
                mode="markers",
                marker={"color": color, "size": 10},
                error_x={"type": "data", "array": [difference.half_width or 0], "color": color, "thickness": 1.5},
                hovertemplate=f"<b>{escape(method)}</b><br>%{{x:+.1f}} %<extra></extra>",
            )
    figure.add_vline(x=0, line={"color": COLORS[0], "width": 1}, row=1, col=2)
    figure.update_xaxes(title="training, minutes", rangemode="tozero", col=1)
    figure.update_yaxes(type="log", title="validation perplexity by true recurrence", col=1)
    figure.update_xaxes(title=f"test perplexity at equal epochs,<br>% above {escape(methods[0])}", col=2)
    figure.update_yaxes(autorange="reversed", col=2)
    figure.update_layout(
        title="Lagged Cache Training against training step by step: for as long (solid), as many epochs (dotted)",
        **LAYOUT | {"margin": {"t": 60, "b": 170}, "height": 640},
    )
    return figure


def mean_curve(runs: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Minutes of training and mean validation perplexity at each of the evaluations that all these runs have."""
    curves = []
    for run in runs:
        each = run["training_seconds"] / 60 / run["steps"]
        curves.append([(line["step"] * each, line["val_loss"]) for line in run["curve"] if "val_loss" in line])
    minutes, ppls = [], []
    for points in zip(*curves, strict=False):
        minutes.append(statistics.mean(minute for minute, _ in points))
        ppls.append(perplexity(statistics.mean(loss for _, loss in points)))
    return minutes, ppls

"""The plot of `newllm bench growth`."""

from __future__ import annotations

from html import escape
from typing import Any

from newllm.commands.plot_page import COLORS, LAYOUT

DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")


def growth_figure(result: dict[str, Any]) -> Any:
    """State bytes and milliseconds of a decoded token against tokens read, side by side, a line for each model."""
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=2, horizontal_spacing=0.1)
    tokens = [case["tokens"] for case in result["cases"]]
    for number, model in enumerate(result["settings"]["models"]):
        rows = [next(row for row in case["rows"] if row["model"] == model) for case in result["cases"]]
        color, symbol = COLORS[number % len(COLORS)], SYMBOLS[number % len(SYMBOLS)]
        line = {"color": color, "dash": DASHES[number // len(COLORS) % len(DASHES)], "width": 2}
        for column, key, unit in ((1, "state_bytes", "%{y:,.0f} bytes"), (2, "ms_per_token", "%{y:.2f} ms a token")):
            figure.add_scatter(
                x=tokens,
                y=[row[key] for row in rows],
                row=1,
                col=column,
                name=escape(model),
                legendgroup=model,
                showlegend=column == 1,
                mode="lines+markers",
                line=line,
                marker={"color": color, "symbol": symbol, "size": 8},
                hovertemplate=f"<b>{escape(model)}</b><br>%{{x:,}} tokens: {unit}<extra></extra>",
            )
    figure.update_xaxes(type="log", title="tokens read", tickvals=tokens, ticktext=[_short(n) for n in tokens])
    figure.update_yaxes(type="log", title="state, bytes", exponentformat="SI", ticksuffix="B", dtick=1, col=1)
    figure.update_yaxes(title="decoding, milliseconds per token", rangemode="tozero", col=2)
    figure.update_layout(
        title="What is remembered, and how long a token takes, while one row is read",
        **LAYOUT,
    )
    return figure


def _short(tokens: int) -> str:
    """1,500 as 1.5k."""
    return f"{tokens / 1000:g}k" if tokens >= 1000 else str(tokens)

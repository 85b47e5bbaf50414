"""The plot of `newllm bench growth`: one HTML file that opens offline."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

COLORS = ("#1c1d1f", "#0b3aa5", "#a94d0f", "#137058", "#bd4d96", "#b68607", "#1c9bd6")
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
SIZE = {"width": 1100, "height": 560}


def write_growth_plot(result: dict[str, Any], path: Path) -> None:
    """State bytes and milliseconds of a decoded token against tokens read, side by side, a line for each model.

    Raises OSError if the file cannot be written.
    """
    from plotly.io import to_html

    # The page says when it is drawn, for whoever takes a picture of it.
    drawn = "document.body.dataset.drawn = 'yes'"
    page = to_html(growth_figure(result), config={"displayModeBar": False}, full_html=True, post_script=drawn)
    path.write_text(page, encoding="utf-8")


def growth_figure(result: dict[str, Any]) -> Any:
    """The figure of what `bench_growth` returned."""
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
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 14, "color": COLORS[0]},
        legend={"orientation": "h", "yanchor": "top", "y": -0.16},
        margin={"t": 60, "b": 110},
        **SIZE,
    )
    return figure


def _short(tokens: int) -> str:
    """1,500 as 1.5k."""
    return f"{tokens / 1000:g}k" if tokens >= 1000 else str(tokens)

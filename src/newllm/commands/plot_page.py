"""The plot of a benchmark: one HTML file that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from newllm.training.checkpoints import write_whole

COLORS = ("#1c1d1f", "#0b3aa5", "#a94d0f", "#137058", "#bd4d96", "#b68607", "#1c9bd6")
LAYOUT = {
    "template": "plotly_white",
    "font": {"family": "system-ui, sans-serif", "size": 14, "color": COLORS[0]},
    "legend": {"orientation": "h", "yanchor": "top", "y": -0.16},
    "margin": {"t": 60, "b": 110},
    "width": 1100,
    "height": 560,
}


def write_page(figure: Any, path: Path) -> None:
    """Writes a plotly figure. The page says when it is drawn, for whoever takes a picture of it.

    Raises OSError if the file cannot be written.
    """
    from plotly.io import to_html

    drawn = "document.body.dataset.drawn = 'yes'"
    page = to_html(figure, config={"displayModeBar": False}, full_html=True, post_script=drawn)
    write_whole(path, page)

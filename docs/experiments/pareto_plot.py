"""The plot of choose.py: panels of points with a front, their names placed so that none covers another."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from newllm.experiments.report.plots import Figure, label
from newllm.experiments.statistics import Estimate


class Measure(NamedTuple):
    """What a panel shows; the lower the better."""

    name: str
    axis: str
    headline: str
    most: float  # times the reference's value, beyond which a point is at the top edge


MEASURES = {
    "ppl": Measure("perplexity", "test perplexity", "Perplexity: the lower left is best", 1.25),
    "recall": Measure("recall", "perplexity of repeated tokens", "Recall within the window", 1.25),
    "speed": Measure("decoding", "time for a token, × that of pythia", "Decoding", 2.0),
}
WIDTH, LEAST_HEIGHT, MOST_HEIGHT = 1340, 340, 520  # CSS pixels; the more models, the higher
MARGIN = {"l": 64, "r": 20, "t": 12, "b": 52}
INK, SOFT, GRID, FRONT = "#1c1d1f", "#8a8d94", "#ebebe8", "#0b62a8"
FONT_SIZE, CHARACTER, LINE, NAME_WIDTH = 12, 6.3, 14, 24

Box = tuple[float, float, float, float]  # left, top, right, bottom
Point = tuple[str, float, Estimate, bool]  # model, MB, value, whether it stands aside of the front


@dataclass(frozen=True)
class Panel:
    measure: str
    context: int  # tokens in the cache
    points: list[Point]
    front: set[str]
    reference: float


def front(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The places that no other is as good as in both coordinates and better in one; lower is better."""
    return [(x, y) for x, y in places if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in places)]


def figure(panel: Panel) -> Figure:
    """Plotly JSON of a size that is fixed, so that names can be placed here."""
    measure = MEASURES[panel.measure]
    height = min(LEAST_HEIGHT + 6 * len(panel.points), MOST_HEIGHT)
    wide, high = WIDTH - MARGIN["l"] - MARGIN["r"], height - MARGIN["t"] - MARGIN["b"]
    limit = measure.most * panel.reference
    inside = [value for _, _, value, _ in panel.points if value.mean <= limit]
    lowest = min(value.mean - (value.half_width or 0) for value in inside)
    highest = max(value.mean + (value.half_width or 0) for value in inside)
    room = 0.08 * (highest - lowest) or 0.05 * highest
    low, top = lowest - room, highest + room * (1 if len(inside) == len(panel.points) else 3)
    sizes = [math.log10(x) for _, x, _, _ in panel.points]
    width_of_sizes = max(sizes) - min(sizes) or 1
    left, right = min(sizes) - 0.12 * width_of_sizes, max(sizes) + 0.25 * width_of_sizes

    def place(x: float, y: float) -> tuple[float, float]:
        return (math.log10(x) - left) / (right - left) * wide, (top - y) / (top - low) * high

    points = _side_by_side(panel.points, (right - left) / wide)
    data, marks = [], []
    on_front = sorted((x, v.mean) for model, x, v, _ in points if model in panel.front and v.mean <= limit)
    steps = {"x": [x for x, _ in on_front], "y": [y for _, y in on_front]}
    data.append({**steps, "mode": "lines", "line": {"color": FRONT, "width": 1.5, "shape": "hv"}, "hoverinfo": "skip"})
    taken = [_around(place(a, b), place(c, b)) for (a, b), (c, _) in pairwise(on_front)]
    taken += [_around(place(c, b), place(c, d)) for (_, b), (c, d) in pairwise(on_front)]
    for model, x, value, aside in points:
        beyond = value.mean > limit
        y = top - 0.35 * room if beyond else value.mean
        best = model in panel.front
        color = FRONT if best else INK
        symbol = "triangle-up" if beyond else "diamond" if aside else "circle"
        marker = {"size": 11, "color": FRONT} if best else {"size": 9, "color": "#ffffff"}
        marker |= {"symbol": symbol, "line": {"color": color, "width": 1.5}}
        half = 0 if beyond else value.half_width or 0
        bars = {"type": "data", "array": [half], "color": color, "thickness": 1.2, "width": 4, "visible": half > 0}
        data.append({"x": [x], "y": [y], "mode": "markers", "marker": marker, "error_y": bars})
        px, py = place(x, y)
        reach = max(7.0, half / (top - low) * high)
        taken.append((px - 6, py - reach, px + 6, py + reach))
        name = label(model, NAME_WIDTH) + (" †" if aside else "") + (f"<br>{value.mean:.3g}" if beyond else "")
        marks.append((py, x, y, px, name, color))
    annotations = [
        _named(x, y, px, py, name, color, taken, (wide, high)) for py, x, y, px, name, color in sorted(marks)
    ]
    ticks = [
        size
        for power in range(-3, 5)
        for digit in ((1, 2, 3, 5) if right - left < 2 else (1,))
        if left <= math.log10(size := digit * 10.0**power) <= right
    ]
    common = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "title": {"font": {"size": 13}}}
    x_axis = {"type": "log", "range": [left, right], "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    x_title = f"cache of one sequence of {panel.context:,} tokens, MB (log scale)"
    layout = {
        **{"width": WIDTH, "height": height, "margin": MARGIN, "showlegend": False, "annotations": annotations},
        "font": {"family": "Liberation Sans, Arial, sans-serif", "size": FONT_SIZE, "color": INK},
        "xaxis": common | x_axis | {"title": {"text": x_title, "font": {"size": 13}}},
        "yaxis": common | {"range": [low, top], "title": {"text": measure.axis, "font": {"size": 13}}},
        **{"plot_bgcolor": "#ffffff", "paper_bgcolor": "#ffffff"},
    }
    return {"data": [{"type": "scatter", **trace} for trace in data], "layout": layout}


def _side_by_side(points: list[Point], pixel: float) -> list[Point]:
    """Models of the same bytes a marker's width apart, worst first; pixel is its width in powers of ten."""
    moved = []
    for size in dict.fromkeys(x for _, x, _, _ in points):
        same = sorted((point for point in points if point[1] == size), key=lambda point: -point[2].mean)
        for place, (model, x, value, aside) in enumerate(same):
            moved.append((model, x * 10 ** (11 * pixel * (place - (len(same) - 1) / 2)), value, aside))
    return moved


def _around(one: tuple[float, float], other: tuple[float, float]) -> Box:
    """What a line from one place to the other covers."""
    (a, b), (c, d) = one, other
    return min(a, c) - 2, min(b, d) - 2, max(a, c) + 2, max(b, d) + 2


def _named(
    x: float, y: float, px: float, py: float, name: str, color: str, taken: list[Box], size: tuple[int, int]
) -> dict:
    """A name as near to its point as there is room, with a thin line where that is not beside it."""
    lines = name.split("<br>")
    width, height = CHARACTER * max(map(len, lines)), LINE * len(lines)
    shifts = [shift for step in range(40) for shift in ((step * 6, -step * 6) if step else (0,))]
    tried = [(side, gap, dy) for gap in (11, 25, 45, 70, 100) for dy in shifts for side in (1, -1)]
    tried.sort(key=lambda each: math.hypot(each[1] - 11, each[2]))

    def box(side: int, gap: int, dy: int) -> Box:
        near = px + side * gap
        left = near if side > 0 else near - width
        return left, py + dy - height / 2, left + width, py + dy + height / 2

    def free(found: Box) -> bool:
        left, upper, right, lower = found
        inside = left >= 0 and right <= size[0] + 15 and upper >= -8 and lower <= size[1]
        return inside and not any(left < c and a < right and upper < d and b < lower for a, b, c, d in taken)

    side, gap, dy = next((each for each in tried if free(box(*each))), tried[0])
    taken.append(box(side, gap, dy))
    far = abs(dy) > height / 2 + 3 or gap > 11
    end = "left" if side > 0 else "right"
    return {
        **{"x": math.log10(x), "y": y, "ax": side * gap, "ay": dy, "text": name, "align": end},
        **{"xanchor": end, "yanchor": "middle", "font": {"size": FONT_SIZE, "color": color}},
        **{"showarrow": True, "arrowhead": 0, "arrowwidth": 1, "standoff": 6, "borderpad": 0},
        "arrowcolor": SOFT if far else "rgba(0,0,0,0)",
    }


def panels_html(rows: list[tuple[str, list[Panel]]]) -> str:
    """One page that needs no other file; `document.body.dataset.drawn` is 'yes' when it is drawn."""
    from plotly.offline import get_plotlyjs

    sections, figures = [], {}
    for row, (title, panels) in enumerate(rows):
        drawn = []
        for panel in panels:
            name = f"plot-{row}-{panel.measure}"
            figures[name] = figure(panel)
            drawn.append(f"<figure><h3>{MEASURES[panel.measure].headline}</h3><div id='{name}'></div></figure>")
        sections.append(f"<h2>{title}</h2>{''.join(drawn)}")
    style = (
        "body {font-family: Liberation Sans, Arial, sans-serif; margin: 0; padding: 20px 28px; background: #fff; "
        f"color: {INK}}} h2 {{font-size: 20px; margin: 18px 0 4px}} h3 {{font-size: 15px; margin: 12px 0 0}} "
        "figure {margin: 0}"
    )
    script = (
        f"const figures = {json.dumps(figures)}; const options = {{displayModeBar: false}};"
        "Promise.all(Object.entries(figures).map(([id, f]) => Plotly.newPlot(id, f.data, f.layout, options)))"
        ".then(() => { document.body.dataset.drawn = 'yes' });"
    )
    return (
        f"<!doctype html><meta charset='utf-8'><style>{style}</style><body>{''.join(sections)}"
        f"<script>{get_plotlyjs()}</script><script>{script}</script></body>"
    )

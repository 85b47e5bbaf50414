"""Pictures of episodes as SVG: what the report shows of the first and the last episode in a task."""

from __future__ import annotations

import math
from typing import Any

SIZE = 200  # side of a picture of the plane, in pixels
FRAMES = 10  # of a strip
FRAME = 62  # side of one of its frames
LOOP_SECONDS = 2.4  # of the moving point; it runs again and again

Point = tuple[float, float]


def picture(options: dict[str, Any], strip: dict[str, Any]) -> str | None:
    """The SVG of one recorded episode; None for a kind of environment that is not drawn.

    Args:
        options: of the family; 'kind' decides how it is drawn.
        strip: with 'parameters' of the task and 'observations', a list of those from the start to after the last step.
    """
    observations, parameters = strip["observations"], strip["parameters"]
    match options["kind"]:
        case "point_reacher":
            return _plane([(row[0], row[1]) for row in observations], parameters, 1.3 * options["goal_radius"][1])
        case "reacher":
            tips = [_fingertip(row, options["links"]) for row in observations]
            return _plane(tips, parameters, 1.1 * sum(options["links"]))
        case "pendulum":
            return _rods([(row[1], -row[0]) for row in observations])
        case "inverted_pendulum":
            return _rods([(math.sin(row[1]), -math.cos(row[1])) for row in observations])
    return None


def _fingertip(row: list[float], links: list[float]) -> Point:
    """Of an arm whose second angle is counted from the first link."""
    cosine1, cosine2, sine1, sine2 = row[:4]
    cosine, sine = cosine1 * cosine2 - sine1 * sine2, sine1 * cosine2 + cosine1 * sine2
    return links[0] * cosine1 + links[1] * cosine, links[0] * sine1 + links[1] * sine


def _plane(path: list[Point], goal: list[float], reach: float) -> str:
    """A path in the square of ±reach, and the goal, which the model is not shown."""

    def place(point: Point | list[float]) -> Point:
        return tuple(round(SIZE / 2 * (1 + sign * x / reach), 1) for sign, x in zip((1, -1), point, strict=True))  # type: ignore[return-value]

    places = [place(point) for point in path]
    line = " ".join(f"{x},{y}" for x, y in places)
    xs, ys = (";".join(str(place[axis]) for place in places) for axis in (0, 1))
    gx, gy = place(goal)
    timing = f'dur="{LOOP_SECONDS}s" repeatCount="indefinite"'
    return (
        f'<svg class="plane" viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" height="{SIZE}" role="img">'
        f'<circle class="goal" cx="{gx}" cy="{gy}" r="7"/><circle class="goal-dot" cx="{gx}" cy="{gy}" r="2"/>'
        f'<polyline class="path" points="{line}"/>'
        + "".join(f'<circle class="step" cx="{x}" cy="{y}" r="1.6"/>' for x, y in places)
        + f'<circle class="start" cx="{places[0][0]}" cy="{places[0][1]}" r="3.4"/>'
        f'<circle class="mover" cx="{places[-1][0]}" cy="{places[-1][1]}" r="4.4">'
        f'<animate attributeName="cx" values="{xs}" {timing}/><animate attributeName="cy" values="{ys}" {timing}/>'
        "</circle></svg>"
    )


def _rods(tips: list[Point]) -> str:
    """Frames at equal distances in time, each a rod from its pivot to its tip (x, y), y downwards, of length 1."""
    chosen = [tips[round(n * (len(tips) - 1) / (FRAMES - 1))] for n in range(FRAMES)]
    parts = []
    for n, (x, y) in enumerate(chosen):
        cx, cy, arm = FRAME * (n + 0.5), FRAME / 2, FRAME * 0.4
        parts.append(
            f'<line class="rod" x1="{cx:.1f}" y1="{cy}" x2="{cx + arm * x:.1f}" y2="{cy + arm * y:.1f}"/>'
            f'<circle class="mover" cx="{cx + arm * x:.1f}" cy="{cy + arm * y:.1f}" r="4"/>'
            f'<circle class="start" cx="{cx:.1f}" cy="{cy}" r="2"/>'
        )
    width = FRAME * FRAMES
    size = f'viewBox="0 0 {width} {FRAME}" width="{width}" height="{FRAME}"'
    return f'<svg class="rods" {size} role="img">{"".join(parts)}</svg>'

"""Curves as inline SVG, from plain numbers. The script of `html` shows the values below the pointer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bcmfnet.viz.markup import Markup, element

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 48, 340, 8, 158
"""Sides of the plot in the picture; the numbers of its axes stand outside."""
TICKS = 4
MAX_POINTS, FEW_POINTS = 200, 25
"""A line has at most so many points, which are means; those of a line with few are marked."""
COLORS = 6


class Panel(NamedTuple):
    """A diagram: lines by name, each of points (step, value) in the order of the steps, and the unit of the values."""

    title: str
    lines: dict[str, Sequence[Point]]
    unit: str = ""


def draw(panel: Panel) -> Markup:
    """The panel as a figure: its title, the last value of each line, and the picture. One line at least has a point."""
    lines = {name: thinned(points) for name, points in panel.lines.items() if points}
    values = [value for points in lines.values() for _, value in points]
    last = max(step for points in lines.values() for step, _ in points)
    shown = ticks(_floor(values), max(values))
    x, y = _scale(0, max(last, 1), LEFT, RIGHT), _scale(shown[0], shown[-1], BOTTOM, TOP)
    drawn = [_rule(y(tick), tick) for tick in shown]
    drawn += [_below(x(tick), tick) for tick in ticks(0, max(last, 1)) if tick <= last and tick == round(tick)]
    drawn.append(element("line", class_="pointer", y1=TOP, y2=BOTTOM, visibility="hidden"))
    keys = []
    for number, (name, points) in enumerate(lines.items()):
        color, value = f"line{number % COLORS}", element("output", _number(points[-1][1]))
        places = [(x(step), y(value)) for step, value in points]
        drawn += _line(places, points, color)
        keys.append(element("span", f"{name} " if len(lines) > 1 else "", value, f" {panel.unit}", class_=color))
    summary = ", ".join(f"{name} {_number(points[-1][1])}" for name, points in lines.items())
    label = f"{panel.title} by step; at the end: {summary} {panel.unit}".rstrip()
    picture = element("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    at = element("span", "step ", element("output", _number(last)))
    caption = element("figcaption", element("strong", panel.title), at, element("span", *keys, class_="keys"))
    return element("figure", caption, picture, class_="curve")


def thinned(points: Sequence[Point]) -> list[Point]:
    """The points, or where there are more than MAX_POINTS the means of equally many, at the last of their steps."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, at steps of 1, 2 or 5 times a power of ten, that enclose low to high."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power > 0.999 * rough)
    return [number * step for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _floor(values: Sequence[float]) -> float:
    """Where the values begin: at 0 where they come near it."""
    low, high = min(values), max(values)
    return 0 if 0 <= low < 0.5 * high else low


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The place of a value, in the units of the picture."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def _rule(y: float, tick: float) -> Markup:
    line = element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="rule")
    return Markup(line + element("text", _number(tick), x=LEFT - 6, y=y + 4, text_anchor="end"))


def _below(x: float, tick: float) -> Markup:
    return element("text", _number(tick), x=x, y=HEIGHT - 6, text_anchor="middle")


def _line(places: Sequence[Point], points: Sequence[Point], color: str) -> list[Markup]:
    """A line, with the steps and values of its points for the script."""
    steps, values = (" ".join(map(_number, column)) for column in zip(*points, strict=True))
    line = element(
        "polyline", points=" ".join(f"{x},{y}" for x, y in places), class_=color, data_steps=steps, data_values=values
    )
    marked = places if len(places) <= FEW_POINTS else ()
    return [line, *(element("circle", cx=x, cy=y, r=2.5, class_=color) for x, y in marked)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

"""Plots as SVG: bars with intervals around 1, and lines on logarithmic axes. No library, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

# Okabe and Ito's colours, which people with any colour vision tell apart; the first is graphopt's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a00", "#444444")

_WIDTH, _LABELS, _RIGHT = 860, 330, 110
_BAR, _GAP, _TITLE, _AXIS = 18, 6, 24, 30


@dataclass(frozen=True)
class Bar:
    """A ratio with its interval.

    Args:
        label: what it is of.
        value: the ratio, above 0.
        low: of the interval.
        high: of the interval.
        colour: index into COLOURS.
        noise: the noise floor as a fraction; a grey band around 1.
        said: what stands behind the bar.
    """

    label: str
    value: float
    low: float
    high: float
    colour: int
    noise: float
    said: str


@dataclass(frozen=True)
class Line:
    """Points of one name, each (x, y) above 0.

    Args:
        name: behind its end.
        points: in ascending order of x.
        colour: index into COLOURS.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], title: str) -> Markup:
    """Groups of horizontal bars that begin at 1: to the right faster, to the left slower.

    Args:
        groups: heading and bars of each.
        title: says what is shown, for who cannot see it.
    """
    every = [bar for _, group in groups for bar in group]
    low = min([0.8, *(min(bar.value, bar.low, 1 / (1 + bar.noise)) for bar in every)])
    high = max([1.25, *(max(bar.value, bar.high, 1 + bar.noise) for bar in every)])
    span = math.log(high / low)

    def place(value: float) -> float:
        return _LABELS + (_WIDTH - _LABELS - _RIGHT) * math.log(value / low) / span

    parts, y = [], 4.0
    height = sum(_TITLE + len(group) * (_BAR + _GAP) for _, group in groups) + _AXIS
    for tick in ticks(low, high):
        x = place(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} 0V{height - _AXIS + 4:.1f}"/>')
        parts.append(_text(x, height - 8, f"{tick:g}×", "tick middle"))
    for heading, group in groups:
        parts.append(_text(0, y + 14, heading, "heading"))
        y += _TITLE
        for bar in group:
            parts.append(_bar(bar, y, place))
            y += _BAR + _GAP
    parts.append(f'<path class="one" d="M{place(1):.1f} 0V{height - _AXIS + 4:.1f}"/>')
    return _svg(parts, height, title)


def _bar(bar: Bar, y: float, place: Callable[[float], float]) -> str:
    one, end, low, high = map(place, (1.0, bar.value, bar.low, bar.high))
    quiet, loud = place(1 / (1 + bar.noise)), place(1 + bar.noise)
    middle = y + _BAR / 2
    left, width = min(one, end), max(1.0, abs(end - one))
    return "".join(
        (
            _text(_LABELS - 12, middle + 4, bar.label, "end"),
            f'<rect class="noise" x="{quiet:.1f}" y="{y - 2:.1f}"',
            f' width="{loud - quiet:.1f}" height="{_BAR + 4}"/>',
            f'<rect class="bar" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}"',
            f' fill="{COLOURS[bar.colour % len(COLOURS)]}"><title>{escape(bar.said)}</title></rect>',
            f'<path class="whisker" d="M{low:.1f} {middle - 4:.1f}v8m0 -4H{high:.1f}m0 -4v8"/>',
            _text(max(end, high, loud) + 6, middle + 4, f"{bar.value:.2f}×", "value"),
        )
    )


def lines(series: Sequence[Line], x_label: str, y_label: str, title: str) -> Markup:
    """Lines over logarithmic axes.

    Args:
        series: the lines.
        x_label: below the axis.
        y_label: above the axis.
        title: says what is shown, for who cannot see it.
    """
    width, height, left, right, top, bottom = 620, 320, 64, 110, 28, 44
    xs, ys = zip(*(point for line in series for point in line.points), strict=True)
    x0, x1 = _range(xs, 1.05)
    y0, y1 = _range(ys, 1.3)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = math.log(x / x0) / math.log(x1 / x0), math.log(y / y0) / math.log(y1 / y0)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = [_text(4, 14, y_label, "tick"), _text((left + width) / 2, height - 6, x_label, "tick middle")]
    for tick in ticks(y0, y1):
        _, y = at(x0, tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(_text(left - 6, y + 4, f"{tick:g}", "tick end"))
    for tick in sorted(set(xs)) if len(set(xs)) <= 8 else ticks(x0, x1):
        x, _ = at(tick, y0)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{height - bottom}"/>')
        parts.append(_text(x, height - bottom + 16, f"{tick:g}", "tick middle"))
    for line in series:
        places = [at(x, y) for x, y in line.points]
        colour = COLOURS[line.colour % len(COLOURS)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line" d="M{path}" stroke="{colour}"/>')
        for (x, y), (value_x, value_y) in zip(places, line.points, strict=True):
            said = escape(f"{line.name}: {value_y:g} at {value_x:g}")
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{said}</title></circle>'
            )
    parts += _names(series, [at(*line.points[-1]) for line in series])
    return _svg(parts, height, title, width)


def _names(series: Sequence[Line], ends: Sequence[tuple[float, float]]) -> list[str]:
    """Each line's name behind its end, moved down where it would cover the one above."""
    parts, below = [], -math.inf
    for (x, y), line in sorted(zip(ends, series, strict=True), key=lambda pair: pair[0][1]):
        below = max(y, below + 13)
        colour = COLOURS[line.colour % len(COLOURS)]
        parts.append(f'<circle cx="{x + 9:.1f}" cy="{below:.1f}" r="3" fill="{colour}"/>')
        parts.append(_text(x + 16, below + 4, line.name, "tick"))
    return parts


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, so many that an axis can carry them: 0.5, 1, 2, 5, 10."""
    for steps in ((1, 1.2, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        found = [float(f"{step * 10.0**e:.3g}") for e in exponents for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= 9:
            return found
    return found[:: len(found) // 9 + 1]


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values) / margin, max(values) * margin
    return (low / 2, high * 2) if high / low < margin**2.5 else (low, high)


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _svg(parts: Sequence[str], height: float, title: str, width: int = _WIDTH) -> Markup:
    head = f'<svg class="plot" role="img" viewBox="0 0 {width} {height:.0f}" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")

"""A plot of measured lines as SVG, written by hand: two axes from 0, and a few points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 40, 50
_COLOURS = ("#1f6feb", "#bf3989", "#2da44e")
_TICKS = 5


def svg(title: str, x_name: str, y_name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return a picture of the lines, each a name and its points."""
    points = [point for line in lines.values() for point in line]
    x_step, y_step = (_step(max(point[axis] for point in points)) for axis in (0, 1))
    style = 'font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {style}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / (x_step * _TICKS), y / (y_step * _TICKS)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    for tick in range(_TICKS + 1):
        x, y = place(tick * x_step, tick * y_step)
        parts += [
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick * y_step:g}</text>',
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick * x_step:g}</text>',
        ]
    centre, middle = _LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    parts += [
        f'<text x="{centre}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>',
    ]
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        at = [place(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
        parts.append(f'<text x="{_LEFT + 12}" y="{_TOP + 14 + 16 * number}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _step(most: float) -> float:
    """Return a round step of which `_TICKS` reach `most`."""
    size = 10.0**-6
    while True:
        for factor in (1, 2, 4, 5):
            if factor * size * _TICKS >= most:
                return factor * size
        size *= 10

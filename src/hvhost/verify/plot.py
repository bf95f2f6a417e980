"""One line over time, as an SVG file."""

from __future__ import annotations

from collections.abc import Sequence

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 800, 300, 90, 40, 40, 20


def svg_plot(title: str, unit: str, seconds: Sequence[float], values: Sequence[float]) -> str:
    """*values*, in *unit*, over *seconds*; at least one point."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    if high == low:
        high = low + 1.0
    last = seconds[-1] or 1.0

    def x(second: float) -> float:
        return _LEFT + second / last * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    points = " ".join(
        f"{x(second):.1f},{y(value):.1f}" for second, value in zip(seconds, values, strict=True)
    )
    labels = "".join(
        f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
        'stroke="#ccc"/>'
        for value in sorted({low, 0.0, high})
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_LEFT}" y="20" font-weight="bold">{title}</text>{labels}'
        f'<text x="{_LEFT}" y="{_HEIGHT - 12}">0 s</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 12}" text-anchor="end">{last:.1f} s</text>'
        f'<text x="8" y="{_TOP - 8}">{unit}</text>'
        f'<polyline fill="none" stroke="#06c" points="{points}"/></svg>\n'
    )

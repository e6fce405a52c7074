"""Charts as SVG: curves and histograms with the colours of `report.css`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

_WIDTH, _HEIGHT = 380, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 40


class Line(NamedTuple):
    """Curve of a chart."""

    name: str  # in the legend
    style: str  # a class of `report.css`
    x: Sequence[float]
    y: Sequence[float]


def ticks(low: float, high: float) -> dict[float, str]:
    """Returns two to six round values in a range, ascending, with their texts."""
    if high == low:
        return {low: f"{low:.3g}"}
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    values = step * np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return {float(v): f"{v + 0.0:.{digits}f}" if 1e-4 <= step < 1e4 else f"{v:.3g}" for v in values}


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    diagonal: bool = False,
    point: str | None = None,
) -> Markup:
    """Draws curves, with a grid and axes.

    Args:
      lines: drawn in this order.
      title: description for screen readers.
      x_label: text below the x axis.
      y_label: text next to the y axis.
      x_range: limits of the x axis; curves are clipped to them.
      y_range: limits of the y axis, likewise.
      diagonal: draw a dashed diagonal, the curve of random scores.
      point: id of a point for scripts to move, with the scale of the chart in `data-x`, `data-y`.
    """
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    (x0, x1), (y0, y1) = x_range, y_range
    parts = []

    def add(template: str, *values) -> None:
        parts.append(Markup(template).format(*values))

    def across(x):
        return _LEFT + (np.asarray(x, float) - x0) / (x1 - x0) * width

    def up(y):
        return _TOP + height - (np.asarray(y, float) - y0) / (y1 - y0) * height

    head = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-x="{} {}" data-y="{} {}">'
    add(head, _WIDTH, _HEIGHT, title, _LEFT, width, _TOP + height, -height)
    for value, text in ticks(y0, y1).items():
        add('<path class="grid" d="M{} {:.1f}h{}"/>', _LEFT, up(value), width)
        add('<text x="{}" y="{:.1f}" class="end">{}</text>', _LEFT - 7, up(value) + 4, text)
    for value, text in ticks(x0, x1).items():
        place = across(value), _TOP + height + 17
        add('<text x="{:.1f}" y="{}" class="middle">{}</text>', *place, text)
    label = ' class="middle label">{}</text>'
    add('<text x="{}" y="{}"' + label, _LEFT + width / 2, _HEIGHT - 5, x_label)
    add('<text transform="translate(11 {}) rotate(-90)"' + label, _TOP + height / 2, y_label)
    if diagonal:
        ends = _LEFT, _TOP + height, _LEFT + width, _TOP
        add('<path class="chance" d="M{} {}L{} {}"/>', *ends)
    for line in lines:
        points = np.clip(across(line.x), _LEFT, _LEFT + width), np.clip(up(line.y), _TOP, _HEIGHT)
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(*points, strict=True))
        add('<path class="line {}" d="M{}"/>', line.style, path)
    if point:
        add('<circle id="{}" r="5.5" class="point"/>', point)
    return Markup("").join([*parts, Markup("</svg>")])


def histogram(low: float, high: float, normal: np.ndarray, anomalous: np.ndarray) -> Markup:
    """Draws bars of normal scores upwards and of anomalous ones downwards, each to its own scale.

    It has no text and stretches to any width. The outer bars include scores outside the range.
    """
    bins = int(np.clip(3 * np.sqrt(len(normal) + len(anomalous)), 30, 80))
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(np.clip(s, low, high), edges)[0] for s in (normal, anomalous)]
    head = (
        '<svg viewBox="0 0 {} 200" preserveAspectRatio="none" role="img" aria-label="Histogram of '
        'the scores of {} normal images, upwards, and {} anomalous ones, downwards">'
    )
    parts = [Markup(head).format(10 * bins, len(normal), len(anomalous))]
    bar = Markup(
        '<rect class="{}" x="{}" y="{:.2f}" width="9" height="{:.2f}">'
        "<title>{} {}, {:.4g} to {:.4g}</title></rect>"
    )
    for kind, count in zip(("normal", "anomalous"), counts, strict=True):
        for i in np.flatnonzero(count):
            height = 97 * count[i] / count.max()
            x, y = 10 * i + 0.5, 99 - height if kind == "normal" else 101
            parts.append(bar.format(kind, x, y, height, count[i], kind, edges[i], edges[i + 1]))
    return Markup("").join([*parts, Markup("</svg>")])

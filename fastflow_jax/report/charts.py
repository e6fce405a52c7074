"""Charts as SVG: lines and bars whose colours, light or dark, are those of `report.css`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

_WIDTH, _HEIGHT = 380, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 40


class Line(NamedTuple):
    """One curve of a chart."""

    name: str  # in the legend
    style: str  # a class of `report.css`
    x: Sequence[float]
    y: Sequence[float]


def ticks(low: float, high: float) -> dict[float, str]:
    """Two to six round values within the range, ascending, and their text."""
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
    """Curves over round ticks.

    Args:
      lines: drawn in this order.
      title: what those hear who do not see it.
      x_label: below.
      y_label: to the left.
      x_range: what is shown; curves are cut off there.
      y_range: likewise.
      diagonal: draw what chance would reach.
      point: id of a point that a script moves; the chart's data attributes tell it the scale.
    """
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    (x0, x1), (y0, y1) = x_range, y_range

    def across(x):
        return _LEFT + (np.asarray(x, float) - x0) / (x1 - x0) * width

    def up(y):
        return _TOP + height - (np.asarray(y, float) - y0) / (y1 - y0) * height

    parts = [
        Markup(
            '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-x="{} {}" data-y="{} {}">'
        ).format(_WIDTH, _HEIGHT, title, _LEFT, width, _TOP + height, -height)
    ]
    for value, text in ticks(y0, y1).items():
        parts.append(
            Markup(
                '<path class="grid" d="M{} {:.1f}h{}"/>'
                '<text x="{}" y="{:.1f}" class="end">{}</text>'
            ).format(_LEFT, up(value), width, _LEFT - 7, up(value) + 4, text)
        )
    for value, text in ticks(x0, x1).items():
        parts.append(
            Markup('<text x="{:.1f}" y="{}" class="middle">{}</text>').format(
                across(value), _TOP + height + 17, text
            )
        )
    parts.append(
        Markup(
            '<text x="{}" y="{}" class="middle label">{}</text>'
            '<text transform="translate(11 {}) rotate(-90)" class="middle label">{}</text>'
        ).format(_LEFT + width / 2, _HEIGHT - 5, x_label, _TOP + height / 2, y_label)
    )
    if diagonal:
        parts.append(
            Markup('<path class="chance" d="M{} {}L{} {}"/>').format(
                _LEFT, _TOP + height, _LEFT + width, _TOP
            )
        )
    for line in lines:
        points = np.clip(across(line.x), _LEFT, _LEFT + width), np.clip(up(line.y), _TOP, _HEIGHT)
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(*points, strict=True))
        parts.append(Markup('<path class="line {}" d="M{}"/>').format(line.style, path))
    if point:
        parts.append(Markup('<circle id="{}" r="5.5" class="point"/>').format(point))
    return Markup("").join([*parts, Markup("</svg>")])


def histogram(low: float, high: float, normal: np.ndarray, anomalous: np.ndarray) -> Markup:
    """Bars of normal scores upwards, of anomalous ones downwards, each kind to a scale of its own.

    It has no text and stretches to any width. What lies out of the range is in its outer bars.
    """
    bins = int(np.clip(3 * np.sqrt(len(normal) + len(anomalous)), 30, 80))
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(np.clip(s, low, high), edges)[0] for s in (normal, anomalous)]
    parts = [
        Markup(
            '<svg viewBox="0 0 {} 200" preserveAspectRatio="none" role="img" aria-label="Scores of '
            '{} normal images, bars upwards, and of {} anomalous ones, downwards">'
        ).format(10 * bins, len(normal), len(anomalous))
    ]
    for kind, count in zip(("normal", "anomalous"), counts, strict=True):
        for i in np.flatnonzero(count):
            height = 97 * count[i] / count.max()
            parts.append(
                Markup(
                    '<rect class="{}" x="{}" y="{:.2f}" width="9" height="{:.2f}">'
                    "<title>{} {}, {:.4g} to {:.4g}</title></rect>"
                ).format(
                    kind,
                    10 * i + 0.5,
                    99 - height if kind == "normal" else 101,
                    height,
                    count[i],
                    kind,
                    edges[i],
                    edges[i + 1],
                )
            )
    return Markup("").join([*parts, Markup("</svg>")])

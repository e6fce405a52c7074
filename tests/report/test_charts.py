"""Charts: ticks, histogram counts and positions of curves."""

import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fastflow_jax.report import charts
from fastflow_jax.report.charts import Line, histogram, line_chart


@settings(deadline=None)
@given(st.floats(-100, 100), st.floats(1e-3, 1e5))
def test_ticks_are_distinct_and_within_the_range(low, extent):
    high = low + extent
    ticks = charts.ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert len(set(ticks.values())) == len(ticks)
    for value, text in ticks.items():
        assert low - 1e-6 * extent <= value <= high + 1e-6 * extent
        assert float(text) == pytest.approx(value, abs=1e-6 * extent)


def test_histogram_bars_count_all_scores():
    rng = np.random.default_rng(0)
    normal, anomalous = rng.normal(0, 1, 300), rng.normal(3, 1, 100)
    svg = histogram(-2, 4, normal, anomalous)
    bars = re.findall(r"<title>(\d+) (\w+), (\S+) to (\S+)</title>", svg)
    for kind, scores in (("normal", normal), ("anomalous", anomalous)):
        mine = [(int(n), float(a), float(b)) for n, k, a, b in bars if k == kind]
        assert sum(n for n, *_ in mine) == len(scores)  # includes scores out of range
        for n, a, b in mine[1:-1]:
            assert n == pytest.approx(((scores >= a) & (scores < b)).sum(), abs=2)  # 4 digits


def test_curves_are_drawn_to_the_scale_of_the_axes():
    svg = line_chart(
        [Line("a", "first", [0, 0.5, 1], [0, 1, 2])],
        title='"a" & <b>',
        x_label="x",
        y_label="y",
        x_range=(0, 1),
        y_range=(0, 1),
    )
    left, width = map(float, re.search(r'data-x="(\S+) (\S+)"', svg).groups())
    bottom, height = map(float, re.search(r'data-y="(\S+) (\S+)"', svg).groups())
    path = re.search(r'class="line first" d="M([^"]+)"', svg).group(1)
    points = np.array([[float(v) for v in p.split()] for p in path.split("L")])
    expected = [
        [left, bottom],
        [left + width / 2, bottom + height],
        [left + width, bottom + height],
    ]
    np.testing.assert_allclose(points, expected, atol=0.1)
    assert "&#34;a&#34; &amp; &lt;b&gt;" in svg

"""Plots show the figures they are given."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.report import Figure, Series, Table, confusion_parts, flow_map, line_chart, reliability_figure
from fastfsl.report.charts import linear_ticks, log_ticks
from fastfsl.report.text import number

VALUES = st.floats(-1e6, 1e6, allow_subnormal=False)


def marks(svg):
    """Centres of the circles, which mark the first series."""
    return [(float(x), float(y)) for x, y in re.findall(r'<circle class="mark c0" cx="([\d.]+)" cy="([\d.]+)"', svg)]


def chart(values, **options):
    positions = [str(place) for place in range(len(values))]
    return line_chart(positions, [Series("a", tuple(values))], x_label="x", y_label="y", **options).to_svg("d")


def test_higher_values_stand_higher_and_further_right():
    *points, _legend = marks(chart((1.0, 3.0, 2.0)))
    xs, ys = zip(*points, strict=True)
    assert xs[0] < xs[1] < xs[2]
    assert ys[1] < ys[2] < ys[0]
    assert math.isclose(ys[0] - ys[2], ys[2] - ys[1], abs_tol=0.2)


def test_a_logarithmic_axis_spaces_factors_evenly():
    *points, _legend = marks(chart((1.0, 10.0, 100.0), log=True))
    ys = [y for _, y in points]
    assert math.isclose(ys[0] - ys[1], ys[1] - ys[2], abs_tol=0.2)


def test_a_line_is_broken_where_there_is_no_value():
    svg = chart((1.0, 2.0, None, 3.0, 4.0))
    assert svg.count('class="line c0"') == 2
    assert len(marks(svg)) == 5  # four values and the legend


def test_the_chosen_position_is_marked():
    assert 'class="marked"' in chart((1.0, 2.0), marked=1)
    assert 'class="marked"' not in chart((1.0, 2.0))


@given(VALUES, VALUES)
def test_linear_ticks_enclose_the_values(a, b):
    low, high = min(a, b), max(a, b)
    ticks = linear_ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


@given(st.floats(1e-4, 1e6), st.floats(1.0, 1e6))
def test_log_ticks_enclose_the_values(low, factor):
    ticks = log_ticks(low, low * factor)
    assert ticks[0] <= low * (1 + 1e-6)
    assert ticks[-1] >= low * factor * (1 - 1e-6)
    assert 2 <= len(ticks) <= 14


@pytest.mark.parametrize(
    ("value", "words"), [(0.5, "0.5"), (1234567.0, "1234567"), (1e-7, "1e-07"), (99.99999, "100"), (float("nan"), "–")]
)
def test_numbers_are_short(value, words):
    assert number(value) == words


def test_confusions_are_counted_by_the_true_class():
    labels, predicted = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 1, 1, 1, 0, 2])
    figure, largest = confusion_parts(labels, predicted, ("a", "b", "c"))
    assert isinstance(figure, Figure)
    assert isinstance(largest, Table)
    assert list(figure.table.rows) == [("1 a", 1, 2, 0, 3), ("2 b", 0, 1, 0, 1), ("3 c", 1, 0, 1, 2)]
    assert list(largest.rows) == [("a", "b", 2, 3), ("c", "a", 1, 2)]
    assert "a taken for b: 2" in figure.drawing.to_svg("d")
    assert "3 of 6" in figure.description


def test_without_a_confusion_there_is_no_table_of_them():
    labels = np.arange(40)
    assert len(confusion_parts(labels[:3], labels[:3], "abc")) == 1
    assert confusion_parts(labels, labels, [str(label) for label in labels]) == [
        "No sample was taken for another class."
    ]


def test_reliability_is_that_of_the_chosen_class():
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.0, 1.0]])
    rows = {row[0]: row[1:] for row in reliability_figure(probabilities, np.array([0, 1, 1, 1])).table.rows}
    assert rows["60–70"] == (1, 65.0, 100.0)
    assert rows["90–100"] == (3, pytest.approx(290 / 3), pytest.approx(200 / 3))
    assert rows["0–10"] == (0, None, None)


def test_the_map_shows_how_features_near_their_targets():
    rng = np.random.default_rng(0)
    targets = np.linalg.qr(rng.normal(size=(6, 6)))[0][:3]
    labels = np.repeat([0, 1, 2], 5)
    start = rng.normal(size=(15, 6))
    states = [start + step * (targets[labels] - start) for step in (0.0, 0.5, 1.0)]
    states = [state / np.linalg.norm(state, axis=1, keepdims=True) for state in states]
    figure = flow_map(states, labels, targets, ("a", "b", "c"))
    own = [float(str(row[1])) for row in figure.table.rows]
    assert own == sorted(own)
    assert own[-1] == pytest.approx(1.0)
    assert figure.table.rows[-1][2] == pytest.approx(0.0, abs=1e-9)
    svg = figure.drawing.to_svg("d")
    assert svg.count('class="trace') == 15
    assert "target of b" in svg
    # Prototypes: the nearest one counts, and each is drawn.
    both = flow_map(states, labels, np.stack([targets, -targets], axis=1), ("a", "b", "c"))
    assert float(str(both.table.rows[-1][1])) == pytest.approx(1.0)
    assert both.drawing.to_svg("d").count("target of") == 6


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_map_of_narrow_features_and_a_single_class(width):
    states = [np.ones((1, width)), np.ones((1, width))]
    figure = flow_map(states, np.array([0]), np.ones((1, width)), ("a",))
    assert "nan" not in figure.drawing.to_svg("d")
    assert figure.table.rows[0][2] is None

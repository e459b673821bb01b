"""Line charts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastfsl.report.svg import PHONE_WIDTH, Drawing, Point
from fastfsl.report.text import number

_TICKS = 5


@dataclass(frozen=True)
class _Canvas:
    """Sizes of a chart: of the whole, its margins, its legend, and how many positions can be named below the axis."""

    width: int
    height: int
    left: int
    legend_columns: int
    legend_letters: int
    named_positions: int
    right: int = 16
    top: int = 16
    bottom: int = 60
    legend_row: int = 20


_SCREEN = _Canvas(640, 340, left=64, legend_columns=3, legend_letters=28, named_positions=16)
_PHONE = _Canvas(PHONE_WIDTH, 280, left=52, legend_columns=2, legend_letters=19, named_positions=7)


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: as the legend says it.
        values: by position along the axis; None where there is none.
    """

    name: str
    values: tuple[float | None, ...]


def line_chart(
    positions: Sequence[str],
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    marked: int | None = None,
    limits: tuple[float, float] | None = None,
) -> Drawing:
    """Lines over evenly spaced positions.

    Args:
        positions: what stands under each.
        series: the lines, at least one value among them.
        x_label: below the axis.
        y_label: beside it.
        log: the values, all above 0, on a logarithmic axis.
        marked: a position to be marked, such as the one that was chosen.
        limits: values that the axis has to reach; None: the lowest and the highest there is.
    """
    values = [value for line in series for value in line.values if value is not None]
    ticks = log_ticks(min(values), max(values)) if log else linear_ticks(*(limits or (min(values), max(values))))

    def drawn(canvas: _Canvas) -> Drawing:
        return _draw(canvas, positions, series, ticks, x_label=x_label, y_label=y_label, log=log, marked=marked)

    drawing = drawn(_SCREEN)
    drawing.narrow = drawn(_PHONE)
    return drawing


def _draw(
    canvas: _Canvas,
    positions: Sequence[str],
    series: Sequence[Series],
    ticks: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    log: bool,
    marked: int | None,
) -> Drawing:
    rows = -(-len(series) // canvas.legend_columns)
    drawing = Drawing(canvas.width, canvas.height + canvas.legend_row * rows)
    low, high = ticks[0], ticks[-1]
    left, bottom, right = canvas.left, canvas.height - canvas.bottom, canvas.width - canvas.right

    def x_of(position: int) -> float:
        share = (position + 0.5) / len(positions)
        return left + share * (right - left)

    def y_of(value: float) -> float:
        share = (math.log(value / low) / math.log(high / low)) if log else (value - low) / (high - low)
        return bottom - share * (bottom - canvas.top)

    for tick in ticks:
        drawing.line((left, y_of(tick)), (right, y_of(tick)))
        drawing.text((left - 8, y_of(tick) + 4), number(tick), anchor="end")
    if marked is not None:
        drawing.line((x_of(marked), canvas.top), (x_of(marked), bottom), "marked")
    every = -(-len(positions) // canvas.named_positions)  # more labels than that would meet
    for place, name in enumerate(positions):
        if place % every == 0:
            drawing.text((x_of(place), bottom + 18), name, anchor="middle", limit=12)
    drawing.line((left, bottom), (right, bottom), "axis")
    letters = canvas.width // 8
    drawing.text(((left + right) / 2, bottom + 40), x_label, anchor="middle", kind="label", limit=letters)
    middle = (12, (canvas.top + bottom) / 2)
    drawing.text(middle, y_label, anchor="middle", kind="label", turned=True, limit=letters)
    for index, line in enumerate(series):
        for run in _unbroken(line.values):
            points: list[Point] = [(x_of(place), y_of(value)) for place, value in run]
            drawing.path(points, index)
            for point, (place, value) in zip(points, run, strict=True):
                note = f"{line.name}, {x_label} {positions[place]}: {number(value)}"
                drawing.mark(point, index, note="" if canvas is _PHONE else note)  # nothing points at it on a phone
        column, row = index % canvas.legend_columns, index // canvas.legend_columns
        at = (left + column * (right - left) / canvas.legend_columns, canvas.height + canvas.legend_row * row + 4)
        if canvas is _PHONE:  # where the margin is needed for names
            at = (8 + column * (right - 8) / canvas.legend_columns, at[1])
        drawing.mark((at[0], at[1] - 4), index)
        drawing.text((at[0] + 10, at[1]), line.name, limit=canvas.legend_letters)
    return drawing


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, the first at or below `low` and the last at or above `high`."""
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):  # all the same
        pad = abs(low) / 10 if abs(low) > 1e-6 else 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(tick * step, 12) for tick in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... times a power of ten, likewise; where they are too many, the powers alone."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    last = min(index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[first : max(last, first + 1) + 1]


def _unbroken(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """The stretches of a line between its gaps."""
    runs: list[list[tuple[int, float]]] = [[]]
    for place, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((place, value))
    return [run for run in runs if run]

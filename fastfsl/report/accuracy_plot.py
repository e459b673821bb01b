"""Accuracy against shots, one line a method."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from fastfsl.files import staged_file

# Twenty colours that can be told apart; lines beyond them differ by their marker.
_COLOURS = colormaps["tab20"]
_MARKERS = "osD^v<>PX*"


@dataclass(frozen=True)
class AccuracyLine:
    """One method.

    Attributes:
        name: as the legend says it.
        accuracy: fraction by position along the axis; None where there is none.
        spread: standard deviation, likewise.
    """

    name: str
    accuracy: tuple[float | None, ...]
    spread: tuple[float | None, ...]


def write_accuracy_plot(path: Path, shots: Sequence[int | str], lines: Sequence[AccuracyLine], title: str) -> None:
    """Draw the lines with their error bars into a PNG file, whole or not at all.

    Args:
        path: the file to make or replace.
        shots: samples a class, or `all`: the positions along the axis.
        lines: what to draw.
        title: above it.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=[_COLOURS(number) for number in range(_COLOURS.N)])
    for number, line in enumerate(lines):
        places = [place for place, value in enumerate(line.accuracy) if value is not None]
        axes.errorbar(
            places,
            [100 * (line.accuracy[place] or 0.0) for place in places],
            yerr=[100 * (line.spread[place] or 0.0) for place in places],
            label=line.name,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
    axes.set_xticks(range(len(shots)), [str(number) for number in shots])
    axes.set_xlabel("shots")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    with staged_file(path) as staging, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in scripts that the font lacks are boxes
        figure.savefig(staging, format="png")

"""How far probabilities can be believed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.report.charts import Series, line_chart
from fastfsl.report.page import Figure, Table

_BINS = 10


def reliability_figure(probabilities: NDArray[Any], labels: NDArray[Any]) -> Figure:
    """Accuracy against the probability of the chosen class, in bins of equal width.

    Args:
        probabilities: (n, C), rows sum to 1.
        labels: true class indices, (n,).

    Source: Guo et al. (arXiv 1706.04599), section 2.
    """
    top = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(top * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    stated = np.bincount(bins, weights=top, minlength=_BINS) / np.maximum(counts, 1)
    found = np.bincount(bins, weights=right, minlength=_BINS) / np.maximum(counts, 1)
    names = [f"{100 * index // _BINS}–{100 * (index + 1) // _BINS}" for index in range(_BINS)]
    filled = [bool(count) for count in counts]

    def series(name: str, values: NDArray[np.float64]) -> Series:
        return Series(
            name, tuple(100 * float(value) if some else None for value, some in zip(values, filled, strict=True))
        )

    drawing = line_chart(
        names,
        [series("accuracy", found), series("mean probability", stated)],
        x_label="probability of the chosen class, %",
        y_label="%",
        limits=(0, 100),
    )
    rows = [
        (name, int(count), 100 * float(mean) if count else None, 100 * float(share) if count else None)
        for name, count, mean, share in zip(names, counts, stated, found, strict=True)
    ]
    gap = float((np.abs(found - stated) * counts).sum() / len(labels))
    return Figure(
        drawing,
        f"Reliability diagram over {len(labels)} samples: the two lines are {100 * gap:.1f} points apart on average",
        f"Where the lines meet, probabilities are to be believed; on average they are {100 * gap:.1f} points apart.",
        Table(("probability, %", "samples", "mean probability, %", "accuracy, %"), rows),
    )

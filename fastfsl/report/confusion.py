"""Which classes are taken for which: the whole matrix for few classes, the largest confusions for many."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.report.page import Figure, Part, Table
from fastfsl.report.svg import Drawing

# A cell of a larger matrix would be too small to be read on a phone.
MAX_CLASSES = 30
_LARGEST = 15
_CELL, _NAMES = 26, 150
# Share of the full colour above which a light number is read better than a dark one.
_DARK = 0.85


def confusion_parts(labels: NDArray[Any], predicted: NDArray[Any], class_names: Sequence[str]) -> list[Part]:
    """A figure of the matrix for up to `MAX_CLASSES` classes, and a table of the largest confusions.

    Args:
        labels: true class indices, (n,).
        predicted: class indices, (n,).
        class_names: by index.
    """
    size = len(class_names)
    counts = np.bincount(labels * size + predicted, minlength=size * size).reshape(size, size)
    totals = counts.sum(axis=1)
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LARGEST]
    pairs = [(int(index // size), int(index % size)) for index in order if wrong.flat[index]]
    table = Table(
        ("class", "taken for", "times", "of its samples"),
        [(class_names[true], class_names[other], int(wrong[true, other]), int(totals[true])) for true, other in pairs],
        "The largest confusions",
    )
    if size > MAX_CLASSES:
        return [table if pairs else "No sample was taken for another class."]
    right = int(np.trace(counts))
    figure = Figure(
        _matrix(counts, totals, class_names),
        f"Confusion matrix of {size} classes: {right} of {int(totals.sum())} samples on the diagonal",
        "Rows: the true class. Columns, in the same order: the class it was taken for.",
        Table(
            ("class", *(str(index + 1) for index in range(size)), "samples"),
            [
                (f"{index + 1} {name}", *map(int, counts[index]), int(totals[index]))
                for index, name in enumerate(class_names)
            ],
        ),
    )
    return [figure, table] if pairs else [figure]


def _matrix(counts: NDArray[np.int64], totals: NDArray[np.int64], class_names: Sequence[str]) -> Drawing:
    size = len(class_names)
    drawing = Drawing(_NAMES + _CELL * size + 20, _CELL * size + 30)
    for row, name in enumerate(class_names):
        y = 24 + _CELL * row
        drawing.text((_NAMES - 8, y + 17), f"{row + 1} {name}", anchor="end", limit=20)
        drawing.text((_NAMES + _CELL * (row + 0.5), 16), row + 1, anchor="middle", kind="label")
        for column, count in enumerate(map(int, counts[row])):
            share = count / totals[row] if totals[row] else 0.0
            at = (_NAMES + _CELL * column, y)
            drawing.cell(at, (_CELL, _CELL), share, note=f"{name} taken for {class_names[column]}: {count}")
            if count:
                kind = "over" if share > _DARK else ""
                drawing.text((at[0] + _CELL / 2, y + 17), count, anchor="middle", kind=kind)
    return drawing

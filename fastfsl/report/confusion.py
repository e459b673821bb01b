"""Which classes are taken for which: the whole matrix for few classes, the largest confusions for many."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.report.page import Figure, Part, Table
from fastfsl.report.svg import PHONE_WIDTH, Drawing

# A cell of a larger matrix would be too small to be read on a phone.
MAX_CLASSES = 30
_LARGEST = 15
# Pixels of a cell and of the names beside it, letters of a name.
_SCREEN = (26.0, 150, 20)
_PHONE_NAMES, _PHONE_LETTERS, _NUMBERS_ONLY = 104, 13, 26
# A smaller cell has no room for a count.
_LEAST_CELL = 20
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
        if not pairs:
            return ["No sample was taken for another class."]
        about = f"A matrix of {size} classes could not be read: these are the {len(pairs)} largest confusions"
        return [f"{about}.", table, _worst_classes(wrong, totals, class_names)]
    right = int(np.trace(counts))
    figure = Figure(
        _both_matrices(counts, totals, class_names),
        f"Confusion matrix of {size} classes: {right} of {int(totals.sum())} samples on the diagonal",
        "Rows: the true class. Columns, in the same order: the class it was taken for. The figures behind it have the "
        "names.",
        Table(
            ("class", *(str(index + 1) for index in range(size)), "samples"),
            [
                (f"{index + 1} {name}", *map(int, counts[index]), int(totals[index]))
                for index, name in enumerate(class_names)
            ],
        ),
    )
    return [figure, table] if pairs else [figure]


def _worst_classes(wrong: NDArray[np.int64], totals: NDArray[np.int64], class_names: Sequence[str]) -> Table:
    """The classes whose samples are mistaken most often, and what they are taken for."""
    missed = wrong.sum(axis=1)
    share = missed / np.maximum(totals, 1)
    order = [int(index) for index in np.lexsort((-missed, -share))[:_LARGEST] if missed[index]]
    rows = []
    for index in order:
        others = [int(other) for other in np.argsort(-wrong[index], kind="stable")[:3] if wrong[index, other]]
        taken = ", ".join(f"{class_names[other]} ({int(wrong[index, other])})" for other in others)
        rows.append((class_names[index], 100 * float(share[index]), int(totals[index]), taken))
    return Table(("class", "wrong, %", "samples", "taken for"), rows, "The classes that are mistaken most")


def _both_matrices(counts: NDArray[np.int64], totals: NDArray[np.int64], class_names: Sequence[str]) -> Drawing:
    drawing = _matrix(counts, totals, class_names, *_SCREEN)
    cell = (PHONE_WIDTH - _PHONE_NAMES) / len(class_names)
    if cell >= _LEAST_CELL:
        drawing.narrow = _matrix(counts, totals, class_names, min(cell, 26), _PHONE_NAMES, _PHONE_LETTERS)
    else:  # an overview, its classes by their numbers alone
        cell = (PHONE_WIDTH - _NUMBERS_ONLY) / len(class_names)
        drawing.narrow = _matrix(counts, totals, class_names, cell, _NUMBERS_ONLY, 0)
    return drawing


def _matrix(
    counts: NDArray[np.int64],
    totals: NDArray[np.int64],
    class_names: Sequence[str],
    cell: float,
    names: int,
    letters: int,
) -> Drawing:
    size = len(class_names)
    width = math.ceil(names + cell * size)
    drawing = Drawing(width + 20 if letters == _SCREEN[2] else width, math.ceil(cell * size + 30))
    every = 1 if cell >= 16 else 5
    for row, name in enumerate(class_names):
        y, middle = 24 + cell * row, cell / 2 + 4
        if row % every == 0:
            words = f"{row + 1} {name}" if letters else row + 1
            drawing.text((names - 8, y + middle), words, anchor="end", limit=letters or 4)
            drawing.text((names + cell * (row + 0.5), 16), row + 1, anchor="middle", kind="label")
        for column, count in enumerate(map(int, counts[row])):
            share = count / totals[row] if totals[row] else 0.0
            at = (names + cell * column, y)
            # Nothing points at a cell on a phone.
            note = f"{name} taken for {class_names[column]}: {count}" if letters == _SCREEN[2] else ""
            drawing.cell(at, (cell, cell), share, note=note)
            if count and cell >= _LEAST_CELL:
                kind = "over" if share > _DARK else ""
                drawing.text((at[0] + cell / 2, y + middle), count, anchor="middle", kind=kind)
    return drawing

"""A plane in which features move along the flow."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.report.page import Figure, Table
from fastfsl.report.svg import NUM_COLOURS, PHONE_WIDTH, Drawing

_MARGIN, _LEGEND_ROW = 24, 20
# Width, height, columns of the legend and letters of a name in it.
_SCREEN, _PHONE = (640, 460, 4, 22), (PHONE_WIDTH, 330, 2, 20)
_SAMPLES_A_CLASS = 12


def flow_map(
    states: Sequence[NDArray[Any]], labels: NDArray[Any], targets: NDArray[Any], class_names: Sequence[str]
) -> Figure:
    """The way of features through the flow, in the plane of their two main directions.

    The plane is that of the first and the last states of the samples given, all classes together (principal component
    analysis); of the classes with most samples up to `NUM_COLOURS` are drawn.

    Args:
        states: unit features after each step, the first one before any; each (n, d).
        labels: class indices, (n,).
        targets: where each class is sent to, unit length, (C, d) or (C, K, d) with K prototypes a class.
        class_names: by index.
    """
    ends = np.concatenate([states[0], states[-1]]).astype(np.float64)
    mean = ends.mean(axis=0)
    # The directions come from a symmetric matrix of d x d, and their signs are made the same on every machine.
    _, vectors = np.linalg.eigh((ends - mean).T @ (ends - mean))
    axes = vectors[:, : -3 if vectors.shape[1] > 2 else None : -1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))  # features of one number have one direction
    flat = [(np.asarray(state, np.float64) - mean) @ axes for state in states]
    counts = np.bincount(labels, minlength=len(class_names))
    classes = sorted(np.argsort(-counts, kind="stable")[:NUM_COLOURS].tolist())
    classes = [index for index in classes if counts[index]]
    chosen = {index: np.flatnonzero(labels == index)[:_SAMPLES_A_CLASS] for index in classes}
    prototypes = targets[:, None] if targets.ndim == 2 else targets
    goals = {index: (prototypes[index] - mean) @ axes for index in classes}

    drawn = np.concatenate([*(state[rows] for state in flat for rows in chosen.values()), *goals.values()])
    low, high = drawn.min(axis=0), drawn.max(axis=0)
    scale = np.where(high > low, high - low, 1.0)

    def drawn_on(width: int, height: int, columns: int, letters: int) -> Drawing:
        drawing = Drawing(width, height + _LEGEND_ROW * -(-len(classes) // columns))

        def place(point: NDArray[np.float64]) -> tuple[float, float]:
            x, y = (point - low) / scale
            return _MARGIN + x * (width - 2 * _MARGIN), height - _MARGIN - y * (height - 2 * _MARGIN)

        for colour, rows in enumerate(chosen.values()):
            for row in rows:
                drawing.path([place(state[row]) for state in flat], colour, "trace")
                drawing.mark(place(flat[0][row]), colour, 2.5, hollow=True)
                drawing.mark(place(flat[-1][row]), colour, 2.5)
        for colour, (index, points) in enumerate(goals.items()):
            for point in points:
                drawing.mark(place(point), colour, 7, hollow=True, note=f"target of {class_names[index]}")
            row, column = divmod(colour, columns)
            x, y = _MARGIN + column * (width - 2 * _MARGIN) / columns, height + _LEGEND_ROW * row + 8
            drawing.mark((x, y - 4), colour)
            drawing.text((x + 10, y), class_names[index], limit=letters)
        return drawing

    drawing = drawn_on(*_SCREEN)
    drawing.narrow = drawn_on(*_PHONE)
    cosines = [(step, *_cosines(state, labels, prototypes)) for step, state in enumerate(states)]
    left_out = len([count for count in counts if count]) - len(classes)
    others = f" {left_out} more classes are not drawn." if left_out else ""
    return Figure(
        drawing,
        f"{sum(map(len, chosen.values()))} features of {len(classes)} classes move over {len(states) - 1} steps; mean "
        f"cosine with the own class's target from {cosines[0][1]:.2f} to {cosines[-1][1]:.2f}",
        "Hollow: the feature as the encoder gives it. Filled: where the flow leaves it. Large and hollow: where its "
        f"class is sent to. Axes: the two main directions of these features before and after the flow.{others}",
        Table(("step", "cosine with the own target", "with the nearest other"), cosines),
    )


def _cosines(state: NDArray[Any], labels: NDArray[Any], prototypes: NDArray[Any]) -> tuple[float, float | None]:
    """Mean cosine with the nearest prototype of the own class and, if there are others, of any other class."""
    count, per_class, width = prototypes.shape
    cosines = (state @ prototypes.reshape(-1, width).T).reshape(len(state), count, per_class).max(axis=2)
    own = cosines[np.arange(len(labels)), labels]
    cosines[np.arange(len(labels)), labels] = -np.inf
    return float(own.mean()), float(cosines.max(axis=1).mean()) if cosines.shape[1] > 1 else None

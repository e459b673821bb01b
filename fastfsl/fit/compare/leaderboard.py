"""From cells to a leaderboard: one row a method and number of shots, and one a method over all numbers of shots."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.fit.compare.cell import Cell
from fastfsl.fit.compare.noise import Difference, paired_difference
from fastfsl.fit.comparison_plan import shots_label

# What a row over all numbers of shots has in place of one.
MEAN = "mean"


@dataclass(frozen=True)
class Row:
    """A line of the leaderboard; means are over seeds (and over numbers of shots in the rows `mean`).

    Attributes:
        method: its name.
        shots: samples a class, `all`, or `mean`.
        num_seeds: seeds whose cells are all there. With none of them every figure is None.
        accuracy_mean: fraction of the test samples.
        accuracy_sd: standard deviation over seeds (n - 1); None with one seed.
        macro_accuracy_mean: mean over classes of their accuracy.
        calibration_error_mean: expected calibration error.
        negative_log_likelihood_mean: nats.
        train_seconds: of one fit.
        num_parameters: of one fit.
        microseconds_per_feature: of `predict_proba` on the CPU.
        best: whether no method has a higher accuracy here.
        vs_best: accuracy minus that of the best method on the seeds that both have, with its interval (`noise`); None
            for the best one.
        within_noise: whether that interval holds 0; True for the best one.
        class_accuracy: by class name, for the classes that have test samples.
    """

    method: str
    shots: int | str
    num_seeds: int
    accuracy_mean: float | None = None
    accuracy_sd: float | None = None
    macro_accuracy_mean: float | None = None
    calibration_error_mean: float | None = None
    negative_log_likelihood_mean: float | None = None
    train_seconds: float | None = None
    num_parameters: int | None = None
    microseconds_per_feature: float | None = None
    best: bool = False
    vs_best: Difference | None = None
    within_noise: bool = False
    class_accuracy: dict[str, float] | None = None


def leaderboard(
    cells: Sequence[Cell], methods: Sequence[str], shots: Sequence[int | None], seeds: Sequence[int]
) -> list[Row]:
    """The rows of each number of shots, then, if there is more than one, the rows over all of them.

    Within a number of shots, methods stand in the given order.
    """
    by_place = {(cell.spec.method, cell.spec.shots, cell.spec.seed): cell for cell in cells}
    groups: list[tuple[int | str, Sequence[int | None]]] = [(shots_label(number), [number]) for number in shots]
    if len(shots) > 1:
        groups.append((MEAN, shots))
    found = []
    for label, group in groups:
        of_method = {}
        for method in methods:
            complete = {
                seed: [by_place[method, number, seed] for number in group]
                for seed in seeds
                if all((method, number, seed) in by_place for number in group)
            }
            of_method[method] = complete
        found += _group_rows(label, of_method)
    return found


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each method: by number of shots, then the one over all."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.method, []).append(row)
    return grouped


def _group_rows(label: int | str, of_method: dict[str, dict[int, list[Cell]]]) -> list[Row]:
    """Rows of one number of shots (or of all): cells by method and seed."""
    # Methods that lost a seed are compared on the seeds they have, and cannot be the best.
    most = max(map(len, of_method.values()))
    whole = [method for method, found in of_method.items() if found and len(found) == most]
    best = max(whole, key=lambda method: _mean(of_method[method], lambda cell: cell.accuracy)) if whole else None
    result = []
    for method, found in of_method.items():
        if best is None or not found:
            result.append(Row(method, label, 0))
            continue
        shared = [seed for seed in found if seed in of_method[best]]
        against = None
        if method != best and shared:
            against = paired_difference(_right(found, shared) - _right(of_method[best], shared))
        by_seed = [float(np.mean([cell.accuracy for cell in group])) for group in found.values()]
        classes = next(iter(found.values()))[0].class_accuracy
        result.append(
            Row(
                method=method,
                shots=label,
                num_seeds=len(found),
                accuracy_mean=float(np.mean(by_seed)),
                accuracy_sd=float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
                macro_accuracy_mean=_mean(found, lambda cell: cell.macro_accuracy),
                calibration_error_mean=_mean(found, lambda cell: cell.calibration_error),
                negative_log_likelihood_mean=_mean(found, lambda cell: cell.negative_log_likelihood),
                train_seconds=_mean(found, lambda cell: cell.train_seconds),
                num_parameters=round(_mean(found, lambda cell: cell.num_parameters)),
                microseconds_per_feature=_mean(found, lambda cell: cell.microseconds_per_feature),
                best=method == best,
                vs_best=against,
                within_noise=method == best or (against is not None and against.within_noise),
                class_accuracy={name: _class_mean(found, name) for name in classes},
            )
        )
    return result


def _right(found: dict[int, list[Cell]], seeds: Sequence[int]) -> NDArray[np.float64]:
    """Correctness of each test sample, mean over numbers of shots, (seeds, samples)."""
    return np.array([np.mean([cell.right_bits() for cell in found[seed]], axis=0) for seed in seeds])


def _mean(found: dict[int, list[Cell]], figure: Callable[[Cell], Any]) -> float:
    return float(np.mean([figure(cell) for group in found.values() for cell in group]))


def _class_mean(found: dict[int, list[Cell]], name: str) -> float:
    return _mean(found, lambda cell: cell.class_accuracy[name])

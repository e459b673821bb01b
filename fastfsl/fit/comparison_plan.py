"""What a comparison is to be of, checked before anything is loaded: this imports no torch."""

import difflib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from fastfsl.errors import ConfigError, DataError
from fastfsl.fit.methods import METHODS, SOURCES, find_method

CELLS, TUNING = "cells", "tuning"

# As published: several times slower than the rest, so that they are compared only when they are named.
SLOW = ("fma-paper", "fma-bridge", "fma-released")


def default_methods() -> tuple[str, ...]:
    """All on frozen features but the slow ones."""
    return tuple(name for name in METHODS if name not in SLOW)


def check_methods(names: Iterable[str]) -> None:
    """Refuse a name that is no method's, and name those it is close to.

    Raises:
        ConfigError: naming the first.
    """
    for name in names:
        try:
            find_method(name)
        except ConfigError as error:
            pairs = [f"{source}+{method}" for source in SOURCES for method in METHODS]
            close = ", ".join(difflib.get_close_matches(str(name), [*METHODS, *SOURCES, *pairs]))
            if not close:
                raise  # it names them all
            raise ConfigError(f"unknown method {name!r}: expected one such as {close}") from error


def check_plan(methods: Sequence[str], shots: Sequence[int | None], seeds: int) -> None:
    """Refuse a comparison of nothing, of something twice, or of a method that is not there.

    Raises:
        ConfigError: naming what.
    """
    check_methods(methods)
    for what, values in (("method", methods), ("number of shots", [shots_label(number) for number in shots])):
        if not values or len(set(values)) != len(values):
            listed = ", ".join(map(str, values)) or "none"
            raise ConfigError(f"expected at least one {what}, each once, got {listed}")
    if seeds < 1:
        raise ConfigError(f"expected at least one seed, got {seeds}")


def check_split(split: str, data: Path, there: Collection[str]) -> None:
    """Refuse to score on a split that episodes are drawn from, or that the data do not have.

    Args:
        split: the name given.
        data: where the data lie, for the message.
        there: the splits they have.

    Raises:
        ConfigError: it is the train split.
        DataError: there is no such split.
    """
    if split == "train":
        raise ConfigError("expected a split to score on that no episode is drawn from, got 'train': try 'test'")
    if split not in there:
        raise DataError(
            f"{data} has no {split!r} split to score on, only {', '.join(map(repr, there))}: "
            "add one, or name another with --split"
        )


def check_folder(out: Path) -> None:
    """Refuse, before any work is done, a folder that holds something else.

    Raises:
        ConfigError: naming the folder.
    """
    ours = any((out / name).is_dir() for name in (CELLS, TUNING))
    if out.exists() and not (out.is_dir() and (ours or not any(out.iterdir()))):
        raise ConfigError(f"{out} exists and holds no comparison, so it is not touched: choose another --out")


def shots_label(shots: int | None) -> int | str:
    """Shots as they are shown: None is `all`."""
    return "all" if shots is None else shots

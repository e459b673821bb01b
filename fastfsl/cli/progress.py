"""Progress on stderr, so that stdout stays clean for --json: bars on a terminal, a line per stage elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastfsl.cli.output import stderr, stdout_kept_clean, warn

# The stage of the imports that take seconds.
LOADING = "loading torch"
# Between two lines about a stage that goes on.
_EVERY_SECONDS = 30.0

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


class ProgressReporter(Protocol):
    """Hears of stages by name, and of what the user should know."""

    def stage(self, name: str, done: int, total: int | None) -> None:
        """`done` of `total` units of the stage `name` are finished; None: nobody knows of how many."""

    def warn(self, message: str) -> None:
        """Something the user should know."""


class _Warns:
    """Warnings on stderr, and no progress."""

    def stage(self, name: str, done: int, total: int | None) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Something the user should know."""
        warn(message)


class BarReporter(_Warns):
    """Shows one bar per stage.

    Args:
        progress: where the bars are.
        overall: the stage that all others are parts of, if there is one: the others then take turns on one bar.
    """

    def __init__(self, progress: Progress, overall: str | None = None) -> None:
        self._progress = progress
        self._overall = overall
        self._tasks: dict[str, TaskID] = {}

    def stage(self, name: str, done: int, total: int | None) -> None:
        """`done` of `total` units of the stage `name` are finished; None: nobody knows of how many."""
        bar = name if self._overall in {None, name} else "parts"
        if bar not in self._tasks:
            self._tasks[bar] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[bar], description=name, completed=done, total=total)


class LineReporter(_Warns):
    """Writes a line when a stage begins, when it ends with its seconds, and now and then between.

    Args:
        overall: the stage that all others are parts of, if there is one: only that one is told of.
    """

    def __init__(self, overall: str | None = None) -> None:
        self._overall = overall
        self._name: str | None = None
        self._began = self._told = 0.0

    def stage(self, name: str, done: int, total: int | None) -> None:
        """`done` of `total` units of the stage `name` are finished; None: nobody knows of how many."""
        if self._overall not in {None, name}:
            return
        now = time.monotonic()
        if name != self._name:
            self.end()
            self._name, self._began, self._told = name, now, now
            self._line(f"{name} ..." if done < (total or done + 1) else name)
            if total is not None and done >= total:
                self._name = None
        elif total is not None and done >= total:
            self.end(done)
        elif now - self._told >= _EVERY_SECONDS:
            self._told = now
            self._line(f"{name}: {done}{'' if total is None else f' of {total}'}, {now - self._began:.0f} s")

    def end(self, count: int = 0) -> None:
        """The stage that is going on, if any, has ended; it may do so without a word, by the next one's beginning."""
        if self._name is not None:
            counted = f" {count}" if count > 1 else ""
            self._line(f"{self._name}:{counted} done in {time.monotonic() - self._began:.1f} s")
            self._name = None

    def _line(self, words: str) -> None:
        stderr().print(Text(words), soft_wrap=True)


@contextmanager
def silenced(*, quiet: bool) -> Iterator[None]:
    """Whether stages are kept to ourselves while the block runs."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def one_step(reporter: ProgressReporter, name: str) -> Iterator[None]:
    """A stage that is over when the block is."""
    reporter.stage(name, 0, 1)
    yield
    reporter.stage(name, 1, 1)


@contextmanager
def reporting(overall: str | None = None) -> Iterator[ProgressReporter]:
    """A reporter on stderr while the block runs; what libraries print goes there too. Bars are gone after it.

    Args:
        overall: as the reporters have it.
    """
    with stdout_kept_clean():
        if _quiet.get():
            yield _Warns()
        elif stderr().is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=stderr(), transient=True) as progress:
                yield BarReporter(progress, overall)
        else:
            lines = LineReporter(overall)
            yield lines
            lines.end()

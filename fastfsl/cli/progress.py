"""Progress bars and warnings on stderr, so that stdout stays clean for --json."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastfsl.cli.output import stderr, stdout_kept_clean, warn


class ProgressReporter:
    """Shows one bar a stage; hears of stages by name."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def stage(self, name: str, done: int, total: int) -> None:
        """`done` of `total` units of the stage `name` are finished."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)

    def warn(self, message: str) -> None:
        """Something the user should know."""
        warn(message)


@contextmanager
def reporting() -> Iterator[ProgressReporter]:
    """A reporter whose bars are on stderr while the block runs, and gone after it; so is what libraries print."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with stdout_kept_clean(), Progress(*columns, console=stderr(), transient=True) as progress:
        yield ProgressReporter(progress)

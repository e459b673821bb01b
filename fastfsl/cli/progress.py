"""Progress bars and warnings on stderr, so that stdout stays clean for --json."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastfsl.cli.output import stderr, stdout_kept_clean, warn


class ProgressReporter:
    """Shows one bar a stage; hears of stages by name.

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

    def warn(self, message: str) -> None:
        """Something the user should know."""
        warn(message)


@contextmanager
def reporting(overall: str | None = None) -> Iterator[ProgressReporter]:
    """A reporter whose bars are on stderr while the block runs, and gone after it; so is what libraries print.

    Args:
        overall: as `ProgressReporter` has it.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with stdout_kept_clean(), Progress(*columns, console=stderr(), transient=True) as progress:
        yield ProgressReporter(progress, overall)

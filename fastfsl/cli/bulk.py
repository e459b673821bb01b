"""Rows of many predictions in a file that is complete, or can be continued.

While a run lasts its rows are in ``OUTPUT.partial/rows.jsonl``, one JSON object a line, and OUTPUT does not exist. When
the last row is there they become OUTPUT: the same file under its own name, or the same rows in Parquet. A run that ends
before, for whatever reason, leaves its rows, and a second one continues after the last whole batch: batches, and so the
numbers in the file, are those of a run that was never interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter, deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastfsl.cli.parquet import check_parquet, count_parquet, write_parquet
from fastfsl.errors import ConfigError, DataError
from fastfsl.files import staged_file
from fastfsl.leftovers import is_leftover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from fastfsl.runtime import Classifier, Prediction

SUFFIXES = (".jsonl", ".parquet")
_ROWS, _SETTINGS = "rows.jsonl", "settings.json"
# Images between two updates of the progress bar.
_STEP = 32


class BulkOutput:
    """The output of one run.

    Args:
        path: FILE.jsonl or FILE.parquet.
        resume: continue what an interrupted run left, or begin.
        force: replace what is there.

    Raises:
        ConfigError: the output or an interrupted run is in the way, the name has another ending, or pyarrow is needed
            and not installed.
    """

    def __init__(self, path: Path, *, resume: bool = False, force: bool = False) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self._resume = resume
        if resume and force:
            raise ConfigError("--resume continues an interrupted run and --force discards it: pass one of them")
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"--output must end in {' or '.join(SUFFIXES)}, got {path}")
        if path.suffix == ".parquet":
            check_parquet()
        if path.is_dir():
            raise ConfigError(f"--output {path} is a folder; expected the name of a file")
        if os.path.lexists(path) and not resume and not force:
            raise ConfigError(f"--output {path} exists; choose another name or pass --force")
        if not os.path.lexists(self.partial):
            return
        names = {file.name for file in self.partial.iterdir()} if self.partial.is_dir() else {"a file"}
        names = {name for name in names if not is_leftover(name)}  # of a run that was killed
        if not names <= {_ROWS, _SETTINGS}:
            raise ConfigError(f"{self.partial} is in the way and is no interrupted run; choose another --output")
        if not resume and not force:
            raise ConfigError(
                f"an interrupted run left {self.partial}; pass --resume to continue it, or --force to begin anew"
            )

    @property
    def complete(self) -> bool:
        """Whether the output is there, and no interrupted run that was to replace it."""
        return os.path.lexists(self.path) and not os.path.lexists(self.partial / _ROWS)

    def counts(self) -> Counts:
        """Of a complete output, as of a run that had nothing left to do.

        Raises:
            DataError: it holds no rows of predictions.
        """
        try:
            if self.path.suffix == ".parquet":
                images, errors = count_parquet(self.path)
            else:
                with self.path.open("rb") as file:
                    failed = Counter("error" in _row(line) for line in file)
                images, errors = failed.total(), failed[True]
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.path} holds no rows of predictions; pass --force to replace it") from error
        return Counts(images, errors, images, 0.0)

    @contextmanager
    def rows(self, settings: Mapping[str, Any], batch: int) -> Iterator[Rows]:
        """The rows of an interrupted run, if it is to be continued, and a place for more; then the output.

        An error or Ctrl-C inside the block leaves the rows so that they can be continued.

        Args:
            settings: what the rows depend on besides the images, as JSON values.
            batch: rows computed at once.

        Raises:
            ConfigError: the interrupted run had other settings, another run is writing, or the disk refuses.
        """
        with _writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            file = (self.partial / _ROWS).open("a+b")
        with _closing(file, self.partial):
            _lock(file, self.partial)
            with _writing(self.partial):
                if self._resume:
                    self._check_settings(settings)
                else:
                    file.truncate(0)
                with staged_file(self.partial / _SETTINGS) as staging:
                    staging.write_text(json.dumps(settings), encoding="utf-8")
                rows = Rows(file, batch, self.partial)
            yield rows
            rows.flush()
        with _writing(self.path):
            if self.path.suffix == ".parquet":
                with staged_file(self.path) as staging:
                    write_parquet(self.partial / _ROWS, staging)
            else:
                (self.partial / _ROWS).replace(self.path)
            shutil.rmtree(self.partial)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        file = self.partial / _SETTINGS
        if not file.exists():  # the run was interrupted before its first row
            return
        try:
            kept = json.loads(file.read_bytes())
            differences = [
                f"{name}={kept[name]!r} (now {value!r})" for name, value in settings.items() if kept[name] != value
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{file} is damaged; pass --force to begin anew") from error
        if differences:
            raise ConfigError(
                f"{self.partial} was begun with {', '.join(differences)}; pass the same bundle and options, or --force "
                "to begin anew"
            )


class Rows:
    """Rows of a run, in the order of its images.

    Args:
        file: open for reading and appending.
        batch: rows computed at once: of an interrupted run whole batches are kept.
        where: what messages call it.
    """

    def __init__(self, file: BinaryIO, batch: int, where: Path) -> None:
        self._file = file
        self._batch = batch
        self._where = where
        self.kept = self._keep_whole_batches()
        self.count = self.kept

    def old(self) -> Iterator[dict[str, Any]]:
        """The rows that are there already; to be read before any is added.

        Raises:
            DataError: one of them is damaged.
        """
        self._file.seek(0)
        for number in range(1, self.kept + 1):
            try:
                row = _row(self._file.readline())
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{self._where}: row {number} is damaged; pass --force to begin anew") from error
            yield row

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row."""
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:  # a file's name that is no text
            line = json.dumps(row, allow_nan=False).encode()
        with _writing(self._where):
            self._file.write(line + b"\n")
        self.count += 1
        if self.count % self._batch == 0:
            with _writing(self._where):
                self._file.flush()  # a process that is killed now loses none of these

    def flush(self) -> None:
        """See to it that the rows are on the disk."""
        with _writing(self._where):
            self._file.flush()
            os.fsync(self._file.fileno())

    def _keep_whole_batches(self) -> int:
        self._file.seek(0)
        kept = kept_bytes = end = 0
        for count, line in enumerate(self._file, start=1):
            end += len(line)
            if count % self._batch == 0 and line.endswith(b"\n"):
                kept, kept_bytes = count, end
        self._file.truncate(kept_bytes)
        return kept


class Counts(NamedTuple):
    """What a run did.

    Args:
        images: rows in the output.
        errors: of them, images that could not be read.
        kept: of the rows, those of an interrupted run.
        seconds: for the others.
    """

    images: int
    errors: int
    kept: int
    seconds: float

    @property
    def rate(self) -> float:
        """Images a second; 0 if there were none left."""
        return (self.images - self.kept) / self.seconds if self.seconds else 0.0


def classify(
    classifier: Classifier,
    images: Iterable[Path],
    rows: Rows,
    *,
    top_k: int,
    on_error: Literal["raise", "mark"],
    progress: Callable[[int], None],
) -> Counts:
    """Add the rows of the images that have none yet.

    Args:
        classifier: computes them.
        images: all of them, those of an interrupted run first.
        rows: where they go.
        top_k: classes in a row.
        on_error: what an image that cannot be read does: end the run, or become a row with its error.
        progress: is told now and then how many images are done.

    Raises:
        DataError: the images are not those of the interrupted run, or one ends the run.
    """
    source = iter(images)
    errors = 0
    for number, old in enumerate(rows.old(), start=1):
        image = next(source, None)
        if image is None or str(image) != old["input"]:
            raise DataError(
                f"image {number} of the interrupted run was {old['input']}, now it is {image or 'missing'}; pass the "
                "same images in the same order, or --force to begin anew"
            )
        errors += "error" in old
    waiting: deque[Path] = deque()

    def remembered() -> Iterator[Path]:
        for image in source:
            waiting.append(image)
            yield image

    progress(rows.count)
    started = time.perf_counter()
    for prediction in classifier.stream(remembered(), top_k=top_k, on_error=on_error):
        rows.add(row_of(waiting.popleft(), prediction))
        errors += prediction.error is not None
        if rows.count % _STEP == 0:
            progress(rows.count)
    return Counts(rows.count, errors, rows.kept, time.perf_counter() - started)


def row_of(file: Path, prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON values: input, labels, probabilities and known, or input and error."""
    if prediction.error is not None:
        return {"input": str(file), "error": prediction.error}
    return {
        "input": str(file),
        "labels": list(prediction.labels),
        "probabilities": list(prediction.probabilities),
        "known": prediction.known,
    }


def _row(line: bytes) -> dict[str, Any]:
    """One line of a file; ValueError, TypeError or KeyError if it is none of ours."""
    row: dict[str, Any] = json.loads(line)
    row["input"]
    return row


@contextmanager
def _closing(file: BinaryIO, path: Path) -> Iterator[None]:
    """Close the file in the end. After an error it may fail once more to write what is buffered; the first one counts.

    A row that is there in part then is no whole batch, and is written again by the run that goes on.
    """
    try:
        yield
    except BaseException:
        with suppress(OSError):
            file.close()
        raise
    with _writing(path):
        file.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; what is there can be continued with --resume"
        ) from error


def _lock(file: BinaryIO, where: Path) -> None:
    """Two runs that append to one file would mix their rows."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another run is writing to {where}; wait for it, or choose another --output") from error

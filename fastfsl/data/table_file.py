"""Columns of a table in a file: CSV, TSV, JSON lines, a JSON list of objects, Parquet."""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfsl.data.walk import IMAGE_EXTENSIONS
from fastfsl.errors import ConfigError, DataError, resource_error
from fastfsl.images import HEIF_ENDINGS

TEXT_ENDINGS = (".csv", ".tsv", ".tab", ".txt")
LINES_ENDINGS = (".jsonl", ".ndjson")
PARQUET_ENDINGS = (".parquet", ".pq")
TABLE_ENDINGS = (*TEXT_ENDINGS, *LINES_ENDINGS, *PARQUET_ENDINGS)

_DELIMITERS = ("\t", ",", ";", "|")
# Byte order marks, the longer before the shorter that begins alike.
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# Of a text table's first bytes.
_SAMPLE_BYTES = 2**16
# Characters in which a JSON file shows what it is.
_BEGINNING = 256


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        path: the file.
        columns: values by name, in the file's order; of a table without a header the names are "0", "1", ...
        lines: where each row stands in the file, counted from 1, or its number where there are no lines.
    """

    path: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lines)


def read_table_file(path: Path) -> Table:
    """Read all columns of a table; its ending says in which format it is.

    Raises:
        DataError: it cannot be read, or holds no rows.
        ConfigError: it is a Parquet file and pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in PARQUET_ENDINGS:
            table = _read_parquet(path)
        elif suffix in (*LINES_ENDINGS, ".json"):
            table = _read_objects(path, whole=suffix == ".json")
        else:
            table = _read_text(path)
    except OSError as error:
        raise resource_error(error, f"read {path}") or DataError(
            f"{path} cannot be read: {error.strerror or error}"
        ) from error
    if not len(table):
        raise DataError(f"{path} has no rows: expected one per image, with its path and its label")
    return table


def is_list_of_objects(path: Path) -> bool:
    """Whether a JSON file begins as a list of objects, one per image; False if it cannot be read."""
    try:
        with path.open(encoding=_encoding(path)) as file:
            return re.match(r"\s*\[\s*\{", file.read(_BEGINNING)) is not None
    except (OSError, ValueError):
        return False


def looks_like_image(text: object) -> bool:
    """Whether it ends as the name of an image file does."""
    return isinstance(text, str) and Path(text.strip()).suffix.lower() in IMAGE_EXTENSIONS.union(HEIF_ENDINGS)


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(4)
    return next((encoding for mark, encoding in _MARKS if first.startswith(mark)), "utf-8-sig")


def _read_text(path: Path) -> Table:
    try:
        with path.open(encoding=_encoding(path), newline="") as file:
            sample = file.read(_SAMPLE_BYTES)
            file.seek(0)
            rows = csv.reader(file, delimiter=_delimiter(path, sample), strict=True)
            return _from_rows(path, ((rows.line_num, row) for row in rows))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as CSV UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a table in CSV ({error})") from error


def _delimiter(path: Path, sample: str) -> str:
    """What separates the cells of the first line that holds something."""
    if path.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    first = next((line for line in sample.splitlines() if line.strip()), "")
    outside = "".join(first.split('"')[::2])
    return max(_DELIMITERS, key=outside.count) if any(map(outside.count, _DELIMITERS)) else ","


def _from_rows(path: Path, rows: Iterable[tuple[int, list[str]]]) -> Table:
    names: list[str] = []
    cells: list[list[str]] = []
    lines: list[int] = []
    for line, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if not names:
            if any(map(looks_like_image, row)):  # no header: this is the first image
                names = [str(number) for number in range(len(row))]
            else:
                names = _distinct(path, [cell.strip() for cell in row])
                cells = [[] for _ in names]
                continue
            cells = [[] for _ in names]
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(row)} cells, expected {len(names)} ({', '.join(names)}); put quotes around "
                "what holds the separator"
            )
        for column, cell in zip(cells, row, strict=True):
            column.append(cell)
        lines.append(line)
    return Table(path, dict(zip(names, cells, strict=True)), lines)


def _distinct(path: Path, names: list[str]) -> list[str]:
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: two columns are called {repeated[0]!r}: rename one")
    # A frame's index is written without a name.
    return [name or f"column {number}" for number, name in enumerate(names)]


def _read_objects(path: Path, *, whole: bool) -> Table:
    """Objects with the same names: one on each line, or all in one list."""
    try:
        text = path.read_text(encoding=_encoding(path))
        if whole:
            numbered = list(enumerate(json.loads(text), start=1))
        else:
            numbered = [(number, json.loads(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} does not hold JSON objects, one per image ({error})") from error
    return from_objects(path, numbered)


def from_objects(path: Path, numbered: Iterable[tuple[int, Any]]) -> Table:
    """A table of objects, each with its number; what one of them lacks is None.

    Raises:
        DataError: something is no object.
    """
    rows = list(numbered)
    names: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected an object with a path and a label, got {str(row)[:60]!r}")
        names.update(dict.fromkeys(map(str, row)))
    return Table(path, {name: [row.get(name) for _, row in rows] for name in names}, [number for number, _ in rows])


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(f"{path} is a Parquet file: pip install 'fastfsl[parquet]', or save it as CSV") from error
    try:
        file = pq.ParquetFile(path)
        # Images themselves, or arrays, are neither paths nor labels, and may be large.
        simple = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        columns = file.read(columns=simple).to_pydict()
        rows = file.metadata.num_rows
        nested = [field.name for field in file.schema_arrow if field.name not in simple]
    except (pa.ArrowException, OSError) as error:
        raise resource_error(error, f"read {path}") or DataError(
            f"{path} cannot be read as Parquet: {error}"
        ) from error
    if nested and not any(isinstance(value, str) for column in columns.values() for value in column[:1]):
        raise DataError(f"{path}: the column {nested[0]!r} holds images, not paths: write them to files and list those")
    return Table(path, columns, range(1, rows + 1))

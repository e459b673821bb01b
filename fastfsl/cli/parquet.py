"""Rows of predictions from JSON lines to Parquet, one row group in memory at a time."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastfsl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

_ROWS_IN_A_GROUP = 8192


def check_parquet() -> ModuleType:
    """The module pyarrow.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"Parquet needs pyarrow ({error}); pip install 'fastfsl[parquet]', or let --output end in .jsonl"
        ) from error
    module: ModuleType = pa
    return module


def write_parquet(lines: Path, target: Path) -> None:
    """One column a key: input, error (strings), known (bool), labels, probabilities (lists of string and float32)."""
    pa = check_parquet()
    schema = pa.schema(
        [
            ("input", pa.string()),
            ("labels", pa.list_(pa.string())),
            ("probabilities", pa.list_(pa.float32())),
            ("known", pa.bool_()),
            ("error", pa.string()),
        ]
    )
    with lines.open("rb") as file, pa.parquet.ParquetWriter(target, schema) as writer:
        while group := [_text(json.loads(line)) for line in islice(file, _ROWS_IN_A_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def count_parquet(file: Path) -> tuple[int, int]:
    """Rows of a file that `write_parquet` wrote, and how many of them are errors.

    Raises:
        OSError: it cannot be read.
        ValueError: it is another file.
        KeyError: likewise.
    """
    rows = errors = 0
    with check_parquet().parquet.ParquetFile(file) as found:
        found.schema_arrow.field("input")  # a column that is not there is not read, without a word
        for batch in found.iter_batches(columns=["error"]):
            rows += batch.num_rows
            errors += batch.num_rows - batch.column("error").null_count
    return rows, errors


def _text(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the bytes of a file's name that are no text replaced: Parquet's strings are UTF-8."""
    return {
        key: value.encode(errors="surrogateescape").decode(errors="replace") if isinstance(value, str) else value
        for key, value in row.items()
    }

"""What a comparison found, as a document and as a table."""

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastfsl.files import staged_file
from fastfsl.fit.compare.cell import Cell, CellSpec
from fastfsl.fit.compare.leaderboard import Row
from fastfsl.fit.comparison_plan import shots_label

RESULTS, TABLE = "results.json", "results.csv"

# Columns of the table that hold one value.
_PLAIN = [field.name for field in fields(Row) if field.name not in {"vs_best", "class_accuracy"}]


@dataclass(frozen=True)
class Failure:
    """A cell whose method could not be fitted, and why."""

    spec: CellSpec
    error: str


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        rows: the leaderboard; methods over all numbers of shots come last.
        cells: finished cells.
        failures: the others.
        warnings: what the user should know of the data.
        data: path, classes, sizes.
        settings: methods, shots, seeds, device, batch size of the timing, level of the intervals.
        versions: packages at work.
        created: when, UTC.
    """

    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    failures: tuple[Failure, ...]
    warnings: tuple[str, ...]
    data: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    created: str

    def document(self) -> dict[str, Any]:
        """All of it as JSON values; the cells without what has a value for every sample or class."""
        kept = [_place(cell.spec) | cell.model_dump(exclude={"spec", "right", "class_accuracy"}) for cell in self.cells]
        return {
            "format": "fastfsl-comparison",
            "version": 1,
            "data": self.data,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "cells": [*kept, *(_place(failure.spec) | {"error": failure.error} for failure in self.failures)],
            "warnings": list(self.warnings),
            "versions": self.versions,
            "created": self.created,
        }

    def save(self, folder: Path) -> None:
        """Write results.json and results.csv, each whole or not at all.

        Raises:
            ConfigError: a file cannot be written.
        """
        with staged_file(folder / RESULTS) as staging:
            text = json.dumps(self.document(), indent=1, allow_nan=False)
            staging.write_text(text + "\n", encoding="utf-8")
        with staged_file(folder / TABLE) as staging, staging.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*_PLAIN, "vs_best", "vs_best_low", "vs_best_high"])
            for row in self.rows:
                against = row.vs_best
                ends = [None] * 3 if against is None else [against.mean, against.low, against.high]
                writer.writerow([*(getattr(row, name) for name in _PLAIN), *ends])


def _place(spec: CellSpec) -> dict[str, Any]:
    return {"method": spec.method, "shots": shots_label(spec.shots), "seed": spec.seed}

"""Compare the methods on feature files: `python -m benchmarks.compare_features FILE... [--methods a,b] [--force]`.

Cells are kept in runs/, so that an interrupted comparison goes on; whoever changed a method passes --force.
benchmarks/results/compare_NAME.json gets the rows and the settings, without anything by sample or class. Last come the
means over all files.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.conftest import RESULTS, made_with
from fastfsl.fit.compare import Comparison, compare, default_methods
from fastfsl.fit.compare.leaderboard import MEAN
from fastfsl.fit.config import TrainConfig


class _Said:
    """Progress by cell, on stderr."""

    def stage(self, name: str, done: int, total: int) -> None:
        if name == "cells":
            sys.stderr.write(f"\r{done} of {total} cells")

    def warn(self, message: str) -> None:
        sys.stderr.write(f"\nwarning: {message}\n")


def main() -> None:
    """Compare, write, sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--methods", default=",".join(default_methods()), help="with commas")
    parser.add_argument("--shots", default="1,4,16", help="with commas")
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--force", action="store_true", help="compute again the cells that runs/ holds already")
    options = parser.parse_args()
    comparisons = []
    for file in options.files:
        comparison = compare(
            file,
            methods=options.methods.split(","),
            shots=[int(number) for number in options.shots.split(",")],
            seeds=options.seeds,
            out=Path("runs") / f"compare-{file.stem}",
            force=options.force,
            config=TrainConfig(device=options.device),
            reporter=_Said(),
        )
        comparisons.append(comparison)
        sys.stderr.write("\n")
        _write(file.stem, comparison, options)
    _print_means(comparisons)


def _write(name: str, comparison: Comparison, options: argparse.Namespace) -> None:
    document = comparison.document()
    command = (
        f"python -m benchmarks.compare_features {name} --methods {options.methods} --shots {options.shots} "
        f"--seeds {options.seeds} --device {options.device}"
    )
    kept: dict[str, Any] = {
        "data": {key: value for key, value in document["data"].items() if key not in {"path", "class_counts"}},
        "settings": document["settings"],
        "rows": [{key: _rounded(value) for key, value in row.items() if key != "class_accuracy"}
                 for row in document["rows"]],
        "failures": [cell for cell in document["cells"] if "error" in cell],
        "warnings": document["warnings"],
        "made_with": made_with(command),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"compare_{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _print_means(comparisons: list[Comparison]) -> None:
    """By method: mean accuracy over files and shots, largest gap to a cell's best, largest calibration error."""
    rows = [row for comparison in comparisons for row in comparison.rows if row.shots != MEAN]
    print(f"{'method':14} {'mean %':>7} {'gap':>5} {'ECE':>6}  each file, each number of shots")
    for method in comparisons[0].settings["methods"]:
        own = [row for row in rows if row.method == method]
        accuracies = [100 * (row.accuracy_mean or 0.0) for row in own]  # a method that failed has none
        gap = max(0.0 if row.vs_best is None else -100 * row.vs_best.mean for row in own)
        error = max(row.calibration_error_mean or 0.0 for row in own)
        each = " ".join(f"{accuracy:5.1f}" for accuracy in accuracies)
        print(f"{method:14} {statistics.fmean(accuracies):7.2f} {gap:5.2f} {error:6.3f}  {each}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return {key: _rounded(inner) for key, inner in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    main()

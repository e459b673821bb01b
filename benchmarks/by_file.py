"""What measurements over feature files have in common: `python -m benchmarks.NAME FILE... [--shots K] [--seeds N]`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.conftest import RESULTS, made_with


def measure_files(
    name: str, about: str | None, measure: Callable[[Path, list[int], int], dict[str, Any]], *, shots: str, seeds: int
) -> None:
    """Measure every file of the command line, and write benchmarks/results/NAME_FILE.json.

    Args:
        name: the module's, and the start of the results' names.
        about: what --help says.
        measure: gives a file's result, of numbers of images a class and a number of seeds.
        shots: the default of --shots.
        seeds: the default of --seeds.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--shots", default=shots, help="with commas; more than a file has are left out")
    parser.add_argument("--seeds", default=seeds, type=int)
    options = parser.parse_args()
    for file in options.files:
        result = measure(file, [int(number) for number in options.shots.split(",")], options.seeds)
        command = f"python -m benchmarks.{name} {file.stem} --shots {options.shots} --seeds {options.seeds}"
        document = {**result, "made_with": made_with(command)}
        path = RESULTS / f"{name}_{file.stem}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

"""What one section of the GPU suite found, as JSON, rewritten after each row: a run that is cut off keeps its rows."""

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.conftest import made_with


@dataclass(frozen=True)
class Options:
    """How a section is run.

    Args:
        out: folder of the JSON files.
        seconds: what the section may take.
        quick: few and small cases.
        interpret: in Triton's interpreter on the CPU.
        commit: of the sources, where there is no git to ask.
    """

    out: Path
    seconds: float
    quick: bool = False
    interpret: bool = False
    commit: str | None = None

    @property
    def device(self) -> str:
        """Where tensors live."""
        return "cpu" if self.interpret else "cuda"

    def arguments(self) -> dict[str, Any]:
        """The same as JSON, for a process of its own."""
        return {**asdict(self), "out": str(self.out)}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "Options":
        """The inverse of `arguments`."""
        return cls(**{**arguments, "out": Path(arguments["out"])})


class Record:
    """The JSON file `gpu_NAME.json` of a section; `failed` counts the rows that are wrong.

    Args:
        name: of the section.
        what: one line of what is in it.
        options: of the run.
    """

    def __init__(self, name: str, what: str, options: Options) -> None:
        """Write the file, without rows yet."""
        self.path = options.out / f"gpu_{name}.json"
        self._started = time.monotonic()
        self._seconds = options.seconds
        device = "Triton's interpreter, no card" if options.interpret else card_name()
        command = f"python benchmarks/gpu_suite.py --only {name}" + " --quick" * options.quick
        self.document: dict[str, Any] = {
            "what": what,
            "complete": False,
            "dry_run": options.interpret,
            "quick": options.quick,
            "rows": [],
            "not_run": [],
            "made_with": made_with(command, device=device, commit=options.commit),
        }
        self.write()

    def left(self) -> float:
        """Seconds until the section's time is over."""
        return self._seconds - (time.monotonic() - self._started)

    @property
    def failed(self) -> int:
        """Rows whose result is wrong."""
        return sum(row.get("ok") is False for row in self.document["rows"])

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row; one with `ok` False is a wrong result."""
        self.document["rows"].append(dict(row))
        self.write()

    def skip(self, what: str, reason: str) -> None:
        """Say that something was not run."""
        self.document["not_run"].append({"what": what, "reason": reason})
        self.write()

    def keep(self, **values: Any) -> None:
        """Set other values of the document."""
        self.document.update(values)
        self.write()

    def finish(self) -> None:
        """Say that every case was reached."""
        self.keep(complete=True, seconds=round(time.monotonic() - self._started, 1))

    def write(self) -> None:
        """Replace the file."""
        staged = self.path.with_suffix(".part")
        staged.write_text(json.dumps(self.document, indent=2) + "\n", encoding="utf-8")
        staged.replace(self.path)


def card_name() -> str:
    """Name, multiprocessors and driver of the card."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors, driver {driver_version()}"


def driver_version() -> str:
    """Of the card's driver, as in 580.159.04."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (said.stdout.splitlines() or ["unknown"])[0].strip()

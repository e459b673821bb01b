"""All that a card is needed for, in one command: `python benchmarks/gpu_suite.py --out DIR`, under 9 minutes.

It checks every kernel and dtype against float64, times the flow, the Gram loss and the compiled kernels without torch,
repeats runs bit for bit, and looks for races and stray accesses. DIR gets one JSON file a section, to be copied into
benchmarks/results/, where tables.py finds them. Each section is a process of its own with a time of its own, so that a
fault of one, or a kernel that never ends, leaves the others their results. The exit code is 1 for wrong results alone:
a figure that misses its bound is reported, no error. It is 2 where nothing ran. fastfsl need not be installed.

    --interpret --quick     the same code in Triton's interpreter, small, on a machine without a card
    --only sweep            which tile is best by number of rows, to set kernels/tiles.py from
"""

import argparse
import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "typetree"  # fastfsl.kernels and fastfsl.export where an installation would have them


@dataclass(frozen=True)
class Section:
    """A part of the suite.

    Args:
        module: in this folder; its `run(options)` writes the section's JSON.
        seconds: what it may take; time that earlier sections left is added.
        judges: its rows can be wrong, and then the suite fails.
        interpreted: it is also run without a card.
    """

    module: str
    seconds: float
    judges: bool
    interpreted: bool = True


# In the order of worth: what a time limit cuts off is cut off at the end.
SECTIONS = {
    "correctness": Section("gpu_correctness", 150, judges=True),
    "flow": Section("gpu_flow", 120, judges=False),
    "gram": Section("gpu_gram", 60, judges=False),
    "aot": Section("gpu_aot", 70, judges=True, interpreted=False),
    "determinism": Section("gpu_determinism", 40, judges=True),
    "sanitizer": Section("gpu_sanitizer", 70, judges=True, interpreted=False),
    "sweep": Section("gpu_sweep", 240, judges=False),
}
DEFAULT = tuple(name for name in SECTIONS if name != "sweep")
# Of these the compiled versions of torch are prepared beside the correctness section, which is not timed.
COMPILED = ("flow", "gram")
NO_CARD = 3  # exit code of a section
GRACE = 5.0  # seconds past its own time that a section is given to end by itself


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--only", type=_names, default=DEFAULT, help=f"with commas, of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--interpret", action="store_true", help="Triton's interpreter, on the CPU")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all sections together")
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", choices=COMPILED, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main() -> int:
    """Run the sections, each in a process of its own, and say what they found."""
    chosen = arguments()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.section or chosen.prepare:
        _run_here(chosen)
        return 0
    from benchmarks.gpu_summary import summary

    end = time.monotonic() + chosen.seconds
    prepared = _prepare(chosen)
    outcomes: dict[str, str] = {}
    for index, name in enumerate(chosen.only):
        later = sum(SECTIONS[other].seconds for other in chosen.only[index + 1 :])
        left = end - time.monotonic()
        outcomes[name] = _run_section(chosen, name, min(left, max(left - later, SECTIONS[name].seconds)) - GRACE)
        _end(prepared, wait=min(30.0, end - time.monotonic()))
        prepared = []
    text, wrong = summary(chosen.out, outcomes, {name for name in chosen.only if SECTIONS[name].judges})
    print(text, flush=True)
    if all(outcome.startswith("not run") for outcome in outcomes.values()):
        return 2
    return int(wrong)


def _run_here(chosen: argparse.Namespace) -> None:
    import torch

    from benchmarks.gpu_record import Options

    if not chosen.interpret and not torch.cuda.is_available():
        sys.exit(NO_CARD)
    options = Options(chosen.out, chosen.seconds, chosen.quick, chosen.interpret, chosen.commit)
    module: Any = importlib.import_module(f"benchmarks.{SECTIONS[chosen.section or chosen.prepare].module}")
    (module.run if chosen.section else module.prepare)(options)


def _run_section(chosen: argparse.Namespace, name: str, seconds: float) -> str:
    """How the section ended: "done", or what kept it from it."""
    if chosen.interpret and not SECTIONS[name].interpreted:
        return "not run: no card"
    if seconds < 10.0:
        return "not run: no time left"
    print(f"=== {name}, at most {seconds:.0f} s", flush=True)
    (chosen.out / f"gpu_{name}.json").unlink(missing_ok=True)
    process = _start(chosen, ["--section", name], seconds)
    try:
        code = process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds + GRACE:.0f} s"
    finally:
        _end([process], wait=0.0)
    return {0: "done", NO_CARD: "not run: no card"}.get(code, f"ended with code {code}")


def _prepare(chosen: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Processes that fill the compiler's cache on disk, so that compiling takes no time of the timed sections."""
    wanted = "correctness" in chosen.only and not chosen.interpret
    names = [name for name in COMPILED if name in chosen.only and wanted]
    return [_start(chosen, ["--prepare", name], chosen.seconds) for name in names]


def _start(chosen: argparse.Namespace, what: list[str], seconds: float) -> subprocess.Popen[bytes]:
    flags = ["--quick"] * chosen.quick + ["--interpret"] * chosen.interpret
    flags += ["--commit", chosen.commit] if chosen.commit else []
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(chosen.out), "--seconds", f"{seconds:.0f}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if chosen.interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen([*command, *flags, *what], env=environment, process_group=0)


def _end(processes: Sequence[subprocess.Popen[bytes]], wait: float) -> None:
    """Wait for processes, and then end them with all that they started."""
    end = time.monotonic() + wait
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(end - time.monotonic(), 0.0))
        with contextlib.suppress(ProcessLookupError):  # what it leaves behind keeps the card busy
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    return tuple(name for name in SECTIONS if name in names)


def _use_checkout() -> None:
    """Let `import fastfsl` find this checkout, whatever is installed, here and in processes started from here."""
    if os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(TREE):
        runpy.run_path(str(ROOT / ".ci" / "typetree.py"), run_name="__main__")
        sys.path.insert(0, str(TREE))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TREE), os.environ.get("PYTHONPATH", "")]))


if __name__ == "__main__":
    _use_checkout()
    sys.exit(main())

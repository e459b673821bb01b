"""Results worth keeping: `pytest benchmarks --save-results` writes them to benchmarks/results/ as JSON.

torch runs as it does by default. With OMP_WAIT_POLICY=PASSIVE its threads would leave the cores to the next side at
once, but small operators in eager mode would take longer, and look worse beside ours than they are.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastfsl.runtime.processor import processor

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("fastfsl", "torch", "triton", "open_clip_torch", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy")


def pytest_addoption(parser):
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/*.json")
    parser.addoption("--features", metavar="FILE", help="bench_training: a feature file instead of drawn features")
    parser.addoption("--photos", metavar="FOLDER", help="bench_jpeg: photographs (JPEG) instead of drawn ones")
    parser.addoption("--quick", action="store_true", help="bench_training: a trial run, small and not to be kept")


def pytest_configure(config):
    if config.getoption("--quick") and config.getoption("--save-results"):
        raise pytest.UsageError("--quick is for trial runs: its results are not to be kept, drop --save-results")


def pytest_sessionfinish(session):
    if session.config.getoption("--save-results"):
        from benchmarks.latency_report import write_page  # only now: it is not needed to collect

        write_page()


@pytest.fixture
def record(request) -> Callable[[str, dict[str, Any]], None]:
    """Keeps a result under a name, with device, versions and commit, if --save-results was given."""

    def keep(name: str, result: dict[str, Any]) -> None:
        print(f"\n{name}: {json.dumps(result)}")
        if request.config.getoption("--save-results"):
            given = {name: request.config.getoption(name) for name in ("--features", "--photos")}
            chosen = "".join(f" {name} {Path(value).name}" for name, value in given.items() if value is not None)
            command = f"pytest {request.node.nodeid}{chosen} --save-results"
            document = {**result, "made_with": made_with(command)}
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    return keep


class Demo(NamedTuple):
    """The demo of one seed: its folder, with data, run and bundle, and the figures of its table."""

    folder: Path
    document: dict[str, Any]


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Demo:
    """Trained once for all benchmarks that want a bundle of today's sources."""
    from fastfsl.cli.demo import demo_config, run_demo  # only now: the record needs no torch
    from fastfsl.fit.train import SilentReporter

    folder = tmp_path_factory.mktemp("demo")
    return Demo(folder, run_demo(folder, demo_config(16, 0), reporter=SilentReporter()))


def made_with(command: str, *, device: str | None = None, commit: str | None = None) -> dict[str, Any]:
    """What a figure depends on besides the code: device, the processor's instructions, versions, commit, day.

    Args:
        command: what was run.
        device: the card, if it was not the CPU.
        commit: of the sources, where there is no git to ask.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": command,
        "device": device or f"{_cpu()}, {os.cpu_count()} cores",
        "instructions": processor()["instructions"],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit or _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _commit() -> str:
    try:
        said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return said.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

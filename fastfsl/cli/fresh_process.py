"""A bundle in processes of its own: how long until the first prediction, and how much memory."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfsl.errors import FastFSLError

_ROUNDS = 3
_LIMIT_SECONDS = 600
_BATCHES = 3

# What a service does when it starts. The peak is that of this program's own memory: what getrusage gives would count
# the process that started it.
_PROGRAM = """
import json, sys, time
bundle, options, inputs, batch, batches = json.load(sys.stdin)
def memory(name):
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(name + ":"))
    except (OSError, StopIteration):
        return None
clock = [time.perf_counter()]
import onnxruntime
clock.append(time.perf_counter())
from fastfsl.runtime import Classifier
clock.append(time.perf_counter())
classifier = Classifier.load(bundle, **options)
clock.append(time.perf_counter())
loaded = memory("VmRSS")
predict = classifier.predict if isinstance(inputs[0], str) else classifier.classify_features
predict(inputs[:1])
clock.append(time.perf_counter())
for _ in range(batches):
    predict(inputs[:batch])
names = ("import_onnxruntime_s", "import_runtime_s", "load_s", "first_prediction_s")
seconds = dict(zip(names, (after - before for before, after in zip(clock, clock[1:]))))
print(json.dumps({**seconds, "loaded_bytes": loaded, "peak_bytes": memory("VmHWM")}))
"""


def start_up(
    bundle: Path, options: Mapping[str, Any], inputs: Sequence[str] | Sequence[Sequence[float]], batch: int
) -> dict[str, Any]:
    """Median times of a start and its memory, in fresh processes.

    Args:
        bundle: the bundle's folder.
        options: of `Classifier.load`.
        inputs: paths of images, or features.
        batch: how many of them the peak of memory is for.

    Returns:
        Seconds of `import onnxruntime`, of `import fastfsl.runtime` after it, of loading and of the first prediction,
        `beyond_onnxruntime_s` (all but the first), and bytes after loading and at the peak (None where the system
        does not tell).

    Raises:
        FastFSLError: such a process failed.
    """
    argument = json.dumps([str(bundle.absolute()), dict(options), list(inputs), batch, _BATCHES])
    found = [_start(argument) for _ in range(_ROUNDS)]
    middle: dict[str, Any] = {
        name: None if any(run[name] is None for run in found) else statistics.median(run[name] for run in found)
        for name in found[0]
    }
    beyond = ("import_runtime_s", "load_s", "first_prediction_s")
    middle["beyond_onnxruntime_s"] = statistics.median(sum(run[name] for name in beyond) for run in found)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in middle.items()}


def _start(argument: str) -> dict[str, Any]:
    try:
        # As an argument, the features of a batch would be too long for the system.
        done = subprocess.run(  # noqa: S603  # this interpreter, a constant program
            [sys.executable, "-c", _PROGRAM],
            input=argument,
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FastFSLError(
            f"a fresh process took more than {_LIMIT_SECONDS} s for {_BATCHES} batches; pass a smaller --batch"
        ) from error
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise FastFSLError(f"a fresh process could not use the bundle: {reason[0]}; run `fastfsl doctor`")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document

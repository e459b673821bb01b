"""The demo's bundle as `fastfsl bench` measures it, and what it costs to import, to start and to hold."""

import json
import statistics
import subprocess
import sys

import numpy as np
import pytest

from fastfsl.cli.bench import run_bench
from fastfsl.runtime import Classifier

SIZES, SECONDS = (1, 8, 32), 4.0
# Of `import fastfsl.runtime`, which imports onnxruntime too.
TIMES_ONNXRUNTIME_AT_MOST, IMPORTS = 2.0, 9
# Past the warm-up the memory may grow by this factor, and the whole may never hold more than this.
PREDICTIONS, WARM_UP, GROWTH_AT_MOST, MEGABYTES_AT_MOST = 1000, 200, 1.05, 300
OPTIONS = {"device": "cpu", "num_threads": 2, "max_batch": 32, "flow": "auto", "preprocess": "exact"}

MEMORY_PROGRAM = """
import json, sys
from fastfsl.runtime import Classifier
bundle, scans, warm_up, count = json.loads(sys.argv[1])
def memory(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name + ":"))
classifier = Classifier.load(bundle, device="cpu", num_threads=2)
found = {"loaded": memory("VmRSS")}
for index in range(count):
    if index == warm_up:
        found["warm"] = memory("VmRSS")
    classifier.predict(scans[index % len(scans)])
print(json.dumps({**found, "after": memory("VmRSS"), "peak": memory("VmHWM")}))
"""


def bench_bundle_latency(benchmark, record, demo):
    bundle, scans = demo.folder / "bundle", demo.folder / "data" / "test"
    document = benchmark.pedantic(lambda: run_bench(bundle, SIZES, SECONDS, OPTIONS, scans), rounds=1)
    benchmark.extra_info.update(rows=document["rows"], provider=document["rows"][0]["provider"])
    described = document["described"]
    record(
        "bundle",
        {
            "what": "fastfsl bench on the demo's bundle and test scans, two threads",
            **{name: document[name] for name in ("rows", "stages", "cold_start", "memory", "processor")},
            "size_bytes": sum(described["files"].values()),
        },
    )
    files = sorted(scans.rglob("*.png"))
    with Classifier.load(bundle, device="cpu") as classifier:
        right = [p.label == file.parent.name for p, file in zip(classifier.predict(files), files, strict=True)]
    assert np.mean(right) == pytest.approx(demo.document["rows"][1]["accuracy"], abs=1e-3)
    rows = {row["batch"]: row for row in document["rows"]}
    assert all(row["provider"] == "CPUExecutionProvider" for row in rows.values())
    assert rows[32]["images_per_second"] > rows[1]["images_per_second"]
    assert document["cold_start"]["beyond_onnxruntime_s"] <= 1.0


def bench_import(benchmark, record):
    def seconds(module: str) -> float:
        code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    pairs = [(seconds("fastfsl.runtime"), seconds("onnxruntime")) for _ in range(IMPORTS)]
    runtime, onnxruntime = (statistics.median(column) for column in zip(*pairs, strict=True))
    benchmark.pedantic(lambda: seconds("fastfsl.runtime"), rounds=1)
    record(
        "import",
        {
            "what": "import fastfsl.runtime against import onnxruntime, fresh interpreters in turn, medians",
            "runtime_s": round(runtime, 4),
            "onnxruntime_s": round(onnxruntime, 4),
            "times": round(runtime / onnxruntime, 3),
        },
    )
    assert runtime <= TIMES_ONNXRUNTIME_AT_MOST * onnxruntime


def bench_memory(benchmark, record, demo):
    files = [str(file) for file in sorted((demo.folder / "data" / "test").rglob("*.png"))]
    argument = json.dumps([str(demo.folder / "bundle"), files, WARM_UP, PREDICTIONS])

    def predict() -> dict[str, int]:
        command = [sys.executable, "-c", MEMORY_PROGRAM, argument]
        found: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return found

    found = benchmark.pedantic(predict, rounds=1)
    record(
        "memory",
        {
            "what": f"resident memory of a process with the demo's bundle, {PREDICTIONS} predictions, one by one",
            **{f"{name}_bytes": value for name, value in found.items()},
        },
    )
    assert found["after"] <= GROWTH_AT_MOST * found["warm"]
    assert found["peak"] <= MEGABYTES_AT_MOST * 1e6

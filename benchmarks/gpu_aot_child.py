"""Run a bundle's compiled flow where torch and Triton cannot be imported: `gpu_aot_child.py BUNDLE INPUTS TARGET`.

INPUTS (.npz): embeddings `x`, the features and logits in float64, `exact` and `logits`, and the features by
plain torch in the same dtype. TARGET is what the card has to take. JSON rows come out on standard output.
"""

import importlib.abc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCKED = ("torch", "triton")
COUNTS = (3, 300, 3000, 5000)  # one of each row class, and no multiple of a tile
REPEATS = 20
BATCHES = (1, 32, 256)
SECONDS, LEAST_ROUNDS = 0.5, 20
MOST_LOGIT_ERROR = 0.5  # of logits up to 100, from 16-bit products


class _Block(importlib.abc.MetaPathFinder):
    """Makes some packages look absent."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> None:
        if fullname.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{fullname} is blocked here", name=fullname)


def main(folder: Path, inputs: Path, target: str) -> list[dict[str, Any]]:
    """Load, compare, time."""
    sys.meta_path.insert(0, _Block())
    import numpy as np

    from fastfsl import bundle
    from fastfsl.runtime.cuda_driver import Device, load_driver
    from fastfsl.runtime.cuda_flow import CompiledFlow

    with np.load(inputs, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    x, exact = arrays["x"], arrays["exact"]
    manifest = bundle.read_manifest(folder)
    started = time.perf_counter()
    flow = CompiledFlow.load(folder, manifest, Device(load_driver()))
    flow.prove(x[:8], exact[:8].astype(np.float32))
    ready_seconds = time.perf_counter() - started

    rows: list[dict[str, Any]] = [{"name": "loading", "seconds": ready_seconds}]
    for count in COUNTS:
        distances = [np.linalg.norm(out - exact[:count]) for out in (flow.features(x[:count]), arrays["plain"][:count])]
        times_plain = float(distances[0] / distances[1])
        logits = flow.logits(x[:count])
        logit_error = float(np.abs(logits - arrays["logits"][:count]).max())
        row = {"name": "the bundle's flow", "rows": count, "times_plain": times_plain, "logit_error": logit_error}
        right = times_plain <= float(arrays["most_times_plain"]) and logit_error <= MOST_LOGIT_ERROR
        repeated = all(np.array_equal(flow.logits(x[:count]), logits) for _ in range(REPEATS))
        rows.append({**row, "repeated": repeated, "ok": flow.target == target and right and repeated})
    rows.extend(_latency(flow, np.resize(x, (batch, x.shape[1]))) for batch in BATCHES)
    rows.append(_proof(folder, manifest))
    if loaded := [name for name in BLOCKED if name in sys.modules]:
        raise SystemExit(f"expected no {', '.join(BLOCKED)}, found {loaded}")
    return rows


def _latency(flow: Any, x: Any) -> dict[str, Any]:
    """Embeddings on the host in, logits on the host out, wall clock."""
    for _ in range(5):
        flow.logits(x)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < LEAST_ROUNDS or time.perf_counter() < end:
        start = time.perf_counter()
        flow.logits(x)
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    p95 = times[int(0.95 * len(times))]
    return {"name": "latency", "batch": len(x), "ms": statistics.median(times), "p95_ms": p95, "rounds": len(times)}


def _proof(folder: Path, manifest: Any) -> dict[str, Any]:
    """The flow that a classifier takes, which first compares the kernels with ONNX Runtime on the CPU."""
    from fastfsl import bundle
    from fastfsl.errors import DeviceError
    from fastfsl.runtime.flow_executor import FlowExecutor
    from fastfsl.runtime.session import create_row_session

    graph = bundle.read_file(folder, manifest, bundle.FLOW_GRAPH)
    session = create_row_session(graph, bundle.FLOW_GRAPH, device="cpu")
    try:
        flow = FlowExecutor.open(folder, manifest, session, device="cuda", flow="compiled")
    except DeviceError as error:  # the rows before it are kept
        return {"name": "proof against ONNX Runtime", "ok": False, "error": str(error)}
    return {"name": "proof against ONNX Runtime", **flow.describe(), "ok": True}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))

"""What the lean environment must hold: run by .ci/runtime-test with the interpreter of that environment.

Usage: runtime_check.py DEMO, the folder that `make demo` wrote.
"""

import importlib.util
import statistics
import subprocess
import sys
from pathlib import Path

ABSENT = ("torch", "torchvision", "triton", "onnx", "onnxscript", "open_clip", "sklearn", "scipy", "matplotlib")
UNLOADED = ("PIL", "typer", "rich", "pydantic")
MOST_TIMES_ONNXRUNTIME = 2.0
ROUNDS = 9
IMAGES_A_CLASS = 20
LEAST_ACCURACY = 0.75  # far below what the demo reports, far above what a wrong preprocessing leaves


def import_seconds(module: str) -> float:
    """Seconds that a fresh interpreter takes to import `module`."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main(demo: Path) -> str | None:
    """Check the environment; returns what is wrong, or None."""
    if present := [name for name in ABSENT if importlib.util.find_spec(name)]:
        return f"expected none of the training packages here, got {present}"

    from fastfsl.runtime import Classifier

    if loaded := [name for name in UNLOADED if name in sys.modules]:
        return f"expected `import fastfsl.runtime` to leave {UNLOADED} alone, got {loaded}"

    pairs = [(import_seconds("fastfsl.runtime"), import_seconds("onnxruntime")) for _ in range(ROUNDS)]
    runtime, onnxruntime = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = runtime / onnxruntime
    print(f"import fastfsl.runtime {runtime:.3f} s, onnxruntime {onnxruntime:.3f} s: {ratio:.2f} times")
    if ratio > MOST_TIMES_ONNXRUNTIME:
        return f"expected at most {MOST_TIMES_ONNXRUNTIME} times the import of onnxruntime, got {ratio:.2f}"

    folders = sorted((demo / "data" / "test").iterdir())
    scans = [scan for folder in folders for scan in sorted(folder.iterdir())[:IMAGES_A_CLASS]]
    predictions = Classifier.load(demo / "bundle", device="cpu").predict(scans)
    right = sum(prediction.label == scan.parent.name for prediction, scan in zip(predictions, scans, strict=True))
    print(f"{right} of {len(scans)} scans right")
    if right < LEAST_ACCURACY * len(scans):
        return f"expected at least {LEAST_ACCURACY:.0%} of the demo's test scans right, got {right} of {len(scans)}"
    if loaded := [name for name in ABSENT if name in sys.modules]:
        return f"expected no training package to be loaded, got {loaded}"
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

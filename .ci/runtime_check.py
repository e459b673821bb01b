"""What the lean environment must hold: run by .ci/runtime-test with the interpreter of that environment.

Usage: runtime_check.py BUNDLE IMAGE. Classifies a drawn digit with BUNDLE and leaves it as IMAGE for the command line.
"""

import importlib.util
import statistics
import subprocess
import sys

ABSENT = ("torch", "torchvision", "triton", "onnx", "onnxscript", "open_clip", "sklearn", "scipy", "matplotlib")
UNLOADED = ("PIL", "typer", "rich", "pydantic")
MOST_TIMES_ONNXRUNTIME = 2.0
ROUNDS = 9


def import_seconds(module: str) -> float:
    """Seconds that a fresh interpreter takes to import `module`."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main(bundle: str, image_path: str) -> str | None:
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

    from PIL import Image, ImageDraw

    image = Image.new("L", (32, 32))
    ImageDraw.Draw(image).line([(8, 6), (22, 6), (12, 26)], fill=255, width=3)
    image.save(image_path)
    classifier = Classifier.load(bundle, device="cpu")
    (prediction,) = classifier.predict([image], top_k=3)
    print("a drawn seven:", *zip(prediction.labels, prediction.probabilities, strict=True))
    if len(prediction.labels) != 3 or not 0 < prediction.probabilities[0] <= 1:
        return f"expected three labels with probabilities, got {prediction}"
    if loaded := [name for name in ABSENT if name in sys.modules]:
        return f"expected no training package to be loaded, got {loaded}"
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

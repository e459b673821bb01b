"""Importing the runtime costs little, and nothing it does not need."""

from __future__ import annotations

import statistics
import subprocess
import sys

HEAVY = {"torch", "triton", "onnx", "onnxruntime", "typer", "rich", "PIL", "sklearn", "scipy", "matplotlib", "pydantic"}


def _import(statement: str) -> tuple[float, set[str]]:
    code = (
        f"import sys, time; start = time.perf_counter(); {statement}; "
        "print(time.perf_counter() - start, *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    return float(seconds), set(modules)


def test_the_runtime_imports_within_twice_onnxruntime():
    runtime, library = [], []
    for _ in range(5):  # in turns, so that a busy machine slows both alike
        runtime.append(_import("import fastfsl.runtime")[0])
        library.append(_import("import onnxruntime")[0])
    assert statistics.median(runtime) <= 2 * statistics.median(library)


def test_the_runtime_imports_nothing_heavy():
    assert not HEAVY & _import("import fastfsl.runtime")[1]


def test_classifying_features_never_imports_pillow_or_training_packages(feature_classifier):
    bundle = feature_classifier.describe()["bundle"]
    code = (
        "from fastfsl.runtime import Classifier; "
        f"Classifier.load({bundle!r}, device='cpu', num_threads=1).classify_features([[1.0] * 6])"
    )
    assert not (HEAVY - {"onnxruntime"}) & _import(code)[1]


def test_classifying_images_never_imports_training_packages(classifier, photos):
    code = (
        "from fastfsl.runtime import Classifier; "
        f"Classifier.load({classifier.describe()['bundle']!r}, device='cpu', num_threads=1).predict({str(photos[0])!r})"
    )
    assert not (HEAVY - {"onnxruntime", "PIL"}) & _import(code)[1]

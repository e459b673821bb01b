"""What the lean environment does with compiled kernels where there is no card: say so, and use ONNX Runtime.

Usage: compiled_check.py make BUNDLE, in the development environment: a small bundle whose kernels are placeholders,
which nobody loads without a card. compiled_check.py check BUNDLE, in the lean one, cuda-bindings added.
"""

import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ABSENT = ("torch", "triton", "onnx")
FEATURES = np.random.default_rng(0).normal(size=(5, 128))


def make(target: Path) -> None:
    """Write the bundle."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from fastfsl import bundle
    from tests.runtime.compiled_bundle import random_flow, write_compiled

    def write(
        target: Path,
        *,
        flow: bytes,
        add: Callable[[Path], None],
        **fields: object,
    ) -> Path:
        manifest = {"method": "fma", "class_names": list("abcd"), "precision": "fp32", "logit_scale": 20.0}
        nothing: dict[str, Any] = {"versions": {}, "metrics": {}, "parity": {}, "training": {}}
        with bundle.staging_folder(target) as staging:
            (staging / "flow").mkdir()
            (staging / bundle.FLOW_GRAPH).write_bytes(flow)
            add(staging)
            bundle.seal_bundle(staging, {**manifest, **nothing, "preprocessing": None, "encoder": None, **fields})
        return target

    write_compiled(write, target, random_flow())


def check(path: Path) -> str | None:
    """Load the bundle and classify; returns what is wrong, or None."""
    if present := [name for name in ABSENT if importlib.util.find_spec(name)]:
        return f"expected none of the training packages here, got {present}"
    from fastfsl.errors import DeviceError
    from fastfsl.runtime import Classifier

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    classifier = Classifier.load(path, device="auto")
    found = classifier.describe()["flow"]
    print(f"cuda-bindings {importlib.metadata.version('cuda-bindings')}: {found}")
    if found["executor"] != "onnxruntime" or not found["reason"].startswith("cuInit: "):
        return f"expected ONNX Runtime, because no card came up, got {found}"
    probabilities = classifier.feature_probabilities(FEATURES)
    if not np.array_equal(probabilities, Classifier.load(path, flow="onnx").feature_probabilities(FEATURES)):
        return "expected the same answers as without kernels"
    try:
        Classifier.load(path, flow="compiled")
    except DeviceError as error:
        print(error)
        return None
    return "expected flow='compiled' to fail without a card"


if __name__ == "__main__":
    # Where there is a card it is hidden.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    action, folder = sys.argv[1], Path(sys.argv[2])
    if action == "check":
        sys.exit(check(folder))
    make(folder)

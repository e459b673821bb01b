"""Which execution providers really compute here: asked with a model of 68 bytes, not read from a list."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np

from fastfsl.errors import FastFSLError
from fastfsl.runtime.session import create_session

# y = x * x for two float32 numbers. Made once with onnx.helper (one Mul node, opset 13, IR version 8) and serialised,
# so that it can be asked where the onnx package is not installed; a test makes it anew and compares.
SQUARE_MODEL = base64.b64decode(
    "CAg6OgoOCgF4CgF4EgF5IgNNdWwSBnNxdWFyZVoPCgF4EgoKCAgBEgQKAggCYg8KAXkSCgoICAESBAoCCAJCBAoAEA0="
)


@dataclass(frozen=True)
class Probe:
    """Whether a device computed.

    Args:
        device: "cpu" or "cuda".
        provider: onnxruntime's name for it.
        error: why it did not, or None.
    """

    device: str
    provider: str
    error: str | None


def probe(device: str) -> Probe:
    """Compute two squares on ``device`` ("cpu" or "cuda"), and compare."""
    provider = f"{device.upper()}ExecutionProvider"
    try:
        session = create_session(SQUARE_MODEL, "the probe model", device=device, num_threads=1)
        result = session.run(["y"], {"x": np.array([3.0, -4.0], np.float32)})[0]
    except FastFSLError as error:
        return Probe(device, provider, str(error))
    except Exception as error:  # noqa: BLE001 - a broken driver or library surfaces as any of onnxruntime's types
        return Probe(device, provider, f"{type(error).__name__}: {error}")
    if result.tolist() != [9.0, 16.0]:
        return Probe(device, provider, f"computed {result.tolist()} instead of [9.0, 16.0]")
    return Probe(device, provider, None)

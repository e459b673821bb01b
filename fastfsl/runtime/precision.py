"""Where the graphs of a precision can run: float32 anywhere, int8 on the CPU, fp16 on CUDA."""

from __future__ import annotations

from fastfsl.errors import DeviceError
from fastfsl.runtime.probe import probe


def graph_device(precision: str, device: str) -> str:
    """The device to make a bundle's ONNX Runtime sessions on.

    onnxruntime's CPU provider ends the process when it gets an fp16 graph (1.30 and 1.31, on processors with
    AVX512-FP16): so CUDA has to have computed something before a session of such a graph is made.

    Args:
        precision: the bundle's.
        device: "auto", "cpu" or "cuda", as asked for.

    Raises:
        DeviceError: the device cannot run it.
    """
    if precision == "int8":
        if device == "cuda":
            raise DeviceError(
                "device='cuda': this bundle is int8, which is for CPUs; choose device='cpu', or export the run with "
                "--precision fp16 or fp32"
            )
        return "cpu"
    if precision == "fp16":
        if device == "cpu":
            raise DeviceError(
                "device='cpu': this bundle is fp16, which runs on CUDA alone; export the run with --precision int8 or "
                "fp32"
            )
        error = probe("cuda").error
        if error is not None:
            raise DeviceError(
                f"this bundle is fp16, which runs on CUDA alone, and that did not come up: {error}; for the CPU export "
                "the run with --precision int8 or fp32"
            )
        return "cuda"
    return device

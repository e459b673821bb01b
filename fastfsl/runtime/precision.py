"""Where the graphs of a precision can run: float32 anywhere, int8 on the CPU, fp16 on CUDA."""

from __future__ import annotations

import platform
from pathlib import Path

from fastfsl.errors import DeviceError
from fastfsl.runtime.probe import probe

_CPUINFO = Path("/proc/cpuinfo")
# Any of them sums products of bytes in 32 bits.
_WIDE_SUMS = {"avx512_vnni", "avx_vnni", "amx_int8"}


def int8_warning(precision: str, cpuinfo: Path = _CPUINFO) -> str | None:
    """Why a bundle may answer otherwise here than where it was checked; None: it does not, or nothing is known.

    With AVX2 and AVX-512 alone ONNX Runtime sums pairs of products of bytes in 16 bits, up to 2 * 255 * 127, and what
    is beyond 32767 is cut off. ARM's instructions, and the ones asked for here, have no such limit.

    Args:
        precision: the bundle's.
        cpuinfo: what Linux says of the processor.
    """
    if precision != "int8" or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    except OSError:  # no Linux
        return None
    if flags is None or _WIDE_SUMS & set(flags):
        return None
    return (
        "this bundle is int8, and this processor has neither VNNI nor AMX: large sums are cut off at 16 bits, so "
        "answers may differ from those that were checked at the export; compare with `fastfsl evaluate`, export on "
        "this processor, or export with --precision fp32"
    )


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

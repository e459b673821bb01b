"""Where torch computes: a device that is really there. Not for the runtime, which has no torch."""

from typing import Any

import torch

from fastfsl.errors import DeviceError

_KINDS = ("cpu", "cuda")


def resolve_device(device: str | torch.device) -> torch.device:
    """A device that is there; "auto" takes CUDA where there is one.

    Raises:
        DeviceError: another kind of device, or none such on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"expected device auto, cpu or cuda, got {str(device)!r}") from error
    if resolved.type not in _KINDS:
        raise DeviceError(f"expected device auto, cpu or cuda, got {str(device)!r}")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device cuda asked for, but torch sees no CUDA card: choose cpu, or see `fastfsl doctor`")
    try:
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(f"device {str(device)!r} cannot be used ({reason}): choose another") from error
    return resolved


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32: CUDA from compute capability 8, CPUs with AMX.

    On other CPUs torch computes them too, more slowly.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not have it yet
    return bool(capabilities.get("amx_bf16", False))

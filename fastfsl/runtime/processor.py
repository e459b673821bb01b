"""The processor and its instructions: what the speed of a figure depends on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

# Instructions that make inference fast, as Linux calls them.
_INSTRUCTIONS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    "bf16",
)
_CPUINFO = Path("/proc/cpuinfo")


def processor(cpuinfo: Path = _CPUINFO) -> dict[str, Any]:
    """The processor's name and those of its instructions that matter; None where the system does not tell."""
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip().lower(), value.strip())
    except OSError:  # no Linux
        pass
    flags = fields.get("flags", fields.get("features"))
    known = None if flags is None else set(flags.split())
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "instructions": None if known is None else [name for name in _INSTRUCTIONS if name in known],
    }

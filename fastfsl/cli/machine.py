"""What a figure or a problem depends on besides the code: processor, its instructions, threads."""

import os
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
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
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


def threads() -> dict[str, Any]:
    """How many processors there are, how many this process may use, and what the environment says about threads."""
    from fastfsl.runtime.threads import available_cpus

    set_here = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    return {"cpus": os.cpu_count(), "usable": available_cpus(), "environment": set_here}

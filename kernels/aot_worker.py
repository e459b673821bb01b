"""A process that compiles kernels: a job a line on its standard input, an answer a line on its standard output.

`fastfsl.kernels.aot_jobs` starts it with an environment of its own, because Triton reads dozens of variables, some
when it is imported. A job names the module of a family of kernels, which has the functions (`FLOW`), the kinds of their
parameters (`KINDS`) and their compile-time constants (`constants`).
"""

import base64
import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastfsl.kernels.tiles import Tile

# PTX that drivers since CUDA 12.0 compile, where the fallback for every other card is made; else it is as new as ptxas.
_PTX_VERSIONS: Final = {80: 80}
# Allocators align to far more; without the promise no load is asynchronous.
_ALIGNED: Final = [["tt.divisibility", 16]]
# Left to itself ptxas now and then keeps to 72 or 80 registers, to fit one program more on a multiprocessor, and spills
# one or two; told a limit, it takes what it needs. 128 leaves room for four programs of four warps.
_REGISTER_LIMITS: Final = (None, 128, 255)
# <sys/personality.h>: ADDR_NO_RANDOMIZE, and the value that only asks.
_FIXED_ADDRESSES: Final = 0x0040000
_SAME_PERSONALITY: Final = 0xFFFFFFFF


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile a kernel for an architecture; no card is needed.

    Args:
        job: the fields of `fastfsl.kernels.aot_jobs.Job`.

    Returns:
        The fields of `fastfsl.kernels.aot_jobs.Built`, the cubin in base 64.
    """
    family, tile = importlib.import_module(job["family"]), Tile(**job["tile"])
    function, constants = family.FLOW[job["kernel"]], family.constants(job["kernel"], job["dim"], tile)
    operand = f"*{job['dtype']}"
    types = {"float32": "*fp32", "weight": operand, "state": operand, "counters": "*i32"}
    types |= {"int32": "i32", "scalar": "fp32"}
    signature = {name: "constexpr" if name in constants else types[family.KINDS[name]] for name in function.arg_names}
    pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if job["cooperative"]:
        options["launch_cooperative_grid"] = True
    if job["arch"] in _PTX_VERSIONS:
        options["ptx_version"] = _PTX_VERSIONS[job["arch"]]
    source = ASTSource(function, signature, constants, {(index,): _ALIGNED for index in pointers})
    for limit in _REGISTER_LIMITS:
        built = triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options={**options, "maxnreg": limit})
        resources = _resources(built.asm["cubin"])
        if resources["stack"] == 0:
            break
    kinds = {"i32": "int32", "fp32": "float32"}
    metadata, cubin = built.metadata, built.asm["cubin"]
    return {
        "entry": metadata.name,
        "shared_memory": metadata.shared,
        "scratch": metadata.global_scratch_size + metadata.profile_scratch_size,
        **resources,
        "arguments": [(name, kinds.get(kind, "pointer")) for name, kind in signature.items() if kind != "constexpr"],
        "cubin": base64.b64encode(cubin).decode(),
        "ptx": built.asm["ptx"],
    }


def compiler_versions() -> dict[str, str]:
    """What the kernels are compiled with: package or tool -> version."""
    tools = {name: getattr(triton.knobs.nvidia, name, None) for name in ("ptxas", "ptxas_blackwell")}
    return {"triton": triton.__version__, **{name: tool.version for name, tool in tools.items() if tool is not None}}


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and its bytes of local memory, which is where registers spill to."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run(  # noqa: S603 - Triton's own tool on a file made here
            [tool, "--dump-resource-usage", file], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": found["REG"], "stack": max(found["STACK"], found["LOCAL"])}


def _causes(error: BaseException | None) -> str:
    """What went wrong, and what led to it: Triton's own message only tells the line of the outermost function."""
    messages = []
    while error is not None:
        messages.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return "\ncaused by ".join(messages)


def fix_addresses() -> bool:
    """Have the programs this process starts loaded at the same addresses each time; whether the system allows it.

    ptxas of CUDA 13 takes things in the order of their addresses, so the tcgen05 kernels of one PTX came out in four
    forms, with two registers or predicates exchanged.
    """
    try:
        personality = ctypes.CDLL(None).personality
    except (OSError, AttributeError):
        return False
    personality.argtypes, personality.restype = [ctypes.c_ulong], ctypes.c_int
    now: int = personality(_SAME_PERSONALITY)
    return now != -1 and int(personality(now | _FIXED_ADDRESSES)) != -1


def main() -> None:
    """Answer jobs until there are no more."""
    fix_addresses()
    # Whatever else prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = {"compiler": compiler_versions(), **compile_job(json.loads(line))}
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises is the answer
            answer = {"error": _causes(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""compute-sanitizer over every kernel on a small case: stray accesses (memcheck) and races (racecheck).

`python -m benchmarks.gpu_sanitizer PART` is the case itself, which the sanitizer runs.
"""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.gpu_record import Options, Record

# What is in one launch comes last: if its programs wait for each other forever, nothing else is lost.
PARTS = {"launches": ("memcheck", "racecheck"), "one launch": ("memcheck", "racecheck")}
FOUND = 86  # the exit code that means that the sanitizer found something
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def run(options: Options) -> None:
    """Each tool once; first each part alone, which compiles what the tools would be slow to compile."""
    record = Record("sanitizer", "compute-sanitizer on a small case of every kernel", options)
    sanitizer = shutil.which("compute-sanitizer") or next((place for place in PLACES if Path(place).is_file()), None)
    if sanitizer is None:
        record.skip("memcheck and racecheck", "no compute-sanitizer here")
        record.finish()
        return
    for part, tools in PARTS.items():
        case = [sys.executable, "-P", "-m", "benchmarks.gpu_sanitizer", part]
        _said(record, f"{part}, without a tool", case)
        for tool in tools:
            # torch asks the driver for much that a card may not have: those answers are no errors.
            quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
            command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *quiet, *case]
            _said(record, f"{part}, {tool}", command, with_tool=True)
    record.finish()


def _said(record: Record, name: str, command: list[str], *, with_tool: bool = False) -> None:
    if record.left() < 10.0:
        record.skip(name, "no time left")
        return
    # Each tensor its own allocation, so that an access beyond one is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=record.left()
        )
    except subprocess.TimeoutExpired:
        record.skip(name, "no time left")
        return
    said = (done.stdout + done.stderr)[-3000:]
    if with_tool and done.returncode not in {0, FOUND}:  # the tool itself: some cards refuse it
        record.skip(name, f"ended with code {done.returncode}: {said}")
        return
    right = done.returncode == 0
    record.add({"name": name, "ok": right, "code": done.returncode, "said": "" if right else said})


def case(part: str) -> None:
    """Every kernel of a part once, rows and columns that fill no tile."""
    import torch

    from benchmarks.gpu_gram import loss_and_gradient
    from benchmarks.gpu_inputs import random_features, random_plan, random_tokens
    from fastfsl.kernels import gram_loss
    from fastfsl.kernels.flow_executor import FlowExecutor

    in_one = part == "one launch"
    for rows in (17,) if in_one else (17, 130):
        x = random_features(rows, 144, 1, "bf16").to("cuda")
        executor = FlowExecutor(random_plan(144, 2, 2, 0, "bf16"), torch.bfloat16, x.device)
        buffers = executor.buffers(rows, 1)
        buffers["x"].view(x.shape).copy_(x)
        (executor.launch_persistent if in_one else executor.launch)(buffers, rows, (2,))
    for kind in () if in_one else ("l1", "squared"):
        for count in (5, 130):
            features, reference = random_tokens((2, count, 144), 1e-2, 0, torch.bfloat16, "cuda")
            step = loss_and_gradient(partial(gram_loss.gram_alignment_loss, kind=kind))
            step(features.requires_grad_(), reference)
    torch.cuda.synchronize()


if __name__ == "__main__":
    case(sys.argv[1])

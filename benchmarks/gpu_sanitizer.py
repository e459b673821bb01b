"""compute-sanitizer over every kernel on a small case: stray accesses (memcheck) and races (racecheck).

`python -m benchmarks.gpu_sanitizer` is the case itself, which the sanitizer runs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_record import Options, Record

TOOLS = ("memcheck", "racecheck")
FOUND = 86  # the exit code that means that the sanitizer found something
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def run(options: Options) -> None:
    """Each tool once; first the case alone, which compiles what the tools would be slow to compile."""
    record = Record("sanitizer", "compute-sanitizer on a small case of every kernel", options)
    sanitizer = shutil.which("compute-sanitizer") or next((place for place in PLACES if Path(place).is_file()), None)
    if sanitizer is None:
        record.skip("memcheck, racecheck", "no compute-sanitizer here")
        record.finish()
        return
    case = [sys.executable, "-P", "-m", "benchmarks.gpu_sanitizer"]
    _said(record, "the case alone", case)
    for tool in TOOLS:
        if record.left() < 10.0:
            record.skip(tool, "no time left")
            continue
        # torch asks the driver for much that a card may not have: those answers are no errors.
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        _said(record, tool, [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *quiet, *case])
    record.finish()


def _said(record: Record, name: str, command: list[str]) -> None:
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
    record.add(
        {"name": name, "ok": done.returncode == 0, "code": done.returncode, "said": said if done.returncode else ""}
    )


def case() -> None:
    """Every kernel once, rows and columns that fill no tile."""
    import torch

    from benchmarks.gpu_gram import loss_and_gradient
    from benchmarks.gpu_inputs import random_features, random_plan, random_tokens
    from fastfsl.kernels import gram_loss
    from fastfsl.kernels.flow_executor import FlowExecutor

    for rows in (17, 130):
        x = random_features(rows, 144, 1, "bf16").to("cuda")
        executor = FlowExecutor(random_plan(144, 2, 2, 0, "bf16"), torch.bfloat16, x.device)
        buffers = executor.buffers(rows, 1)
        buffers["x"].view(x.shape).copy_(x)
        executor.launch(buffers, rows, (2,))
    for kind in ("l1", "squared"):
        for count in (5, 130):
            features, reference = random_tokens((2, count, 144), 1e-2, 0, torch.bfloat16, "cuda")
            step = loss_and_gradient(lambda f, r: gram_loss.gram_alignment_loss(f, r, kind))  # noqa: B023
            step(features.requires_grad_(), reference)
    torch.cuda.synchronize()


if __name__ == "__main__":
    case()

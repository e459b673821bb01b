"""The kernels compiled ahead of time and run without torch and Triton, as a bundle's runtime runs them.

Compiled in this run; written as a bundle; loaded and launched by a process in which torch
and Triton cannot be imported (gpu_aot_child.py), once as machine code and once as PTX that the driver compiles.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu_bounds import MOST_TIMES_PLAIN_ERROR
from benchmarks.gpu_flow import FULL
from benchmarks.gpu_inputs import DTYPES, random_features, random_field
from benchmarks.gpu_record import Options, Record
from fastfsl import bundle
from fastfsl.errors import ConfigError
from fastfsl.export.flow_graph import flow_graph
from fastfsl.flow import FlowPlan, build_plan, normalize, run_plan
from fastfsl.kernels import aot

Dtype = Literal["fp16", "bf16"]
DTYPES_OF_BUNDLES: tuple[Dtype, ...] = ("fp16", "bf16")
# Without machine code for sm_90 the card, which runs no code for sm_80, has to take the PTX.
ARCHITECTURES, TARGET = (80, 90), "sm_90"
CLASSES, LOGIT_SCALE = 100, 100.0
ROWS = 5000
CHILD = Path(__file__).with_name("gpu_aot_child.py")


def run(options: Options) -> None:
    """Compile, write, and have the bundle run, first in the dtype that a bundle takes by default."""
    record = Record("aot", "compiled kernels launched without torch and Triton: error, latency", options)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES_OF_BUNDLES[: 1 if options.quick else None]:
            if record.left() < 20.0:
                record.skip(dtype, "no time left")
                continue
            _run_dtype(record, Path(folder), dtype)
    record.finish()


def compile_kernels(dim: int, dtype: Dtype) -> tuple[aot.CompiledFlow, dict[str, Any]]:
    """The kernels, and how compiling them went."""
    started = time.monotonic()
    try:
        compiled, over = aot.compile_flow(dim, dtype, ARCHITECTURES), ""
    except ConfigError as error:  # over a budget by this compiler: slow kernels can still be right or wrong
        over = str(error)[:1000]
        with mock.patch.object(aot, "check_budgets"):
            compiled = aot.compile_flow(dim, dtype, ARCHITECTURES)
    seconds = time.monotonic() - started
    about = {"name": "compilation for sm_80, sm_90 and as PTX", "dtype": dtype, "seconds": seconds}
    return compiled, {**about, "over_budget": over}


def without(compiled: aot.CompiledFlow, target: str) -> aot.CompiledFlow:
    """The kernels but for one target's."""
    targets = {name: one for name, one in compiled.kernels.targets.items() if name != target}
    files = {name: data for name, data in compiled.files.items() if not name.startswith(f"{target}/")}
    return aot.CompiledFlow(replace(compiled.kernels, targets=targets), files)


def write_bundle(folder: Path, plan: FlowPlan, classes: np.ndarray[Any, Any], compiled: aot.CompiledFlow) -> None:
    """Write a bundle without an encoder: the flow as ONNX graph and as these kernels."""
    kernels, arrays = compiled.kernels, plan.to_arrays()
    with bundle.staging_folder(folder) as staging:
        (staging / bundle.FLOW_GRAPH).parent.mkdir(parents=True)
        (staging / bundle.FLOW_GRAPH).write_bytes(flow_graph(arrays, classes, LOGIT_SCALE).SerializeToString())
        compiled.write(staging)
        weights = bundle.FlowWeights.from_plan(arrays, kernels.dtype, classes, LOGIT_SCALE)
        bundle.write_flow_weights(staging / bundle.FLOW_KERNELS_WEIGHTS, weights)
        bundle.seal_bundle(
            staging,
            {
                "method": "fma",
                "class_names": [f"class {index}" for index in range(len(classes))],
                "embed_dim": plan.dim,
                "num_steps": plan.num_steps,
                "step_size": plan.step_size,
                "precision": "fp32",
                "logit_scale": LOGIT_SCALE,
                "preprocessing": None,
                "encoder": None,
                "versions": dict(kernels.compiler),
                "metrics": {},
                "parity": {},
                "training": {},
                "kernels": {"architectures": kernels.architectures, "dtype": kernels.dtype},
            },
        )


@torch.inference_mode()
def _run_dtype(record: Record, folder: Path, dtype: Dtype) -> None:
    field = random_field(FULL.dim, FULL.num_blocks, seed=0)
    # Rounded before the comparison, so that the errors are those of arithmetic alone.
    plan = build_plan(field, FULL.num_steps, 1 / FULL.num_steps).to(dtype=DTYPES[dtype]).to(dtype=torch.float32)
    x = random_features(ROWS, FULL.dim, 1, dtype)
    classes = normalize(torch.randn(CLASSES, FULL.dim, generator=torch.Generator().manual_seed(2)))
    exact = normalize(run_plan(plan.to("cuda", torch.float64), x.cuda().double()))
    plain = normalize(run_plan(plan.to("cuda", DTYPES[dtype]), x.cuda().to(DTYPES[dtype])).double())
    compiled, about = compile_kernels(plan.dim, dtype)
    record.add(about)

    inputs = folder / f"{dtype}.npz"
    np.savez(
        inputs,
        x=x.numpy(),
        exact=exact.cpu().numpy(),
        logits=(LOGIT_SCALE * exact.cpu() @ classes.double().T).numpy(),
        plain=plain.cpu().numpy(),
        most_times_plain=np.float64(MOST_TIMES_PLAIN_ERROR),
    )
    for target, kernels in ((TARGET, compiled), (bundle.PTX_TARGET, without(compiled, TARGET))):
        written = folder / f"{dtype}-{target}"
        write_bundle(written, plan, classes.numpy(), kernels)
        command = [sys.executable, str(CHILD), str(written), str(inputs), target]
        environment = {**os.environ, "CUDA_CACHE_DISABLE": "1"}  # PTX is compiled now
        _keep_rows(record, {"dtype": dtype, "target": target}, command, environment)


def _keep_rows(record: Record, about: dict[str, Any], command: list[str], environment: dict[str, str]) -> None:
    """Run the process, and keep the rows that it prints; one that is not done in time is no wrong result."""
    timeout = max(record.left(), 5.0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        record.skip(f"{about}", f"did not end in the {timeout:.0f} s that were left")
        return
    if done.returncode != 0:
        record.add({"name": "the bundle's flow", **about, "ok": False, "error": done.stderr[-2000:]})
        return
    for row in json.loads(done.stdout.splitlines()[-1]):
        record.add({**row, **about})

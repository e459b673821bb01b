"""The kernels compiled ahead of time and run without torch and Triton, as a bundle's runtime runs them.

Compiled here in this run, for sm_90 and as PTX; written as a bundle; loaded and launched by a process in which torch
and Triton cannot be imported (gpu_aot_child.py), once as machine code and once as PTX that the driver compiles.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
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
ARCHITECTURE = 90
CLASSES, LOGIT_SCALE = 100, 100.0
ROWS = 300  # two row classes, and no multiple of a tile
CHILD = Path(__file__).with_name("gpu_aot_child.py")


def run(options: Options) -> None:
    """Compile, write, and have the bundle run, first in the dtype that a bundle takes by default."""
    record = Record("aot", "compiled kernels launched without torch and Triton: error, latency", options)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES_OF_BUNDLES[: 1 if options.quick else None]:
            if record.seconds_left < 20.0:
                record.skip(dtype, "no time left")
                continue
            _run_dtype(record, Path(folder), dtype)
    record.finish()


def write_bundle(folder: Path, plan: FlowPlan, classes: np.ndarray[Any, Any], dtype: Dtype) -> dict[str, Any]:
    """Compile the kernels of a plan, write them as a bundle without an encoder, and say how compiling went."""
    started = time.monotonic()
    try:
        compiled = aot.compile_flow(plan.dim, dtype, (ARCHITECTURE,))
        over = ""
    except ConfigError as error:  # over budget by this card's compiler: slow kernels can still be right or wrong
        over = str(error)[:1000]
        with mock.patch.object(aot, "check_budgets"):
            compiled = aot.compile_flow(plan.dim, dtype, (ARCHITECTURE,))
    about = {"name": "compilation for sm_90 and as PTX", "dtype": dtype, "seconds": time.monotonic() - started}
    arrays = plan.to_arrays()
    with bundle.staging_folder(folder) as staging:
        (staging / bundle.FLOW_GRAPH).parent.mkdir(parents=True)
        (staging / bundle.FLOW_GRAPH).write_bytes(flow_graph(arrays, classes, LOGIT_SCALE).SerializeToString())
        compiled.write(staging)
        weights = bundle.FlowWeights.from_plan(arrays, dtype, classes, LOGIT_SCALE)
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
                "versions": dict(compiled.kernels.compiler),
                "metrics": {},
                "parity": {},
                "training": {},
                "kernels": {"architectures": compiled.kernels.architectures, "dtype": dtype},
            },
        )
    return {**about, "over_budget": over}


@torch.inference_mode()
def _run_dtype(record: Record, folder: Path, dtype: Dtype) -> None:
    field = random_field(FULL.dim, FULL.num_blocks, seed=0)
    # Rounded before the comparison, so that the errors are those of arithmetic alone.
    plan = build_plan(field, FULL.num_steps, 1 / FULL.num_steps).to(dtype=DTYPES[dtype]).to(dtype=torch.float32)
    x = random_features(ROWS, FULL.dim, 1, dtype)
    classes = normalize(torch.randn(CLASSES, FULL.dim, generator=torch.Generator().manual_seed(2)))
    exact = normalize(run_plan(plan.to("cuda", torch.float64), x.cuda().double()))
    plain = normalize(run_plan(plan.to("cuda", DTYPES[dtype]), x.cuda().to(DTYPES[dtype])).double())
    record.add(write_bundle(folder / dtype, plan, classes.numpy(), dtype))

    inputs = folder / f"{dtype}.npz"
    np.savez(
        inputs,
        x=x.numpy(),
        exact=exact.cpu().numpy(),
        logits=(LOGIT_SCALE * exact.cpu() @ classes.double().T).numpy(),
        plain_error=np.float64((plain - exact).norm().item()),
        most_times_plain=np.float64(MOST_TIMES_PLAIN_ERROR),
    )
    for target in (f"sm_{ARCHITECTURE}", bundle.PTX_TARGET):
        command = [sys.executable, str(CHILD), str(folder / dtype), str(inputs), target]
        environment = {**os.environ, "CUDA_CACHE_DISABLE": "1"}  # PTX is compiled now
        timeout = max(record.seconds_left, 5.0)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)
        about = {"dtype": dtype, "target": target}
        if done.returncode != 0:
            record.add({"name": "the bundle's flow", **about, "ok": False, "error": done.stderr[-2000:]})
            continue
        for row in json.loads(done.stdout):
            record.add({**row, **about})

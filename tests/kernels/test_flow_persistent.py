"""The flow in one launch, with one program, which takes every tile; with more, the interpreter would wait for ever."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fastfsl.errors import ConfigError
from fastfsl.flow import normalize, plan_states
from fastfsl.kernels import tiles
from fastfsl.kernels.flow_executor import FlowExecutor
from fastfsl.kernels.flow_step import euler_flow, flow_states
from fastfsl.kernels.tiles import ARCHITECTURES, flow_tile, persistent_tile


def features(n: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize(("dim", "n", "dtype"), [(128, 17, torch.float16), (144, 3, torch.float32)])
def test_one_launch_is_as_good_as_torch(random_plan, dim, n, dtype):
    plan, x = random_plan(dim, 2, 3), features(n, dim, dtype)
    got = flow_states(plan, x, (1, 3), persistent=True)
    exact, plain = plan_states(plan, x.double(), (1, 3)), plan_states(plan.to(dtype=dtype), x, (1, 3))
    for state, torch_state, expected in zip(got, plain, exact, strict=True):
        assert (state - expected).norm() <= 2 * (torch_state - expected).norm()
        assert not torch.allclose(expected, x.double(), rtol=0, atol=1e-3)


def test_the_counters_are_ready_for_the_next_launch(random_plan):
    executor = FlowExecutor(random_plan(128, 1, 2), torch.float32, torch.device("cpu"))
    x = features(3, 128, torch.float32)
    buffers = executor.buffers(3, 1)
    results = []
    for _ in range(2):
        for name in buffers.keys() - {"arrived"}:
            buffers[name].fill_(torch.nan)
        buffers["x"].copy_(x.flatten())
        executor.launch_persistent(buffers, 3, (2,))
        assert buffers["arrived"].tolist() == [0, 0]
        results.append(buffers["states"].clone())
    assert torch.equal(*results)
    assert results[0].isfinite().all()


def test_no_step_of_the_launches_is_missing(random_plan, monkeypatch):
    # In tiles of one size, the depth of 144's in all phases, both ways compute the same bit for bit.
    executor = FlowExecutor(random_plan(144, 1, 2), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(executor, "tile", lambda rows: persistent_tile(144, "fp32"))
    x, found = features(17, 144, torch.float32), []
    for run in (executor.launch, executor.launch_persistent):
        buffers = executor.buffers(17, 2)
        buffers["x"].copy_(x.flatten())
        run(buffers, 17, (1, 2))
        found.append(buffers["states"])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_statistics_fit_the_buffers_of_few_rows(arch, dtype):
    for dim in range(128, 1281, 16):
        assert persistent_tile(dim, dtype).columns == flow_tile(arch, dim, 1, dtype).columns


def test_what_does_not_fit_one_launch_is_a_typed_error(random_plan):
    plan = random_plan(128, 0, 1)
    with pytest.raises(ConfigError, match="at most 64 rows and 30 steps"):
        euler_flow(plan, features(65, 128, torch.float32), persistent=True)


def test_graphs_are_the_default_until_one_launch_is_measured():
    assert tiles.PERSISTENT_ROWS == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 17, 64])
@pytest.mark.parametrize("dim", [128, 512, 768, 1280])
def test_one_launch_on_a_card(random_plan, dim, n, dtype):
    plan, x = random_plan(dim, 12, 10).to("cuda"), features(n, dim, dtype).cuda()
    expected = euler_flow(plan, x, persistent=False)
    for _ in range(20):
        torch.testing.assert_close(euler_flow(plan, x, persistent=True), expected, rtol=2e-2, atol=2e-3)


COMPILE = """
import json
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastfsl.kernels.flow_kernels import constants
from fastfsl.kernels.flow_persistent import persistent_kernel
from fastfsl.kernels.tiles import persistent_tile

tile = persistent_tile(512, "bf16")
fixed = constants("persistent", 512, tile)
numbers = {"n": "i32", "num_blocks": "i32", "num_steps": "i32", "read_bits": "i32", "step_size": "fp32"}
sixteen = {"h": "*bf16", "hidden": "*bf16", "arrived": "*i32"}
signature, aligned = {}, {}
for index, name in enumerate(persistent_kernel.arg_names):
    other = "*bf16" if name.endswith("weight") else "*fp32"
    signature[name] = "constexpr" if name in fixed else {**numbers, **sixteen}.get(name, other)
    if signature[name].startswith("*"):
        aligned[(index,)] = [["tt.divisibility", 16]]
options = {"num_warps": tile.warps, "num_stages": tile.stages, "launch_cooperative_grid": True}
source = ASTSource(persistent_kernel, signature, fixed, aligned)
built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(json.dumps({"cooperative": built.metadata.launch_cooperative_grid, "ptx": built.asm["ptx"]}))
"""


@pytest.mark.slow
def test_waits_release_and_acquire(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, check=True, capture_output=True, text=True, cwd=tmp_path
    )
    built = json.loads(done.stdout)
    assert built["cooperative"]
    # A wait after every phase but `exit` at the end; arriving releases, leaving acquires, both for the whole card.
    waits = 5
    assert len(re.findall(r"(red|atom)\.global\.gpu\.release\.add\.u32", built["ptx"])) == waits
    assert built["ptx"].count("ld.global.gpu.acquire.b32") == waits

"""The fused flow in Triton's interpreter, against float64; bfloat16 and CUDA graphs need a card."""

import math
import os
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from torch import Tensor

from fastfsl.errors import ConfigError, DeviceError, ShapeError
from fastfsl.flow import FlowPlan, normalize, plan_states, velocity_field
from fastfsl.kernels import flow_executor, flow_phases, flow_step, flow_tiles
from fastfsl.kernels.flow_executor import FlowExecutor
from fastfsl.kernels.flow_step import euler_flow, flow_states
from fastfsl.kernels.tiles import ROW_CLASSES, Tile, flow_tile

# The interpreter's time goes by operations: few programs, few passes and undivided tiles.
SMALL, LARGE = Tile(16, 256, 256, 4, 3), Tile(64, 256, 256, 4, 3)
TABLE = sorted({replace(flow_tile(90, 256, rows or 8192, "fp16"), depth=16) for rows in ROW_CLASSES}, key=str)
DTYPES = [torch.float32, torch.float16]


def features(n: int, dim: int, dtype: torch.dtype, seed: int = 3) -> Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def use(monkeypatch: pytest.MonkeyPatch, tile: Tile, *, divided: bool = False) -> None:
    """Have every flow use a tile, and take it to memory as a whole or in parts."""

    def fitting(arch: int, dim: int, rows: int, dtype: str) -> Tile:
        return replace(tile, depth=math.gcd(tile.depth, dim))

    monkeypatch.setattr(flow_executor, "flow_tile", fitting)
    if not divided:
        monkeypatch.setattr(flow_phases, "PART", tl.constexpr(256))


def assert_as_good_as_torch(got: list[Tensor], plan: FlowPlan, x: Tensor, read_steps: tuple[int, ...]) -> None:
    """The error of each state against float64 is at most twice that of plain torch in the same dtype."""
    exact = plan_states(plan, x.double(), read_steps)
    plain = plan_states(plan.to(dtype=x.dtype), x, read_steps)
    assert len(got) == len(exact)
    for state, torch_state, expected in zip(got, plain, exact, strict=True):
        assert state.dtype == x.dtype
        assert state.shape == x.shape
        assert (state - expected).norm() <= 2 * (torch_state - expected).norm()
        # The flow has moved the features: an identity would not pass.
        assert not torch.allclose(expected, x.double(), rtol=0, atol=1e-3)


# Odd numbers of rows, none of them full tiles; widths of CLIP models, the middle one no multiple of the tile's. Every
# width and every number of rows in both dtypes, every pair of them in one; in both is slow.
CASES = [
    pytest.param(dim, n, dtype, marks=[pytest.mark.slow] if (i + j + k) % 2 else [])
    for i, dim in enumerate((512, 640, 768))
    for j, n in enumerate((1, 3, 17, 130))
    for k, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("dim", "n", "dtype"), CASES)
def test_a_step_is_as_good_as_torch(random_plan, monkeypatch, dim, n, dtype):
    use(monkeypatch, SMALL if n < 64 else LARGE)
    plan, x = random_plan(dim, 1, 1), features(n, dim, dtype)
    assert_as_good_as_torch([euler_flow(plan, x)], plan, x, (1,))


@pytest.mark.parametrize(("dim", "num_steps"), [(128, 3), (144, 2), (1152, 1), (1280, 1)])
def test_other_widths_and_more_steps(random_plan, monkeypatch, dim, num_steps):
    use(monkeypatch, SMALL)
    plan, x = random_plan(dim, 1, num_steps), features(3, dim, torch.float32)
    assert_as_good_as_torch([euler_flow(plan, x)], plan, x, (num_steps,))


@pytest.mark.parametrize("tile", TABLE, ids=lambda tile: f"{tile.rows}x{tile.columns}")
def test_tiles_of_the_table(random_plan, monkeypatch, tile):
    # 144 = 4.5 x 32 = 1.125 x 128: the last tile is cut, and so is the last part of it.
    use(monkeypatch, tile, divided=True)
    plan, x = random_plan(144, 1, 2), features(17, 144, torch.float32)
    assert_as_good_as_torch(flow_states(plan, x, (1, 2)), plan, x, (1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_on_the_way(random_plan, monkeypatch, dtype):
    use(monkeypatch, SMALL)
    plan, x = random_plan(128, 2, 4), features(5, 128, dtype)
    states = flow_states(plan, x, (0, 1, 3))
    assert states[0] is x
    assert_as_good_as_torch(states[1:], plan, x, (1, 3))
    assert torch.equal(euler_flow(plan, x, 3), states[2])
    # Nothing is computed after the last.
    broken = replace(plan, block_table=plan.block_table.index_fill(0, torch.tensor([3]), torch.nan))
    assert torch.equal(flow_states(broken, x, (3,))[0], states[2])


def test_no_step_no_row_and_no_block(random_plan, monkeypatch):
    use(monkeypatch, SMALL)
    plan, x = random_plan(128, 0, 2), features(3, 128, torch.float32)
    assert euler_flow(plan, x, 0) is x
    assert euler_flow(plan, x[:0]).shape == (0, 128)
    assert [len(state) for state in flow_states(plan, x[:0], (0, 1))] == [0, 0]
    assert_as_good_as_torch([euler_flow(plan, x)], plan, x, (2,))


def test_many_rows_go_through_in_chunks(random_plan, monkeypatch):
    use(monkeypatch, SMALL)
    monkeypatch.setattr(flow_executor, "CHUNK_ROWS", 8)
    plan, x = random_plan(128, 1, 2), features(19, 128, torch.float32)
    assert_as_good_as_torch(flow_states(plan, x, (1, 2)), plan, x, (1, 2))


def test_mean_and_scale_of_h_do_not_matter(random_plan, monkeypatch):
    # A residual stream far from 0: E[h^2] - E[h]^2 would cancel in float32.
    use(monkeypatch, Tile(16, 32, 128, 4, 3))
    plan = random_plan(128, 1, 1)
    plan = replace(plan, input_bias=plan.input_bias + 1e4)
    x = features(3, 128, torch.float32)
    assert_as_good_as_torch([euler_flow(plan, x)], plan, x, (1,))


def test_the_sum_over_many_steps_fits_float16(random_plan, monkeypatch):
    use(monkeypatch, SMALL)
    plan, x = random_plan(128, 0, 10), features(2, 128, torch.float16)
    plan = replace(plan, final_table=plan.final_table * 1e4, step_size=plan.step_size / 1e4)
    got, expected = euler_flow(plan, x), plan_states(plan, x.double(), (10,))[0]
    assert not plan_states(plan.to(dtype=torch.float16), x, (10,))[0].isfinite().all()
    assert (got - expected).norm() <= 2e-3 * (expected - x).norm()


@pytest.mark.parametrize("tile", [LARGE, Tile(16, 128, 16, 4, 3)])
def test_rows_beyond_the_last_are_left_alone(random_plan, monkeypatch, tile):
    use(monkeypatch, tile, divided=True)
    plan, n, space = random_plan(144, 1, 2), 17, 40
    executor = FlowExecutor(plan, torch.float32, torch.device("cpu"))
    clean, poisoned = executor.buffers(n, 1), executor.buffers(space, 1)
    x = features(n, 144, torch.float32)
    for buffers in (clean, poisoned):
        for name in buffers.keys() - {"arrived"}:
            buffers[name].fill_(torch.nan)
        buffers["x"][: x.numel()] = x.flatten()
        executor.launch(buffers, n, (2,))
    assert not clean["states"].isnan().any()
    for name, buffer in poisoned.items():
        if name in {"h", "stats", "arrived"}:  # two of the others in one, and a counter
            continue
        assert torch.equal(buffer[: len(clean[name])], clean[name]), name
        assert buffer[len(clean[name]) :].isnan().all(), name


@pytest.mark.parametrize(
    ("dtype", "plan_dtype", "x_dtype", "products"),
    [
        (None, torch.float64, torch.float32, torch.float32),
        (None, torch.float32, torch.float16, torch.float16),
        (None, torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32, torch.float16),
    ],
)
def test_dtype_of_the_products(random_plan, monkeypatch, dtype, plan_dtype, x_dtype, products):
    use(monkeypatch, SMALL)
    plan, x = random_plan(128, 1, 1).to(dtype=plan_dtype), features(3, 128, x_dtype)
    got = euler_flow(plan, x, dtype=dtype)
    assert got.dtype == x_dtype
    expected = plan_states(plan.to(dtype=torch.float64), x.double(), (1,))[0]
    error = float((got - expected).norm() / (expected - x).norm())
    assert (error < 1e-5) == (products == torch.float32 == x_dtype)
    assert error < 3e-3


def test_a_plan_is_prepared_once_and_forgotten_with_it(random_plan, monkeypatch):
    use(monkeypatch, SMALL)
    made, prepare = [], FlowExecutor.__init__

    def counted(self, plan, dtype, *args, **kwargs):
        made.append(dtype)
        prepare(self, plan, dtype, *args, **kwargs)

    monkeypatch.setattr(FlowExecutor, "__init__", counted)
    plan, x = random_plan(128, 0, 1), features(2, 128, torch.float32)
    assert torch.equal(euler_flow(plan, x), euler_flow(plan, x))
    assert made == [torch.float32]
    euler_flow(plan, x, dtype=torch.float16)
    assert made == [torch.float32, torch.float16]
    gone, key = weakref.ref(plan), id(plan)
    assert key in flow_step._EXECUTORS
    del plan
    assert gone() is None
    assert key not in flow_step._EXECUTORS


def test_bad_input_is_a_typed_error(random_plan):
    plan, x = random_plan(128, 0, 2), features(2, 128, torch.float32)
    with pytest.raises(ShapeError, match=r"expected features \(n, 128\)"):
        euler_flow(plan, x[:, :64])
    with pytest.raises(ShapeError, match="float64"):
        euler_flow(plan, x.double())
    with pytest.raises(ConfigError, match=r"0\.\.2, got \[3\]"):
        euler_flow(plan, x, 3)
    for steps in ((), (2, 1), (1, 1), (-1,)):
        with pytest.raises(ConfigError, match="ascending"):
            flow_states(plan, x, steps)
    with pytest.raises(ConfigError, match="float64"):
        euler_flow(plan, x, dtype=torch.float64)
    with pytest.raises(ConfigError, match="multiple of 16"):
        euler_flow(random_plan(24, 0, 1), features(2, 24, torch.float32))
    with pytest.raises(DeviceError, match="bfloat16"):
        euler_flow(plan, x, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="no gradient"):
        euler_flow(plan, x.clone().requires_grad_())


def test_without_card_and_interpreter_it_says_what_it_needs(random_plan, monkeypatch):
    monkeypatch.setattr(flow_step, "INTERPRETED", False)
    with pytest.raises(DeviceError, match="needs a CUDA card"):
        euler_flow(random_plan(128, 0, 1), features(2, 128, torch.float32))


def test_layer_norm_is_that_of_the_velocity_field():
    assert flow_tiles.NORM_EPS.value == velocity_field.NORM_EPS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 3, 17, 130, 1000, 4097, 8193])
@pytest.mark.parametrize("dim", [128, 144, 512, 768, 1280])
def test_flow_on_a_card(random_plan, dim, n, dtype):
    plan, x = random_plan(dim, 2, 3).to("cuda"), features(n, dim, dtype).cuda()
    assert_as_good_as_torch(flow_states(plan, x, (1, 3)), plan, x, (1, 3))
    assert torch.equal(euler_flow(plan, x), euler_flow(plan, x))


@pytest.mark.gpu
def test_threads_and_streams_take_turns(random_plan):
    plan = random_plan(256, 2, 3).to("cuda")
    xs = [features(n, 256, torch.float16, seed=n).cuda() for n in range(1, 40)]
    expected = [euler_flow(plan, x) for x in xs]
    torch.cuda.synchronize()

    def on_a_stream(x: Tensor) -> Tensor:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            got = euler_flow(plan, x)
        stream.synchronize()
        return got

    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(on_a_stream, xs))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastfsl.kernels.flow_kernels import FLOW, KINDS, constants
from fastfsl.kernels.tiles import flow_tile

tile = flow_tile(90, 512, 1, "bf16")
fixed = constants("second", 512, tile, dependent=True)
types = {"float32": "*fp32", "weight": "*bf16", "state": "*bf16", "int32": "i32", "scalar": "fp32"}
names = FLOW["second"].arg_names
signature = {name: "constexpr" if name in fixed else types[KINDS[name]] for name in names}
options = {"num_warps": tile.warps, "num_stages": tile.stages, "launch_pdl": True}
source = ASTSource(FLOW["second"], signature, fixed, {})
print(compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@pytest.mark.slow
def test_a_dependent_launch_touches_nothing_before_it_has_waited(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ptx = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    begin, rest = ptx.split("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in begin
    touching = r"(ld|st|red|atom)\.global|cp\.async\.c"
    assert not re.search(touching, begin)
    assert re.search(touching, rest)

"""Properties of the launch sequence, and the names that it shares with the kernels and the plan."""

from collections import Counter
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.bundle import PlanArrays
from fastfsl.bundle.flow_launches import FLOW_KERNELS, Place, flow_launches, work_buffers
from fastfsl.kernels.flow_kernels import FLOW, KINDS

CONSTANTS = ["D", "BLOCK_M", "BLOCK_N", "BLOCK_K", "PRECISION", "DEPENDENT"]
# Of each kernel: what it reads by whole rows, and what it writes by tiles.
WHOLE_ROWS = {
    "enter": {"x"},
    "first": {"h", "stats"},
    "second": {"hidden"},
    "carry": {"h", "stats"},
    "exit": {"h", "stats", "total"},
}
WRITTEN = {
    "enter": {"u", "h", "stats", "total"},
    "first": {"hidden"},
    "second": {"h", "stats"},
    "carry": {"u", "next_h", "next_stats", "total"},
    "exit": {"out"},
}

flows = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 40),
        "dim": st.sampled_from([16, 144, 512]),
        "num_blocks": st.integers(0, 13),
        "step_size": st.just(0.1),
        "read_steps": st.lists(st.integers(1, 11), min_size=1, max_size=4, unique=True).map(sorted),
    }
)


def plan_sizes(dim: int, num_blocks: int, num_steps: int) -> dict[str, int]:
    """Elements of a plan's arrays."""
    square, blocks = dim * dim, num_blocks * dim
    return {
        **{f"{name}_weight": square for name in ("input", "output", "carry")},
        **{f"{name}_bias": dim for name in ("input", "output", "carry")},
        **{f"{name}_weight": num_blocks * square for name in ("first", "second")},
        **{f"{name}_bias": blocks for name in ("first", "second")},
        "block_table": num_steps * blocks * 3,
        "final_table": num_steps * 2 * dim,
    }


@given(flows)
def test_a_step_has_two_products_a_block_and_one_more(flow):
    counts = Counter(launch.kernel for launch in flow_launches(**flow))
    steps, blocks = flow["read_steps"][-1], flow["num_blocks"]
    assert counts["enter"] == 1
    assert counts["first"] == counts["second"] == steps * blocks
    assert counts["carry"] == steps - 1
    assert counts["exit"] == len(flow["read_steps"])
    if len(flow["read_steps"]) == 1:
        assert counts.total() == steps * (2 * blocks + 1) + 1


@given(flows, st.integers(1, 80))
def test_no_launch_goes_beyond_a_buffer(flow, tiles):
    rows, dim, blocks, steps = flow["rows"], flow["dim"], flow["num_blocks"], flow["read_steps"][-1]
    shapes = work_buffers(rows, dim, tiles, len(flow["read_steps"]))
    sizes = plan_sizes(dim, blocks, steps)
    for name, (shape, _) in shapes.items():
        sizes[name] = 1
        for length in shape:
            sizes[name] *= length
    taken = {"weight": dim * dim, "bias": dim, "stats": rows * tiles * 2, "next_stats": rows * tiles * 2}
    touched: Counter[str] = Counter()
    for launch in flow_launches(**flow):
        taken["table"] = (3 if launch.kernel in {"first", "second"} else 2) * dim
        for name, value in launch.arguments.items():
            if isinstance(value, Place):
                assert value.offset >= 0
                assert value.offset + taken.get(name, rows * dim) <= sizes[value.buffer], (launch.kernel, name)
                touched[value.buffer] = max(touched[value.buffer], value.offset + taken.get(name, rows * dim))
    # Every weight and table is used to its end.
    for name, size in plan_sizes(dim, blocks, steps).items():
        if size and (steps > 1 or not name.startswith("carry")):
            assert touched[name] == size


@given(flows)
def test_no_launch_writes_what_it_reads_by_whole_rows(flow):
    for launch in flow_launches(**flow):
        buffers = {name: value.buffer for name, value in launch.arguments.items() if isinstance(value, Place)}
        read = {buffers[name] for name in WHOLE_ROWS[launch.kernel]}
        written = {buffers[name] for name in WRITTEN[launch.kernel]}
        if launch.kernel == "second":
            written -= {buffers["h"]}  # each program its own tile of it alone
        assert not read & written


@given(flows)
def test_each_launch_reads_what_an_earlier_one_wrote(flow):
    written = {"x"}
    for launch in flow_launches(**flow):
        buffers = {name: value.buffer for name, value in launch.arguments.items() if isinstance(value, Place)}
        read = WHOLE_ROWS[launch.kernel] | ({"u", "total"} if launch.kernel == "carry" else set())
        assert {buffers[name] for name in read} <= written
        written |= {buffers[name] for name in WRITTEN[launch.kernel]}


@given(flows)
def test_states_lie_one_after_the_other(flow):
    outs = [launch.arguments["out"] for launch in flow_launches(**flow) if launch.kernel == "exit"]
    offsets = [out.offset for out in outs if isinstance(out, Place)]
    assert offsets == [index * flow["rows"] * flow["dim"] for index in range(len(flow["read_steps"]))]
    done = [launch.arguments["done"] for launch in flow_launches(**flow) if launch.kernel == "exit"]
    assert done == flow["read_steps"]


def test_no_step_is_no_launch():
    assert not list(flow_launches(rows=3, dim=16, num_blocks=2, step_size=0.1, read_steps=()))


@pytest.mark.parametrize("kernel", FLOW_KERNELS)
def test_arguments_are_the_parameters_of_the_kernel(kernel):
    launches = flow_launches(rows=3, dim=16, num_blocks=1, step_size=0.1, read_steps=(1, 2))
    launch = next(launch for launch in launches if launch.kernel == kernel)
    assert list(launch.arguments) + CONSTANTS == list(FLOW[kernel].arg_names)
    kinds = {"int32": int, "scalar": float}
    for name, value in launch.arguments.items():
        assert type(value) is kinds.get(KINDS[name], Place)


def test_places_are_in_the_plan_or_in_the_work_buffers():
    known = {field.name for field in fields(PlanArrays)} | set(work_buffers(1, 16, 1, 1))
    for launch in flow_launches(rows=3, dim=16, num_blocks=1, step_size=0.1, read_steps=(1, 2)):
        assert {value.buffer for value in launch.arguments.values() if isinstance(value, Place)} <= known

"""Plans on disk: what is written is read, and nothing else is believed."""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fastfsl import bundle
from fastfsl.bundle import PlanArrays
from fastfsl.errors import BundleError, ConfigError, DataError, ShapeError


def _plan(num_steps: int = 2, num_blocks: int = 2, dim: int = 3) -> PlanArrays:
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    blocks, d = num_blocks, dim
    return PlanArrays(
        step_size=0.1,
        input_weight=noise(d, d),
        input_bias=noise(d),
        first_weight=noise(blocks, d, d),
        first_bias=noise(blocks, d),
        second_weight=noise(blocks, d, d),
        second_bias=noise(blocks, d),
        output_weight=noise(d, d),
        output_bias=noise(d),
        carry_weight=noise(d, d),
        carry_bias=noise(d),
        block_table=noise(num_steps, blocks, 3, d),
        final_table=noise(num_steps, 2, d),
    )


# No steps: the selection may keep zero-shot. No blocks: the field is one linear layer. One dimension: nothing squeezes.
@pytest.mark.parametrize(("steps", "blocks", "dim"), [(2, 2, 3), (0, 2, 3), (2, 0, 3), (0, 0, 3), (1, 1, 1)])
def test_plan_round_trip(steps, blocks, dim, tmp_path):
    plan = _plan(steps, blocks, dim)
    bundle.write_plan(tmp_path / "plan", plan)
    read = bundle.read_plan(tmp_path / "plan")
    assert (read.num_steps, read.num_blocks, read.dim, read.step_size) == (steps, blocks, dim, 0.1)
    for name, array in plan.arrays().items():
        np.testing.assert_array_equal(read.arrays()[name], array)
        assert read.arrays()[name].dtype == np.float32
    assert list(tmp_path.iterdir()) == [tmp_path / "plan"]


def test_equal_plans_give_equal_bytes_in_every_process(tmp_path):
    bundle.write_plan(tmp_path / "here", _plan())
    code = (
        "import sys; from fastfsl import bundle; "
        "bundle.write_plan(sys.argv[2], bundle.read_plan(sys.argv[1]))"  # the library's metadata order is per process
    )
    for name in ("a", "b", "c"):
        subprocess.run([sys.executable, "-c", code, tmp_path / "here", tmp_path / name], check=True)
        assert (tmp_path / name).read_bytes() == (tmp_path / "here").read_bytes()


@pytest.mark.parametrize("name", [name for name in _plan().arrays() if name != "input_weight"])
def test_plan_shapes_are_checked(name):
    array = _plan().arrays()[name]
    with pytest.raises(ShapeError, match=name):
        PlanArrays(step_size=0.1, **{**_plan().arrays(), name: np.concatenate([array, array], axis=-1)})


def test_plan_values_are_checked():
    with pytest.raises(ShapeError, match="float32"):
        replace(_plan(), carry_bias=np.zeros(3))
    with pytest.raises(DataError, match="carry_bias holds NaN"):
        replace(_plan(), carry_bias=np.array([0, np.nan, 0], np.float32))
    wrong: list[Any] = [0.0, -0.1, float("nan"), float("inf"), "0.1", True]
    for step_size in wrong:
        with pytest.raises(DataError, match="step_size"):
            replace(_plan(), step_size=step_size)


def _plan_bytes(tensors=None, **metadata) -> bytes:
    known = {"format": "fastfsl-flow-plan", "version": "1", "step_size": "0.1"}
    return save(_plan().arrays() if tensors is None else tensors, {**known, **metadata})


def _with_header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"\xff" * 8 + b"{}", "header claims"),
        (struct.pack("<Q", 2**40) + b"{}", "header claims"),
        (_with_header(" " * 70_000), "header claims"),
        (_with_header('{"a": NaN}'), "not valid JSON"),
        (_with_header('{"a": 1, "a": 1}'), "twice"),
        (_with_header("[]"), "JSON object"),
        (_with_header("{}"), "not a fastfsl flow plan"),
        (save(_plan().arrays()), "not a fastfsl flow plan"),
        (_plan_bytes(format="other"), "not a fastfsl flow plan"),
        (_plan_bytes(version="2"), "newer fastfsl"),
        (_plan_bytes(step_size="nan"), "step_size"),
        (_plan_bytes(step_size="quick"), "could not convert"),
        (_plan_bytes({"input_bias": np.zeros(3, np.float32)}), "expected the arrays"),
        (_plan_bytes({**_plan().arrays(), "extra": np.zeros(1, np.float32)}), "expected the arrays"),
        (_plan_bytes({**_plan().arrays(), "carry_bias": np.zeros(3)}), "carry_bias must be float32"),
        (_plan_bytes({**_plan().arrays(), "carry_bias": np.zeros(4, np.float32)}), "carry_bias must have shape"),
        (_plan_bytes({**_plan().arrays(), "carry_bias": np.full(3, np.inf, np.float32)}), "carry_bias holds NaN"),
        (_plan_bytes()[:-1], "plan.safetensors"),
        (_plan_bytes() + b"\0", "plan.safetensors"),
    ],
)
def test_hostile_plans(data, message, tmp_path):
    path = tmp_path / "plan.safetensors"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=message) as caught:
        bundle.read_plan(path)
    assert str(path) in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=5))
def test_damaged_plans_raise_only_bundle_errors(edits, tmp_path):
    data = bytearray(_plan_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path = tmp_path / "plan.safetensors"
    path.write_bytes(bytes(data))
    try:
        plan = bundle.read_plan(path)
    except BundleError:
        return
    assert sorted(plan.arrays()) == sorted(load(bytes(data)))


def test_a_missing_plan_and_an_unwritable_one(tmp_path):
    with pytest.raises(BundleError, match="missing"):
        bundle.read_plan(tmp_path / "none")
    with pytest.raises(BundleError, match="regular file"):
        bundle.read_plan(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write"):
        bundle.write_plan(tmp_path / "file" / "plan", _plan())

"""Read-outs: what is written is read and computes the equation, and nothing else is believed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fastfsl import bundle
from fastfsl.bundle import KernelArrays, Readout
from fastfsl.errors import BundleError, ConfigError, DataError, ShapeError

VALUES: dict[str, Any] = {"flow_weight": 0.5, "temperature": 2.0, "threshold": 0.3, "betas": [5.5, 1.0]}


def _readout(dim: int = 3, classes: int = 4, keys: tuple[int, ...] = (5, 2), **scalars: Any) -> Readout:
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    kernels = tuple(
        KernelArrays(noise(n, dim), noise(n, classes), beta) for n, beta in zip(keys, VALUES["betas"], strict=False)
    )
    known = {key: value for key, value in VALUES.items() if key != "betas"}
    return Readout(
        linear_weight=noise(classes, dim), linear_bias=noise(classes), kernels=kernels, **{**known, **scalars}
    )


def _arrays(readout: Readout) -> dict[str, np.ndarray]:
    arrays = {"linear_weight": readout.linear_weight, "linear_bias": readout.linear_bias}
    for index, kernel in enumerate(readout.kernels):
        arrays |= {f"kernel{index}_keys": kernel.keys, f"kernel{index}_values": kernel.values}
    return arrays


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dim=st.integers(1, 4),
    classes=st.integers(1, 4),
    keys=st.lists(st.integers(1, 6), max_size=2).map(tuple),
    flow_weight=st.floats(0, 1e6),
    temperature=st.floats(1e-3, 1e3),
    threshold=st.none() | st.floats(0, 1),
)
def test_round_trip(tmp_path, dim, classes, keys, **scalars):
    readout = _readout(dim, classes, keys, **scalars)
    bundle.write_readout(tmp_path / "readout", readout)
    data = (tmp_path / "readout").read_bytes()
    for read in (bundle.read_readout(tmp_path / "readout"), bundle.read_readout("nowhere", data)):
        for name, value in scalars.items():
            assert getattr(read, name) == value
        assert [kernel.beta for kernel in read.kernels] == [kernel.beta for kernel in readout.kernels]
        assert list(_arrays(read)) == list(_arrays(readout))
        for name, array in _arrays(readout).items():
            np.testing.assert_array_equal(_arrays(read)[name], array)
            assert _arrays(read)[name].dtype == np.float32
    assert list(tmp_path.iterdir()) == [tmp_path / "readout"]


def test_equal_readouts_give_equal_bytes_in_every_process(tmp_path):
    bundle.write_readout(tmp_path / "here", _readout())
    code = "import sys; from fastfsl import bundle; bundle.write_readout(sys.argv[2], bundle.read_readout(sys.argv[1]))"
    for name in ("a", "b", "c"):
        subprocess.run([sys.executable, "-c", code, tmp_path / "here", tmp_path / name], check=True)
        assert (tmp_path / name).read_bytes() == (tmp_path / "here").read_bytes()


# ------------------------------------------------------------------------------------------------------------- logits


def _unit(rows: np.ndarray) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_logits_are_those_of_the_equation(monkeypatch):
    readout = _readout()
    rng = np.random.default_rng(1)
    x, flow_logits = _unit(rng.normal(size=(7, 3))), rng.normal(size=(7, 4)).astype(np.float32)
    expected = 0.5 * flow_logits
    for i, row in enumerate(x):
        expected[i] += readout.linear_weight @ row + readout.linear_bias
        for kernel in readout.kernels:
            for key, value in zip(kernel.keys, kernel.values, strict=True):
                expected[i] += np.exp(-kernel.beta * (1 - key @ row)) * value
    expected /= 2.0
    logits = readout.apply(x, flow_logits)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=2e-5)
    monkeypatch.setattr("fastfsl.bundle.readout._AFFINITIES_AT_ONCE", 11)  # two rows of five keys
    np.testing.assert_allclose(readout.apply(x, flow_logits), logits, rtol=1e-6)
    assert readout.apply(x[:0], flow_logits[:0]).shape == (0, 4)


def test_parts_that_are_not_there_add_nothing():
    x = _unit(np.random.default_rng(1).normal(size=(2, 3)))
    readout = _readout(keys=(), flow_weight=0.0, temperature=1.0)
    expected = x @ readout.linear_weight.T + readout.linear_bias
    np.testing.assert_allclose(readout.apply(x), expected, rtol=1e-5)
    np.testing.assert_allclose(readout.apply(x, np.ones((2, 4), np.float32)), expected, rtol=1e-5)


def test_terms_that_cancel_keep_their_difference():
    """Every key stands twice, with values that are large and nearly opposite: sums in float32 would lose the rest."""
    rng = np.random.default_rng(0)
    keys, x = _unit(rng.normal(size=(500, 64))).astype(np.float32), _unit(rng.normal(size=(5, 64)))
    large = (1e4 * rng.normal(size=(500, 4))).astype(np.float32)
    opposite = (rng.normal(size=(500, 4)) - large).astype(np.float32)
    kernel = KernelArrays(np.concatenate([keys, keys]), np.concatenate([large, opposite]), 1.0)
    zero = np.zeros((4, 64), np.float32)
    expected = np.exp(x @ keys.astype(np.float64).T - 1) @ (large.astype(np.float64) + opposite)
    np.testing.assert_allclose(Readout(0.0, zero, zero[:, 0], (kernel,)).apply(x), expected, atol=1e-5)


def test_rows_and_flow_logits_must_fit():
    readout = _readout()
    x, flow_logits = np.ones((2, 3)), np.ones((2, 4), np.float32)
    for features in (np.ones((2, 4)), np.ones(3)):
        with pytest.raises(ShapeError, match=r"features \(n, 3\)"):
            readout.apply(features, flow_logits)
    with pytest.raises(ShapeError, match=r"flow_weight is .*, got None"):
        readout.apply(x)
    with pytest.raises(ShapeError, match=r"flow_logits \(2, 4\), got \(1, 4\)"):
        readout.apply(x, flow_logits[:1])


def test_values_too_large_give_infinity_without_a_warning():
    huge = np.full((1, 3), 3e38, np.float32)
    kernel = KernelArrays(huge, np.ones((1, 4), np.float32), 1.0)
    logits = _readout(flow_weight=0.0, keys=())
    assert not np.isfinite(replace(logits, kernels=(kernel,)).apply(np.ones((1, 3)))).any()


# ------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("flow_weight", [-0.1, float("nan"), float("inf"), "1", True, None]),
        ("temperature", [0.0, -1.0, float("nan"), float("inf"), "1", True, None]),
        ("threshold", [-0.1, 1.1, float("nan"), float("inf"), "1", True]),
    ],
)
def test_scalars_are_checked(name, values):
    for value in values:
        with pytest.raises(DataError, match=name):
            _readout(**{name: value})


def test_arrays_are_checked():
    weight, bias = np.ones((4, 3), np.float32), np.ones(4, np.float32)
    for wrong in (weight.astype(np.float64), weight[0], weight[:0], weight[:, :0]):
        with pytest.raises(ShapeError, match="linear_weight"):
            Readout(0.0, wrong, bias)
    for wrong in (bias.astype(np.float64), bias[:3], weight):
        with pytest.raises(ShapeError, match="linear_bias"):
            Readout(0.0, weight, wrong)
    with pytest.raises(DataError, match="linear_bias holds NaN"):
        Readout(0.0, weight, np.array([0, np.nan, 0, 0], np.float32))
    keys, values = np.ones((5, 3), np.float32), np.ones((5, 4), np.float32)
    for wrong in (keys.astype(np.float64), keys[0], keys[:0]):
        with pytest.raises(ShapeError, match="keys"):
            KernelArrays(wrong, values, 1.0)
    with pytest.raises(ShapeError, match="values must have shape"):
        KernelArrays(keys, values[:4], 1.0)
    with pytest.raises(DataError, match="values holds NaN"):
        KernelArrays(keys, np.full((5, 4), np.inf, np.float32), 1.0)
    wrong_betas: list[Any] = [0.0, -1.0, float("nan"), float("inf"), "1", True]
    for beta in wrong_betas:
        with pytest.raises(DataError, match="beta"):
            KernelArrays(keys, values, beta)
    with pytest.raises(ShapeError, match="kernel0_keys"):
        Readout(0.0, weight, bias, (KernelArrays(keys[:, :2].copy(), values, 1.0),))
    with pytest.raises(ShapeError, match="kernel0_values"):
        Readout(0.0, weight, bias, (KernelArrays(keys, values[:, :3].copy(), 1.0),))


def _bytes(arrays=None, values: Any = None, **metadata) -> bytes:
    text = values if isinstance(values, str) else json.dumps({**VALUES, **(values or {})})
    known = {"format": "fastfsl-readout", "version": "1", "values": text}
    return save(_arrays(_readout()) if arrays is None else arrays, {**known, **metadata})


def _with(**arrays) -> dict[str, np.ndarray]:
    return {**_arrays(_readout()), **arrays}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (struct.pack("<Q", 2**40) + b"{}", "header claims"),
        (save(_arrays(_readout())), "not a fastfsl read-out"),
        (_bytes(format="fastfsl-flow-plan"), "not a fastfsl read-out"),
        (_bytes(version="2"), "newer fastfsl"),
        (_bytes(values="{"), "not valid JSON"),
        (_bytes(values="[]"), "JSON object"),
        (_bytes(values="{}"), "expected the values"),
        (_bytes(values={"surprise": 1}), "expected the values"),
        (_bytes(values={"betas": 1}), "expected the values"),
        (_bytes(values={"betas": [1.0]}), "expected the arrays"),
        (_bytes(values={"betas": [1.0, 1.0, 1.0]}), "expected the arrays"),
        (_bytes(values={"betas": [1.0, 0.0]}), "beta must be"),
        (_bytes(values={"betas": [1.0, [1.0]]}), "beta must be"),
        (_bytes(values={"temperature": 0}), "temperature must be"),
        (_bytes(values={"temperature": "warm"}), "temperature must be"),
        (_bytes(values={"threshold": 2}), "threshold must be"),
        (_bytes(values={"flow_weight": -1}), "flow_weight must be"),
        (_bytes(values='{"temperature": NaN}'), "not valid JSON"),
        (_bytes(values='{"temperature": 1, "temperature": 2}'), "twice"),
        (_bytes({"linear_bias": np.zeros(4, np.float32)}), "expected the arrays"),
        (_bytes(_with(extra=np.zeros(1, np.float32))), "expected the arrays"),
        (_bytes(_with(linear_bias=np.zeros(4))), "linear_bias must be float32"),
        (_bytes(_with(linear_bias=np.zeros(5, np.float32))), "linear_bias must have shape"),
        (_bytes(_with(kernel1_keys=np.zeros((2, 9), np.float32))), "kernel1_keys must have shape"),
        (_bytes(_with(kernel0_values=np.full((5, 4), np.nan, np.float32))), "values holds NaN"),
        (_bytes()[:-1], "readout.safetensors"),
        (_bytes() + b"\0", "readout.safetensors"),
    ],
)
def test_hostile_readouts(data, message, tmp_path):
    path = tmp_path / "readout.safetensors"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=message) as caught:
        bundle.read_readout(path)
    assert str(path) in str(caught.value)
    assert "export it again" in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=5))
def test_damaged_readouts_raise_only_bundle_errors(edits):
    data = bytearray(_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    try:
        readout = bundle.read_readout("readout", bytes(data))
    except BundleError:
        return
    assert readout.temperature > 0
    assert all(np.isfinite(array).all() for array in _arrays(readout).values())


def test_a_missing_readout_and_an_unwritable_one(tmp_path):
    with pytest.raises(BundleError, match="missing"):
        bundle.read_readout(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write"):
        bundle.write_readout(tmp_path / "file" / "readout", _readout())

"""Compiled kernels on disk: what is written is read, and nothing else is believed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastfsl import bundle
from fastfsl.bundle import CompiledKernel, FlowWeights, KernelSet, KernelTarget, KernelTile, PlanArrays
from fastfsl.bundle.flow_launches import FLOW_KERNELS, flow_launches
from fastfsl.errors import BundleError, DataError, ShapeError

DIM, STEPS, BLOCKS, CLASSES, PROTOTYPES = 128, 2, 1, 3, 2
ROW_CLASSES = (64, None)
FIELDS = {
    "method": "fma",
    "class_names": ("cat", "dog", "owl"),
    "embed_dim": DIM,
    "num_steps": STEPS,
    "step_size": 0.1,
    "read_steps": [0, 2],
    "precision": "fp32",
    "logit_scale": 100,
    "preprocessing": None,
    "encoder": None,
    "versions": {},
    "metrics": {},
    "parity": {},
    "training": {},
    "created": "2026-01-02T03:04:05+00:00",
    "kernels": {"architectures": ["sm_80", "sm_90"], "dtype": "fp16"},
}


def _kernel(name: str, row_class: int | None, target: str, data: bytes) -> CompiledKernel:
    kind = "ptx" if target == "ptx" else "cubin"
    arguments = bundle.kernel_arguments(name) or (("x", "pointer"), ("n", "int32"), ("step_size", "float32"))
    return CompiledKernel(
        kernel=name,
        row_class=row_class,
        file=f"{target}/{name}_{row_class or 'more'}.{kind}",
        entry=f"{name}_kernel",
        sha256=hashlib.sha256(data).hexdigest(),
        shared_memory=49152,
        threads=128,
        tile=KernelTile(rows=64, columns=32, depth=32, warps=4, stages=3),
        arguments=arguments,
        registers=None if kind == "ptx" else 96,
        stack=None if kind == "ptx" else 0,
        cooperative=name == "persistent",
    )


def _binary(target: str, name: str, row_class: int | None) -> bytes:
    return f"{target} {name} {row_class}".encode()


def _kernels() -> KernelSet:
    targets = {}
    names = [(name, row_class) for row_class in ROW_CLASSES for name in (*FLOW_KERNELS, "logits")]
    for target, arch in (("sm_80", 80), ("sm_90", 90), ("ptx", 80)):
        wanted = [*names, ("persistent", 64)] if target == "sm_90" else names
        kernels = tuple(_kernel(*one, target, _binary(target, *one)) for one in wanted)
        targets[target] = KernelTarget(target, arch, "ptx" if target == "ptx" else "cubin", kernels)
    return KernelSet(DIM, "fp16", {"triton": "3.9.0", "ptxas": "13.0.85"}, ROW_CLASSES, targets)


def _plan() -> PlanArrays:
    rng = np.random.default_rng(0)
    sizes = {
        "input_weight": (DIM, DIM),
        "input_bias": (DIM,),
        "first_weight": (BLOCKS, DIM, DIM),
        "first_bias": (BLOCKS, DIM),
        "second_weight": (BLOCKS, DIM, DIM),
        "second_bias": (BLOCKS, DIM),
        "output_weight": (DIM, DIM),
        "output_bias": (DIM,),
        "carry_weight": (DIM, DIM),
        "carry_bias": (DIM,),
        "block_table": (STEPS, BLOCKS, 3, DIM),
        "final_table": (STEPS, 2, DIM),
    }
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    return PlanArrays(step_size=0.1, **arrays)


def _weights(dtype: str = "fp16") -> FlowWeights:
    classes = np.random.default_rng(1).normal(size=(CLASSES, PROTOTYPES, DIM)).astype(np.float32)
    return FlowWeights.from_plan(_plan(), dtype, classes, 100.0)


def _write(target: Path, fields=FIELDS, weights: FlowWeights | None = None) -> None:
    kernels = _kernels()
    with bundle.staging_folder(target) as staging:
        (staging / "flow/kernels").mkdir(parents=True)
        (staging / bundle.FLOW_GRAPH).write_bytes(b"graph")
        for built in kernels.targets.values():
            (staging / "flow/kernels" / built.name).mkdir()
            for kernel in built.kernels:
                (staging / kernel.path).write_bytes(_binary(built.name, kernel.kernel, kernel.row_class))
        bundle.write_flow_kernels(staging / bundle.FLOW_KERNELS_INDEX, kernels)
        bundle.write_flow_weights(staging / bundle.FLOW_KERNELS_WEIGHTS, weights or _weights())
        bundle.seal_bundle(staging, fields)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    _write(tmp_path / "bundle")
    return tmp_path / "bundle"


def _read(made: Path) -> KernelSet:
    kernels = bundle.read_flow_kernels(made, bundle.read_manifest(made))
    assert kernels is not None
    return kernels


def _find(kernels: KernelSet, target: str, name: str, row_class: int | None) -> CompiledKernel:
    kernel = kernels.targets[target].find(name, row_class)
    assert kernel is not None
    return kernel


def _seal_again(made: Path, change=lambda values: None) -> None:
    """Make the manifest fit the files: what remains wrong is between the files."""
    values = json.loads((made / "manifest.json").read_bytes())
    values["files"] = {
        path.relative_to(made).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in made.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    change(values)
    (made / "manifest.json").write_text(json.dumps(values), encoding="utf-8")


def _change_index(made: Path, change) -> None:
    index = made / bundle.FLOW_KERNELS_INDEX
    values = json.loads(index.read_bytes())
    change(values)
    index.write_text(json.dumps(values), encoding="utf-8")
    _seal_again(made)


# ------------------------------------------------------------------------------------------------------------ whole


def test_kernels_and_weights_are_read_as_they_were_written(made):
    manifest = bundle.check_bundle(made)
    kernels = _read(made)
    assert kernels == _kernels()
    assert kernels.architectures == ["sm_80", "sm_90"]
    assert [kernels.row_class(rows) for rows in (1, 64, 65, 10**6)] == [64, 64, None, None]
    kernel = _find(kernels, "sm_90", "first", None)
    assert bundle.read_kernel(made, manifest, kernel) == b"sm_90 first None"
    assert kernels.targets["sm_80"].find("persistent", 64) is None
    assert _find(kernels, "sm_90", "persistent", 64).cooperative

    weights = bundle.read_flow_weights(made, manifest)
    assert (weights.dim, weights.num_steps, weights.num_blocks, weights.num_classes) == (DIM, STEPS, BLOCKS, CLASSES)
    assert (weights.dtype, weights.step_size, weights.logit_scale, weights.num_prototypes) == ("fp16", 0.1, 100.0, 2)
    for name, array in _weights().arrays.items():
        np.testing.assert_array_equal(weights.arrays[name], array)
        assert weights.arrays[name].dtype == (np.float16 if name.endswith("_weight") else np.float32)
    np.testing.assert_array_equal(weights.class_embeddings, _weights().class_embeddings)


def test_a_bundle_without_kernels(tmp_path):
    with bundle.staging_folder(tmp_path / "bundle") as staging:
        (staging / "flow").mkdir()
        (staging / bundle.FLOW_GRAPH).write_bytes(b"graph")
        manifest = bundle.seal_bundle(staging, {**FIELDS, "kernels": None})
    assert bundle.read_flow_kernels(tmp_path / "bundle", manifest) is None
    with pytest.raises(BundleError, match="export it with --arch"):
        bundle.read_flow_weights(tmp_path / "bundle", manifest)


def test_equal_kernels_give_equal_bytes(made, tmp_path):
    _write(tmp_path / "again")
    for path in made.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(made)).read_bytes()


def test_the_arguments_are_those_of_the_launches():
    for launch in flow_launches(rows=1, dim=16, num_blocks=1, step_size=0.1, read_steps=(2,)):
        assert [name for name, _ in bundle.kernel_arguments(launch.kernel) or ()] == list(launch.arguments)
    kinds = dict(bundle.kernel_arguments("exit") or ())
    assert (kinds["x"], kinds["step_size"], kinds["done"], kinds["n"]) == ("pointer", "float32", "float32", "int32")


# ---------------------------------------------------------------------------------------------------------- weights


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@example([1.0 + 2**-8, 1.0 + 3 * 2**-8, -0.0, float(np.float32(3.4e38)), 1e-45])
def test_bf16_is_rounded_to_nearest_even(values):
    array = np.array(values, np.float32)
    rounded = bundle.widen(bundle.narrow(array, "bf16")).astype(np.float64)
    below = bundle.widen((array.view(np.uint32) >> 16).astype(np.uint16)).astype(np.float64)
    above = bundle.widen(((array.view(np.uint32) >> 16) + 1).astype(np.uint16)).astype(np.float64)
    finite = np.isfinite(array) & np.isfinite(above)
    to_below, to_above = np.abs(array - below)[finite], np.abs(above - array)[finite]
    even = (array.view(np.uint32) >> 16) % 2 == 0
    nearest = np.where(
        to_below == to_above,
        np.where(even, below, above)[finite],
        np.where(to_below < to_above, below[finite], above[finite]),
    )
    np.testing.assert_array_equal(rounded[finite], nearest)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(array))


@pytest.mark.parametrize(("dtype", "least_bits"), [("fp16", 11), ("bf16", 8)])
def test_weights_are_the_plan_rounded(dtype, least_bits):
    weights = _weights(dtype)
    rounded, exact = weights.to_plan().arrays(), _plan().arrays()
    for name in exact:
        if name.endswith("_weight"):
            error = np.abs(rounded[name] - exact[name])
            assert error.max() > 0
            assert (error <= 2.0**-least_bits * np.abs(exact[name]) + 2.0**-25).all()
        else:
            np.testing.assert_array_equal(rounded[name], exact[name])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weights_of_either_dtype_are_read(dtype, tmp_path):
    _write(
        tmp_path / "bundle",
        {**FIELDS, "kernels": {"architectures": ["sm_80", "sm_90"], "dtype": dtype}},
        _weights(dtype),
    )
    weights = bundle.read_flow_weights(tmp_path / "bundle", bundle.read_manifest(tmp_path / "bundle"))
    np.testing.assert_array_equal(weights.arrays["carry_weight"], _weights(dtype).arrays["carry_weight"])


def test_a_weight_too_large_for_fp16():
    arrays = _plan().arrays()
    arrays["carry_weight"] = np.full((DIM, DIM), 1e5, np.float32)
    plan = PlanArrays(step_size=0.1, **arrays)
    with pytest.raises(DataError, match="carry_weight holds NaN or infinite"):
        FlowWeights.from_plan(plan, "fp16", _weights().class_embeddings, 100.0)
    assert FlowWeights.from_plan(plan, "bf16", _weights().class_embeddings, 100.0).num_classes == CLASSES * PROTOTYPES


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dtype": "fp8"}, DataError, "dtype must be one of fp16, bf16"),
        ({"dtype": "bf16"}, ShapeError, "input_weight must be uint16 for bf16"),
        ({"logit_scale": 0.0}, DataError, "logit_scale"),
        ({"step_size": float("nan")}, DataError, "step_size"),
        ({"num_prototypes": 0}, DataError, "num_prototypes"),
        ({"num_prototypes": 4}, ShapeError, "class_embeddings"),
        ({"class_embeddings": np.zeros((6, 64), np.float32)}, ShapeError, "class_embeddings"),
        ({"class_embeddings": np.zeros((0, DIM), np.float32)}, ShapeError, "class_embeddings"),
        ({"class_embeddings": np.zeros((6, DIM))}, ShapeError, "float32"),
        ({"class_embeddings": np.full((6, DIM), np.inf, np.float32)}, DataError, "class_embeddings holds NaN"),
        ({"arrays": {}}, ShapeError, "expected the arrays"),
        ({"arrays": {**_weights().arrays, "more": np.zeros(1)}}, ShapeError, "expected the arrays"),
        ({"arrays": {**_weights().arrays, "input_bias": np.zeros(64, np.float32)}}, ShapeError, "input_bias must have"),
        (
            {"arrays": {**_weights().arrays, "carry_weight": np.zeros((DIM, 16), np.float16)}},
            ShapeError,
            "carry_weight",
        ),
        ({"arrays": {**_weights().arrays, "carry_weight": np.zeros((DIM, DIM), np.float32)}}, ShapeError, "float16"),
    ],
)
def test_weights_are_checked(changes, error, message):
    good = _weights()
    values: dict[str, Any] = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(error, match=message):
        FlowWeights(**{**values, **changes})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("embed_dim", 144, "'width': 144"),
        ("num_steps", 1, "'steps': 1"),
        ("step_size", 0.2, "'step size': 0.2"),
        ("class_names", ["cat", "dog"], "'classes': 2"),
        ("logit_scale", 50, "'logit_scale': 50"),
        ("kernels", {"architectures": ["sm_80", "sm_90"], "dtype": "bf16"}, "'dtype': 'bf16'"),
    ],
)
def test_weights_must_be_the_manifests(key, value, message, made):
    change = {key: value, **({"read_steps": []} if key == "num_steps" else {})}
    _seal_again(made, lambda values: values.update(change))
    with pytest.raises(BundleError, match=message) as caught:
        bundle.read_flow_weights(made, bundle.read_manifest(made))
    assert bundle.FLOW_KERNELS_WEIGHTS in str(caught.value)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_weights_raise_only_bundle_errors(edits, made):
    path = made / bundle.FLOW_KERNELS_WEIGHTS
    whole = path.read_bytes()
    data = bytearray(whole)
    for position, value in edits:
        data[position] = value
    path.write_bytes(bytes(data))
    _seal_again(made)
    with contextlib.suppress(BundleError):
        bundle.read_flow_weights(made, bundle.read_manifest(made))
    path.write_bytes(whole)


# ------------------------------------------------------------------------------------------------------------ index

_VALID = json.loads(_kernels().to_json())


def _nodes(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _nodes(child, (*path, key))


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["\ud800", "ptx"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(list(_nodes(_VALID))[1:]), value=_json_values, key=st.none() | st.text(max_size=5))
@example(("targets", "sm_90", "kernels", 0, "stack"), False, None)
@example(("targets", "sm_90", "kernels", 0, "cooperative"), 0, None)
@example(("row_classes", 0), 2**63, None)
def test_an_index_with_any_value_changed(place, value, key):
    values = copy.deepcopy(_VALID)
    parent = values
    for step in place[:-1]:
        parent = parent[step]
    parent[key if key is not None and isinstance(parent, dict) else place[-1]] = value
    data = json.dumps(values).encode()
    try:
        kernels = KernelSet.from_json(data)
    except BundleError:
        return
    assert KernelSet.from_json(kernels.to_json()) == kernels
    assert json.loads(kernels.to_json()) == json.loads(data)


def _edit(*place: Any, value: Any = None, drop: bool = False) -> Any:
    def change(values: Any) -> None:
        for step in place[:-1]:
            values = values[step]
        if drop:
            del values[place[-1]]
        else:
            values[place[-1]] = value

    return change


def _copy(place: tuple[Any, ...], **changes: Any) -> Any:
    """Add to a list a changed copy of one of its elements."""

    def change(values: Any) -> None:
        for step in place[:-1]:
            values = values[step]
        values.append({**values[place[-1]], **changes})

    return change


_FIRST = ("targets", "sm_90", "kernels", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edit("format_version", value=2), "newer fastfsl"),
        (_edit("format_version", value=0), "must be 1, got 0"),
        (_edit("surprise", value=1), "unknown key 'surprise'"),
        (_edit("dim", drop=True), "key 'dim' is missing"),
        (_edit("dim", value=120), "'dim' must be a multiple of 16 from 128 to 1280, got 120"),
        (_edit("dim", value=1296), "'dim' must be"),
        (_edit("dim", value=112), "'dim' must be"),
        (_edit("dim", value=136), "'dim' must be"),
        (_edit("dtype", value="fp32"), "'dtype' must be one of fp16, bf16"),
        (_edit("compiler", value={"triton": "3.9"}), "'compiler' must be"),
        (_edit("compiler", value={"triton": "3.9", "ptxas": "/somewhere"}), "'compiler' must be"),
        (_edit("row_classes", value=[None, 64]), "'row_classes' must be"),
        (_edit("row_classes", value=[64]), "'row_classes' must be"),
        (_edit("row_classes", value=[64, 64, None]), "'row_classes' must be"),
        (_edit("row_classes", value=[0, None]), "'row_classes' must be"),
        (_edit("row_classes", value=[32, None]), "once for each of the row classes"),
        (_edit("targets", value={}), "'targets' must be"),
        (_edit("targets", "sm_90", value=[]), "sm_90: expected an object"),
        (_edit("targets", "sm_90", "arch", value=80), "is called 'sm_80'"),
        (_edit("targets", "sm_90", "arch", value=75), "'arch' must be"),
        (_edit("targets", "ptx", "kind", value="cubin"), "is called 'sm_80'"),
        (_edit("targets", "sm_90", "kind", value="ptx"), "is called 'ptx'"),
        (_edit("targets", "sm_90", "kind", value="sass"), "'kind' must be one of cubin, ptx"),
        (_edit(*_FIRST, drop=True), "once for each of the row classes"),
        (_copy(_FIRST), "once for each of the row classes"),
        (_copy(_FIRST, row_class=128), "once for each of the row classes"),
        (_copy(("targets", "sm_90", "kernels", 12), row_class=128), "once for each of the row classes"),
        (_edit(*_FIRST, "kernel", value="second"), "second has the arguments"),
        (_edit(*_FIRST, "kernel", value="third"), "'kernel' must be one of enter, first"),
        (_edit(*_FIRST, "row_class", value=None), "once for each of the row classes"),
        (_edit(*_FIRST, "row_class", value=128), "once for each of the row classes"),
        (_edit(*_FIRST, "file", value="sm_80/first_64.cubin"), "must lie in sm_90/"),
        (_edit(*_FIRST, "file", value="../sm_90/first_64.cubin"), "'file' must be"),
        (_edit(*_FIRST, "file", value="sm_90/../first.cubin"), "'file' must be"),
        (_edit(*_FIRST, "file", value="/sm_90/first.cubin"), "'file' must be"),
        (_edit(*_FIRST, "file", value="sm_90/first_64.ptx"), "'file' must be"),
        (_edit(*_FIRST, "file", value="sm_90/first_64.cubin\n"), "'file' must be"),
        (_edit(*_FIRST, "entry", value="first kernel"), "'entry' must be"),
        (_edit(*_FIRST, "entry", value=""), "'entry' must be"),
        (_edit(*_FIRST, "sha256", value="A" * 64), "'sha256' must be"),
        (_edit(*_FIRST, "shared_memory", value=-1), "'shared_memory' must be"),
        (_edit(*_FIRST, "shared_memory", value=228 * 1024), "'shared_memory' must be"),
        (_edit(*_FIRST, "threads", value=256), "4 warps have 128 threads"),
        (_edit(*_FIRST, "threads", value=2048), "'threads' must be"),
        (_edit(*_FIRST, "tile", value=3), "'tile' must be"),
        (_edit(*_FIRST, "tile", "rows", value=48), "'rows' must be a power of two"),
        (_edit(*_FIRST, "tile", "columns", value=0), "'columns' must be"),
        (_edit(*_FIRST, "tile", "columns", value=64), "need the same 'columns'"),
        (_edit(*_FIRST, "tile", "stages", value=0), "'stages' must be"),
        (_edit(*_FIRST, "tile", "clusters", value=1), "unknown key 'clusters'"),
        (_edit(*_FIRST, "arguments", value=[]), "'arguments' must be"),
        (_edit(*_FIRST, "arguments", value=[["h", "pointer"]]), "first has the arguments"),
        (_edit(*_FIRST, "arguments", 0, value=["h", "int32"]), "first has the arguments"),
        (_edit(*_FIRST, "arguments", 0, value=["h", "float64"]), "'arguments' must be"),
        (_edit(*_FIRST, "arguments", 1, value=["h", "pointer"]), "'arguments' must be"),
        (_edit("targets", "sm_90", "kernels", 12, "arguments", 0, value=["x", ["pointer"]]), "'arguments' must be"),
        (_edit(*_FIRST, "registers", value=None), "a cubin has 'registers'"),
        (_edit(*_FIRST, "registers", value=256), "'registers' must be"),
        (_edit(*_FIRST, "stack", value=65537), "'stack' must be"),
        (_edit("targets", "ptx", "kernels", 0, "stack", value=0), "PTX has null"),
        (_edit(*_FIRST, "cooperative", value=True), "and no other kernel, is 'cooperative'"),
        (_edit("targets", "sm_90", "kernels", 12, "cooperative", value=False), "and no other kernel"),
    ],
)
def test_index_errors_say_what_is_wrong(change, message, made):
    _change_index(made, change)
    with pytest.raises(BundleError, match=message) as caught:
        bundle.read_flow_kernels(made, bundle.read_manifest(made))
    assert str(made / bundle.FLOW_KERNELS_INDEX) in str(caught.value)


# ------------------------------------------------------------------------------------------- index against manifest


def test_an_altered_kernel_is_not_loaded(made):
    manifest = bundle.read_manifest(made)
    kernel = _find(_read(made), "sm_80", "carry", 64)
    (made / kernel.path).write_bytes(b"sm_80 carry 46")
    with pytest.raises(BundleError, match=f"{kernel.path}: altered"):
        bundle.read_kernel(made, manifest, kernel)
    _seal_again(made)
    with pytest.raises(BundleError, match=f"another sha256 of {kernel.path}"):
        bundle.read_flow_kernels(made, bundle.read_manifest(made))


def test_files_and_index_must_name_the_same_kernels(made):
    (made / "flow/kernels/sm_90/extra.cubin").write_bytes(b"?")
    _seal_again(made)
    with pytest.raises(BundleError, match=r"extra\.cubin is listed here or in the manifest, but not in both"):
        bundle.read_flow_kernels(made, bundle.read_manifest(made))
    (made / "flow/kernels/sm_90/extra.cubin").unlink()
    (made / "flow/kernels/sm_90/first_64.cubin").unlink()
    _seal_again(made)
    with pytest.raises(BundleError, match=r"sm_90/first_64\.cubin is listed"):
        bundle.read_flow_kernels(made, bundle.read_manifest(made))


@pytest.mark.parametrize(
    "change",
    [
        {"embed_dim": 144},
        {"kernels": {"architectures": ["sm_80"], "dtype": "fp16"}},
        {"kernels": {"architectures": ["sm_90", "sm_80"], "dtype": "fp16"}},
        {"kernels": {"architectures": ["sm_80", "sm_90"], "dtype": "bf16"}},
    ],
)
def test_the_index_must_be_the_manifests(change, made):
    _seal_again(made, lambda values: values.update(change))
    with pytest.raises(BundleError, match="the manifest says"):
        bundle.read_flow_kernels(made, bundle.read_manifest(made))


def test_sizes_are_bounded_before_anything_is_read(made, monkeypatch):
    manifest = bundle.read_manifest(made)
    kernels = _read(made)
    monkeypatch.setattr("fastfsl.bundle.flow_kernels.MAX_KERNEL_BYTES", 10)
    with pytest.raises(BundleError, match="more than the 10 allowed"):
        bundle.read_flow_kernels(made, manifest)
    with pytest.raises(BundleError, match="more than the 10 allowed"):
        bundle.read_kernel(made, manifest, kernels.targets["ptx"].kernels[0])
    monkeypatch.setattr("fastfsl.bundle.flow_kernels.MAX_INDEX_BYTES", 10)
    with pytest.raises(BundleError, match=r"kernels\.json: \d+ bytes, more than the 10 allowed"):
        bundle.read_flow_kernels(made, manifest)
    monkeypatch.setattr("fastfsl.bundle.verify.MAX_FILE_BYTES", 10)
    with pytest.raises(BundleError, match=r"weights\.safetensors: \d+ bytes, more than the 10 allowed"):
        bundle.read_flow_weights(made, manifest)


_MANIFEST_VALUES: dict[str, Any] = {"architectures": ["sm_80", "sm_90"], "dtype": "fp16"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "'kernels' must be null, or an object"),
        ([], "'kernels' must be"),
        ({**_MANIFEST_VALUES, "more": 1}, "'kernels' must be"),
        ({**_MANIFEST_VALUES, "architectures": []}, "'kernels' must be"),
        ({**_MANIFEST_VALUES, "architectures": ["sm_9x"]}, "'kernels' must be"),
        ({**_MANIFEST_VALUES, "architectures": [90]}, "'kernels' must be"),
        ({**_MANIFEST_VALUES, "architectures": "sm_90"}, "'kernels' must be"),
        ({**_MANIFEST_VALUES, "dtype": "fp32"}, "'kernels' must be"),
        ({**_MANIFEST_VALUES, "dtype": ["fp16"]}, "'kernels' must be"),
        (None, "'kernels' is null, but 'files' lists flow/kernels/kernels.json"),
    ],
)
def test_the_manifests_word_on_kernels(value, message, made):
    _seal_again(made, lambda values: values.update(kernels=value))
    with pytest.raises(BundleError, match=message):
        bundle.read_manifest(made)


@pytest.mark.parametrize("name", [bundle.FLOW_GRAPH, bundle.FLOW_KERNELS_INDEX, bundle.FLOW_KERNELS_WEIGHTS])
def test_kernels_need_their_index_weights_and_flow(name, made):
    def change(values):
        del values["files"][name]
        if name == bundle.FLOW_GRAPH:
            values["files"]["heads/readout.safetensors"] = values["files"][bundle.FLOW_KERNELS_INDEX]
            values.update(num_steps=0, step_size=None, read_steps=[])

    _seal_again(made, change)
    with pytest.raises(BundleError, match=f"with 'kernels', 'files' must list.*{name}"):
        bundle.read_manifest(made)

"""int8 at the command line: one fact in `inspect`, `predict --json` and `describe`, and the way around a refusal."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from fastfsl import bundle
from fastfsl.bundle.int8_weights import Int8Products
from fastfsl.export.quantization import calibrate, quantize
from fastfsl.runtime import Classifier, int8_sums
from fastfsl.runtime.session import create_session

FEEDS = {
    bundle.VISUAL_GRAPH: {"images": np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)},
    bundle.FLOW_GRAPH: {"image_embeds": np.eye(5, dtype=np.float32)},
}


@pytest.fixture(scope="module")
def write_int8(image_bundle, tmp_path_factory):
    """Writes the image bundle in int8, as today or, `old`, as before its weights were limited."""

    def write(*, old):
        source, target = bundle.read_manifest(image_bundle), tmp_path_factory.mktemp("int8") / "bundle"
        fields = {name: getattr(source, name) for name in source.__dataclass_fields__}
        for name in ("format_version", "files", "created"):
            del fields[name]
        record = None if old else {"max_pair_sum": 127}
        with bundle.staging_folder(target) as staging:
            for name in source.files:
                path = staging / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes((image_bundle / name).read_bytes())
                if name in FEEDS:
                    path.write_bytes(_int8(onnx.load(path), FEEDS[name], old=old))
            bundle.seal_bundle(staging, {**fields, "precision": "int8", "int8": record})
        return target

    return write


def _int8(model, feed, *, old):
    ranges = calibrate(model, [feed], lambda data: create_session(data, "a graph", device="cpu", num_threads=1))
    int8, _ = quantize(model, ranges)
    for tensor in int8.graph.initializer if old else ():
        if tensor.data_type == onnx.TensorProto.INT8:
            full = np.clip(2 * numpy_helper.to_array(tensor).astype(int), -127, 127).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(full, tensor.name))
    return int8.SerializeToString()


@pytest.fixture(scope="module")
def new(write_int8):
    return write_int8(old=False)


@pytest.fixture(scope="module")
def old(write_int8):
    return write_int8(old=True)


@pytest.fixture
def no_wide_sums(monkeypatch):
    """A processor with AVX2 and without VNNI."""
    monkeypatch.setattr(int8_sums, "sums_saturate", lambda: True)


@pytest.fixture
def image_file(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("name", ["new", "old"])
def test_the_same_fact_everywhere(fastfsl, request, image_file, name):
    path = request.getfixturevalue(name)
    with Classifier.load(path, device="cpu", num_threads=1, wide_int8=True) as classifier:
        described = classifier.describe()["int8"]
    assert described["any_processor"] is (name == "new")
    inspected = fastfsl("inspect", path, "--json").document["int8"]
    predicted = fastfsl("predict", path, image_file, "--wide-int8", "--json").document["int8"]
    assert predicted == described == {**inspected, "widened": described["widened"]}
    words = " ".join(fastfsl("inspect", path).stdout.split())
    assert "max_pair_sum" in words or "max pair sum" in words


def test_float32_has_none_of_it(fastfsl, image_bundle, image_file):
    assert fastfsl("inspect", image_bundle, "--json").document["int8"] is None
    assert fastfsl("predict", image_bundle, image_file, "--json").document["int8"] is None


def test_a_new_bundle_is_silent_where_sums_are_cut_off(fastfsl, new, image_file, no_wide_sums):
    result = fastfsl("predict", new, image_file, "--json")
    assert result.exit_code == 0
    assert result.stderr.strip() == ""
    assert result.document["int8"] == {**Int8Products(127).describe(), "widened": False}


@pytest.fixture
def features(tmp_path):
    """A test split of the bundle's classes."""
    rows = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    labels = np.arange(6) % 3
    np.savez(
        tmp_path / "features.npz",
        train_features=rows,
        train_labels=labels,
        test_features=rows,
        test_labels=labels,
        class_embeddings=np.eye(3, 5, dtype=np.float32),
        class_names=np.array(["ant", "bee", "cow"]),
    )
    return tmp_path / "features.npz"


@pytest.mark.parametrize("command", ["predict", "evaluate", "bench"])
def test_an_old_bundle_is_refused_with_the_remedy_or_runs_when_told_to(
    fastfsl, old, image_file, features, no_wide_sums, monkeypatch, command
):
    more = {"predict": [image_file], "evaluate": [features], "bench": ["--batch", "1", "--seconds", "0.05", "-q"]}[
        command
    ]
    refused = fastfsl(command, old, *more, "--json")
    assert refused.exit_code == 2
    words = " ".join(refused.stderr.split())
    assert "export its run again with this version" in words
    assert "--wide-int8" in words
    # The process of its own that bench starts asks the real processor.
    result = fastfsl(command, old, *more, "--wide-int8", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.strip() == ""


def test_the_way_around_is_for_bundles(fastfsl, features, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    result = fastfsl("evaluate", tmp_path, features, "--wide-int8")
    assert result.exit_code == 2
    assert "--wide-int8 is about bundles" in " ".join(result.stderr.split())

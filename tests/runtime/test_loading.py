"""Loading bundles that are damaged, or whose graphs are not what the manifest says."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fastfsl.errors import BundleError
from fastfsl.runtime import Classifier
from fastfsl.runtime.session import check_graph


def _load(path) -> Classifier:
    return Classifier.load(path, device="cpu", num_threads=1)


@pytest.mark.parametrize("name", ["visual/model.onnx", "flow/model.onnx"])
@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_every_listed_file_is_checked(write, tmp_path, name, damage):
    path = write(tmp_path / "bundle")
    data = (path / name).read_bytes()
    (path / name).unlink()
    if damage == "altered":
        (path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=damage) as caught:
        _load(path)
    assert str(path / name) in str(caught.value)


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no such bundle"):
        _load(tmp_path / "none")


def test_what_runs_is_what_was_hashed(write, tmp_path, make_flow, reference):
    """A file exchanged after loading changes nothing: the session was made from the checked bytes."""
    path = write(tmp_path / "bundle")
    classifier = _load(path)
    before = classifier.feature_probabilities(np.eye(6))
    (path / "flow" / "model.onnx").write_bytes(
        make_flow(-reference.class_embeddings, reference.rotation).SerializeToString()
    )
    np.testing.assert_array_equal(classifier.feature_probabilities(np.eye(6)), before)
    with pytest.raises(BundleError, match="altered"):
        _load(path)


@pytest.mark.parametrize("name", ["visual/model.onnx", "flow/model.onnx"])
def test_float16_under_a_manifest_of_fp32_never_reaches_onnxruntime(tmp_path, name):
    """Where it does, the process may end: so another one loads it."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = tmp_path / "forged"
    shutil.copytree(Path(__file__).parents[1] / "golden" / "v1" / "images", path)
    half = convert_float_to_float16(onnx.load(path / name), keep_io_types=True).SerializeToString()
    (path / name).write_bytes(half)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][name] = {"sha256": hashlib.sha256(half).hexdigest(), "size": len(half)}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    code = f"from fastfsl.runtime import Classifier; Classifier.load({str(path)!r}, device='auto')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, "BundleError" in ended.stderr) == (1, True), ended.stderr
    assert re.search(f"{name}: .*computes in float16.*export it again", ended.stderr)


def test_float16_is_allowed_to_a_bundle_that_says_so(write, tmp_path, monkeypatch):
    """As far as the check of its graphs, which is told so; on what device that can be is `graph_device`'s matter."""
    told = []
    monkeypatch.setattr("fastfsl.runtime.loading.graph_device", lambda precision, device: "cuda")
    monkeypatch.setattr("fastfsl.runtime.session.load_onnxruntime", lambda: None)
    monkeypatch.setattr("fastfsl.runtime.session._create_on_cuda", lambda *args, **_: Path("no session"))
    monkeypatch.setattr("fastfsl.runtime.session.check_graph_file", lambda *_, half: told.append(half))
    for precision in ("fp32", "fp16"):
        with pytest.raises(AttributeError):
            _load(write(tmp_path / precision, precision=precision))
    assert told == [False, True]


def test_hashes_do_not_make_garbage_a_model(write, tmp_path):
    with pytest.raises(BundleError, match=r"flow/model\.onnx: not a graph that fastfsl runs"):
        _load(write(tmp_path / "bundle", flow=b"garbage"))
    with pytest.raises(BundleError, match=r"visual/model\.onnx: not a graph that fastfsl runs"):
        _load(write(tmp_path / "other", visual=b""))


def test_weights_outside_the_model_are_refused(write, tmp_path, monkeypatch, make_flow, reference):
    """A graph may name files to read its weights from; none is read, not even from the working directory."""
    monkeypatch.chdir(tmp_path)
    reference.rotation.tofile("weights.bin")
    for number, location in enumerate(("weights.bin", str(tmp_path / "weights.bin"), "../weights.bin")):
        model = make_flow(reference.class_embeddings, reference.rotation)
        (rotation,) = (tensor for tensor in model.graph.initializer if tensor.name == "rotation")
        rotation.ClearField("raw_data")
        rotation.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(reference.rotation.nbytes))):
            rotation.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
        with pytest.raises(BundleError, match="weights in another file"):
            _load(write(tmp_path / f"bundle{number}", flow=model.SerializeToString()))


def test_graphs_must_have_the_promised_inputs_and_outputs(write, tmp_path, make_visual, make_flow, reference):
    narrow = make_visual(reference.projection[:, :5])
    small = make_visual(reference.projection[: 4 * 4 * 3], size=(4, 4))
    fixed = make_visual(reference.projection, batch=1)
    renamed = make_visual(reference.projection)
    renamed.graph.output[0].name = renamed.graph.node[-1].output[0] = "embedding"
    for name, model in {"narrow": narrow, "small": small, "fixed": fixed, "renamed": renamed}.items():
        with pytest.raises(BundleError, match=r"visual/model\.onnx: expected the (input|output)"):
            _load(write(tmp_path / name, visual=model.SerializeToString()))
    wide = make_flow(np.ones((4, 7), np.float32), np.eye(7, dtype=np.float32))
    with pytest.raises(BundleError, match=r"flow/model\.onnx: expected the input image_embeds"):
        _load(write(tmp_path / "wide", flow=wide.SerializeToString()))


def test_an_output_without_dimensions_is_refused(tmp_path):
    node = SimpleNamespace(name="features", type="tensor(float)", shape=[])
    session: Any = SimpleNamespace(get_inputs=list, get_outputs=lambda: [node])
    with pytest.raises(BundleError, match=r"expected the output features of shape \(batch, 6\)"):
        check_graph(tmp_path, session, {}, {"features": [6]})


def test_what_onnxruntime_cannot_compute_is_an_error_of_ours(write, tmp_path, make_flow, reference):
    """Shapes that only the run finds out to be wrong."""
    model = make_flow(reference.class_embeddings, reference.rotation)
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 5])
    model.graph.initializer.append(shape)
    model.graph.node.insert(0, helper.make_node("Reshape", ["image_embeds", "shape"], ["reshaped"]))
    model.graph.node[1].input[0] = "reshaped"
    with pytest.raises(BundleError, match=r"onnxruntime cannot (load|compute)"):
        _load(write(tmp_path / "bundle", flow=model.SerializeToString()))


def test_the_graph_must_have_as_many_classes_as_the_manifest(write, tmp_path):
    with pytest.raises(BundleError, match="4 logits for 3 class names"):
        _load(write(tmp_path / "bundle", class_names=("a", "b", "c")))


def test_preprocessing_of_the_manifest_is_checked(write, tmp_path):
    with pytest.raises(BundleError, match=r"manifest\.json.*'image_size'"):
        _load(write(tmp_path / "bundle", preprocessing={"mean": [0, 0, 0]}))


def test_a_graph_that_gives_nan_is_not_believed(write, tmp_path, make_flow, reference):
    model = make_flow(reference.class_embeddings, reference.rotation, scale=float("nan"))
    classifier = _load(write(tmp_path / "bundle", flow=model.SerializeToString()))
    with pytest.raises(BundleError, match="NaN"):
        classifier.feature_probabilities(np.eye(6))


def test_manifest_values_reach_the_classifier(write, tmp_path):
    path = write(tmp_path / "bundle", class_names=("ä", "b", "c", "d"), num_steps=0)
    classifier = _load(path)
    assert classifier.class_names == ("ä", "b", "c", "d")
    assert classifier.describe()["num_steps"] == 0 == json.loads((path / "manifest.json").read_bytes())["num_steps"]


def test_zero_classes_of_the_graph_are_an_error_not_a_crash(write, tmp_path):
    nodes = [
        helper.make_node("Identity", ["image_embeds"], ["features"]),
        helper.make_node("Slice", ["image_embeds", "none", "none", "axis"], ["logits"]),
    ]
    tensors = [
        helper.make_tensor("none", TensorProto.INT64, [1], [0]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("image_embeds", 6), ("features", 6), ("logits", "classes"))
    ]
    graph = helper.make_graph(nodes, "none", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(BundleError, match="logits"):
        _load(write(tmp_path / "bundle", flow=model.SerializeToString()))

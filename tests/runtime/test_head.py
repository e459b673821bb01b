"""Bundles with a flow, a read-out or both, against the same computation in numpy; thresholds; read-outs that lie."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastfsl.bundle import KernelArrays, Readout
from fastfsl.errors import BundleError
from fastfsl.runtime import Classifier

CLASSES, WIDTH, SCALE = 4, 6, 20.0


def _readout(flow_weight: float = 0.7, *, kernels: int = 2, **scalars: Any) -> Readout:
    rng = np.random.default_rng(5)

    def noise(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    parts = tuple(KernelArrays(0.4 * noise(n, WIDTH), noise(n, CLASSES), beta) for n, beta in ((8, 5.5), (3, 1.0)))
    return Readout(flow_weight, 3 * noise(CLASSES, WIDTH), noise(CLASSES), parts[:kernels], **scalars)


def _softmax(logits) -> Any:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _expected(reference, readout: Readout, features) -> Any:
    x = np.asarray(features, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    logits = readout.flow_weight * SCALE * reference.transport(x) @ reference.class_embeddings.T
    logits = logits + x @ readout.linear_weight.T + readout.linear_bias
    for kernel in readout.kernels:
        logits = logits + np.exp(-kernel.beta * (1 - x @ kernel.keys.T)) @ kernel.values
    return _softmax(logits / readout.temperature)


def _load(path) -> Classifier:
    return Classifier.load(path, device="cpu", num_threads=1, max_batch=4)


@pytest.mark.parametrize("with_encoder", [True, False], ids=["images", "features"])
@pytest.mark.parametrize(
    ("with_flow", "readout"),
    [
        (False, _readout(0.0)),
        (False, _readout(0.0, kernels=0)),
        (True, _readout()),
        (True, _readout(temperature=2.5, threshold=0.4)),
        (False, _readout(0.0, temperature=0.5)),
    ],
    ids=["read-out", "linear", "both", "both, tempered", "read-out, tempered"],
)
def test_every_combination_of_parts(write, tmp_path, reference, photos, with_encoder, with_flow, readout):
    path = write(tmp_path / "bundle", with_encoder=with_encoder, with_flow=with_flow, readout=readout)
    classifier = _load(path)
    features = np.random.default_rng(0).normal(size=(600, WIDTH)) * 50
    expected = _expected(reference, readout, features)
    probabilities = classifier.feature_probabilities(features)
    np.testing.assert_allclose(probabilities, expected, atol=2e-5)
    labels = [prediction.label for prediction in classifier.classify_features(features)]
    assert labels == [classifier.class_names[index] for index in probabilities.argmax(axis=1)]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    moved = reference.transport(features) if with_flow else unit
    np.testing.assert_allclose(classifier.transport(features), moved, atol=1e-6)
    assert classifier.feature_probabilities([]).shape == (0, CLASSES)
    graphs = [name for name, there in (("visual", with_encoder), ("flow", with_flow)) if there]
    assert list(classifier.describe()["providers"]) == graphs
    if with_encoder:
        expected = _expected(reference, readout, reference.embed(photos))
        np.testing.assert_allclose(classifier.probabilities(photos), expected, atol=2e-5)
        assert len(classifier.predict(photos)) == len(photos)


def test_a_single_feature_and_many_are_classified_alike(write, tmp_path):
    classifier = _load(write(tmp_path / "bundle", readout=_readout()))
    features = np.random.default_rng(0).normal(size=(9, WIDTH))
    many = classifier.feature_probabilities(features)
    for row, expected in zip(features, many, strict=True):
        np.testing.assert_allclose(classifier.feature_probabilities(row)[0], expected, atol=1e-6)


def test_threads_share_the_parts(write, tmp_path):
    classifier = _load(write(tmp_path / "bundle", readout=_readout()))
    features = np.random.default_rng(0).normal(size=(9, WIDTH))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: classifier.feature_probabilities(features), range(40)))
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_the_threshold_tells_known_from_unknown(write, tmp_path, photos):
    features = np.random.default_rng(0).normal(size=(60, WIDTH))
    path = write(tmp_path / "plain", readout=_readout(temperature=5.0))
    best = _load(path).feature_probabilities(features).max(axis=1)
    assert {prediction.known for prediction in _load(path).classify_features(features)} == {None}
    threshold = float(np.median(best))
    classifier = _load(write(tmp_path / "picky", readout=_readout(temperature=5.0, threshold=threshold)))
    predictions = classifier.classify_features(features, top_k=2)
    assert [prediction.known for prediction in predictions] == [bool(value >= threshold) for value in best]
    assert sum(prediction.known is False for prediction in predictions) == 30
    assert all(prediction.label and len(prediction.labels) == 2 for prediction in predictions)
    bad, good = classifier.predict([b"no image", photos[0]], on_error="mark")
    assert bad.known is None
    assert good.known is (good.probabilities[0] >= threshold)


def test_a_threshold_of_nothing_and_of_certainty(write, tmp_path):
    features = np.random.default_rng(0).normal(size=(5, WIDTH))
    for threshold, known in ((0.0, True), (1.0, False)):
        readout = _readout(temperature=10.0, threshold=threshold)  # no probability rounds to 1
        classifier = _load(write(tmp_path / str(threshold), readout=readout))
        assert [prediction.known for prediction in classifier.classify_features(features)] == [known] * 5


def test_describe_names_the_parts(write, tmp_path):
    readout = _readout(0.0, temperature=2.0, threshold=0.25)
    described = json.loads(json.dumps(_load(write(tmp_path / "b", with_flow=False, readout=readout)).describe()))
    assert described["readout"] == {
        "flow_weight": 0.0,
        "linear": True,
        "kernels": [{"keys": 8, "beta": 5.5}, {"keys": 3, "beta": 1.0}],
        "temperature": 2.0,
        "threshold": 0.25,
    }
    assert (described["num_steps"], described["step_size"], described["read_steps"]) == (0, None, [])
    assert described["providers"] == {"visual": ["CPUExecutionProvider"]}
    nothing = np.zeros((CLASSES, WIDTH), np.float32)
    path = write(
        tmp_path / "tempered", readout=Readout(1.0, nothing, nothing[:, 0], temperature=2.0), read_steps=[0, 3]
    )
    described = _load(path).describe()
    assert described["readout"]["linear"] is False
    assert described["read_steps"] == [0, 3]


def test_an_altered_readout_is_caught(write, tmp_path):
    path = write(tmp_path / "bundle", readout=_readout())
    file = path / "heads" / "readout.safetensors"
    data = file.read_bytes()
    for altered, words in ((data[:-1] + bytes([data[-1] ^ 1]), "altered"), (data[:-1], "truncated"), (None, "missing")):
        file.unlink()
        if altered is not None:
            file.write_bytes(altered)
        with pytest.raises(BundleError, match=words) as caught:
            _load(path)
        assert str(file) in str(caught.value)


def test_a_readout_that_does_not_fit_the_bundle(write, tmp_path):
    zero = np.zeros((CLASSES, WIDTH + 1), np.float32)
    for number, (readout, with_flow, words) in enumerate(
        (
            (Readout(1.0, zero, zero[:, 0]), True, r"are \(4, 7, True\), the manifest says \(4, 6, True\)"),
            (Readout(1.0, zero[:3, :WIDTH], zero[:3, 0]), True, r"are \(3, 6, True\)"),
            (_readout(0.5), False, r"are \(4, 6, True\), the manifest says \(4, 6, False\)"),
            (_readout(0.0), True, r"are \(4, 6, False\), the manifest says \(4, 6, True\)"),
        )
    ):
        with pytest.raises(BundleError, match=words) as caught:
            _load(write(tmp_path / str(number), readout=readout, with_flow=with_flow))
        assert "heads/readout.safetensors" in str(caught.value)


def test_a_bundle_without_flow_and_readout_is_refused(write, tmp_path):
    with pytest.raises(BundleError, match=r"must list flow/model\.onnx, heads/readout\.safetensors or both"):
        write(tmp_path / "nothing", with_flow=False)
    path = write(tmp_path / "bundle", with_flow=False, readout=_readout(0.0))
    values = json.loads((path / "manifest.json").read_bytes())
    del values["files"]["heads/readout.safetensors"]
    (path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match="must list"):
        _load(path)


def test_a_readout_that_overflows_is_not_believed(write, tmp_path):
    readout = replace(_readout(0.0), linear_bias=np.array([3e38, 0, 0, 0], np.float32), temperature=1e-3)
    classifier = _load(write(tmp_path / "bundle", with_flow=False, readout=readout))
    with pytest.raises(BundleError, match="NaN or infinite logits"):
        classifier.feature_probabilities(np.eye(WIDTH))

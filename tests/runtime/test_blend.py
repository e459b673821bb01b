"""Bundles whose encoder blends a tuned and a frozen tower: the weight, and rows whose length counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastfsl.bundle import Readout
from fastfsl.errors import BundleError, ConfigError, DataError
from fastfsl.images import open_image, preprocess
from fastfsl.runtime import Classifier
from fastfsl.runtime.row_parallel import RowParallelSession

CLASSES, WIDTH, PIXELS, TRAINED = 4, 6, 8 * 10 * 3, 0.3
RNG = np.random.default_rng(11)
TUNED, FROZEN = RNG.normal(size=(2, PIXELS, WIDTH)).astype(np.float32)
LINEAR = Readout(0.0, 20 * RNG.normal(size=(CLASSES, WIDTH)).astype(np.float32), np.zeros(CLASSES, np.float32))


def _unit(rows: np.ndarray) -> Any:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _blend(photos, preprocessing, alpha: float, *, normalized: bool) -> Any:
    pixels = np.stack([preprocess(open_image(photo), preprocessing) for photo in photos]).reshape(len(photos), -1)
    blend = alpha * _unit(pixels.astype(np.float64) @ TUNED) + (1 - alpha) * _unit(pixels.astype(np.float64) @ FROZEN)
    return _unit(blend) if normalized else blend


def _softmax(logits) -> Any:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module", params=[False, True], ids=["as it is", "normalised"])
def normalized(request) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def path(write, make_blend, tmp_path_factory, normalized):
    """A blend and a linear read-out of it. The graph's own weight is another one than the manifest's."""
    return write(
        tmp_path_factory.mktemp("bundles") / "blend",
        visual=make_blend(TUNED, FROZEN, alpha=0.9, normalized=normalized).SerializeToString(),
        with_flow=False,
        readout=LINEAR,
        blend={"alpha": TRAINED, "normalized": normalized},
    )


def _load(path, **options) -> Classifier:
    return Classifier.load(path, **{"device": "cpu", "num_threads": 1, "max_batch": 4, **options})


@pytest.mark.parametrize("alpha", [None, 0, 0.3, 0.75, np.float32(0.75), 1])
def test_embeddings_and_logits_are_those_of_the_weight(path, normalized, photos, preprocessing, alpha):
    classifier = _load(path, alpha=alpha)
    weight = TRAINED if alpha is None else float(alpha)
    expected = _blend(photos, preprocessing, weight, normalized=normalized)
    embeds = classifier.embed(photos)
    np.testing.assert_allclose(embeds, expected, atol=2e-6)
    probabilities = _softmax(expected @ LINEAR.linear_weight.T)
    np.testing.assert_allclose(classifier.probabilities(photos), probabilities, atol=1e-4)
    np.testing.assert_allclose(classifier.feature_probabilities(embeds), probabilities, atol=1e-4)
    np.testing.assert_allclose(classifier.transport(embeds), expected, atol=2e-6)
    labels = [prediction.label for prediction in classifier.predict(photos)]
    assert labels == [prediction.label for prediction in classifier.classify_features(embeds)]
    assert classifier.describe()["blend"] == {"alpha": weight, "normalized": normalized}


@pytest.mark.parametrize(
    "alpha", [-0.01, 1.01, float("nan"), float("inf"), True, np.True_, "0.3", [0.3], np.array([0.3]), 10**400]
)
def test_a_weight_is_a_number_from_0_to_1(path, alpha):
    with pytest.raises(ConfigError, match="alpha must be a number from 0"):
        _load(path, alpha=alpha)


def test_an_encoder_that_is_no_blend_takes_no_weight(bundle_dir, write, tmp_path):
    for bundle in (bundle_dir, write(tmp_path / "features", with_encoder=False)):
        assert _load(bundle).describe()["blend"] is None
        with pytest.raises(ConfigError, match=r"no blend: leave alpha=0\.3 out"):
            _load(bundle, alpha=0.3)


def test_many_images_are_shared_out_over_threads_and_the_weight_is_not_cut(path, normalized, photos, preprocessing):
    many = [*photos] * 4
    classifier = _load(path, num_threads=2, max_batch=32, alpha=0.6)
    encoder = classifier._loaded.encoder
    assert encoder is not None
    assert isinstance(encoder.session, RowParallelSession)
    expected = _blend(many, preprocessing, 0.6, normalized=normalized)
    np.testing.assert_allclose(classifier.embed(many), expected, atol=2e-6)


def test_the_length_of_rows_counts_where_the_blend_is_not_normalised(path, normalized):
    classifier = _load(path)
    rows = _unit(np.random.default_rng(0).normal(size=(5, WIDTH)))
    lengths = np.array([[0.4], [0.7], [1.0], [1.0005], [1e-30]])
    expected = _softmax((rows if normalized else lengths * rows) @ LINEAR.linear_weight.T)
    np.testing.assert_allclose(classifier.feature_probabilities(lengths * rows), expected, atol=1e-5)
    np.testing.assert_allclose(classifier.transport(rows.astype(np.float16)), rows, atol=1e-3)
    for too_long in (1.002, 50, 1e300):
        rows[2] *= too_long
        if normalized:
            classifier.classify_features(rows)
        else:
            with pytest.raises(DataError, match=r"1 feature rows are longer than 1.*\(rows 2,.*pass what `embed`"):
                classifier.classify_features(rows)
    for bad, words in ((np.nan, "NaN"), (0.0, "nothing but zeros")):
        with pytest.raises(DataError, match=words):
            classifier.transport(np.full(WIDTH, bad))
    assert classifier.transport([]).shape == (0, WIDTH)


def test_the_graph_has_the_weight_if_and_only_if_the_manifest_has_a_blend(write, make_blend, make_visual, tmp_path):
    def alpha_of(model) -> Any:
        (alpha,) = (tensor for tensor in model.graph.initializer if tensor.name == "alpha")
        return alpha

    blend = make_blend(TUNED, FROZEN)
    required = make_blend(TUNED, FROZEN)
    required.graph.initializer.remove(alpha_of(required))
    vector = make_blend(TUNED, FROZEN)
    vector.graph.input[1].type.tensor_type.shape.dim.add().dim_value = 1
    alpha_of(vector).dims.append(1)
    for name, model, about in (
        ("plain", make_visual(TUNED), {"alpha": TRAINED, "normalized": True}),
        ("vector", vector, {"alpha": TRAINED, "normalized": True}),
        ("unannounced", blend, None),
        ("required", required, None),
    ):
        path = write(tmp_path / name, visual=model.SerializeToString(), blend=about)
        with pytest.raises(BundleError, match=r"visual/model\.onnx: expected, of an encoder whose blend is"):
            _load(path)

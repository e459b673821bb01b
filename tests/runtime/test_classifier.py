"""The classifier against the same computation in numpy, and every kind of bad input."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastfsl.errors import ClosedError, ConfigError, DataError, FastFSLError, ResourceError, ShapeError
from fastfsl.images import exact_pixels, fast_pixels
from fastfsl.runtime import Classifier, Prediction
from fastfsl.runtime.session import run_finite

NAMES = ("apple", "bear", "cat", "dog")


def test_probabilities_and_embeddings_equal_the_reference(classifier, reference, photos):
    embeds = classifier.embed(photos)
    assert embeds.dtype == np.float32
    np.testing.assert_allclose(embeds, reference.embed(photos), atol=2e-6)
    probabilities = classifier.probabilities(photos)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, reference.probabilities(reference.embed(photos)), atol=2e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_predictions_are_the_largest_probabilities_in_order(classifier, photos):
    probabilities = classifier.probabilities(photos)
    for prediction, row in zip(classifier.predict(photos, top_k=3), probabilities, strict=True):
        best = np.argsort(-row)[:3]
        assert prediction.labels == tuple(NAMES[index] for index in best)
        np.testing.assert_allclose(prediction.probabilities, row[best], atol=1e-7)
        assert prediction.label == prediction.labels[0]
        assert prediction.error is None
        assert all(type(value) is float for value in prediction.probabilities)


def test_every_kind_of_source_gives_the_same_answer(classifier, photos):
    path = photos[0]
    with Image.open(path) as image:
        array = np.asarray(image)
        sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), image, array]
        expected = classifier.predict(path)
        assert [classifier.predict(source) for source in sources] == [expected] * len(sources)
        assert classifier.predict(sources) == expected * len(sources)


def test_one_many_or_none(classifier, photos):
    many = classifier.predict(photos)
    assert len(many) == 9
    assert classifier.predict(photos[0]) == many[:1]
    assert classifier.predict(path for path in photos) == many
    assert classifier.predict(tuple(photos)) == many
    batch = np.zeros((5, 12, 14, 3), np.uint8)
    assert classifier.predict(batch) == classifier.predict(list(batch))
    assert classifier.predict([]) == []
    assert classifier.embed([]).shape == (0, 6)
    assert classifier.probabilities([]).shape == (0, 4)


def test_a_batch_of_none_never_reaches_a_graph(classifier, feature_classifier, bad_photo, monkeypatch):
    """Over no rows some operators end the process."""
    asked = []
    monkeypatch.setattr("fastfsl.runtime.session.run_rows", lambda *_: asked.append(1))
    none = np.empty((0, 24), np.float32)
    for compute in (feature_classifier.classify_features, feature_classifier.transport):
        assert len(compute(none)) == 0
    for compute in (classifier.predict, classifier.embed, classifier.probabilities):
        assert len(compute([])) == 0
    assert classifier.predict([bad_photo] * 2, on_error="mark")[1].error
    assert feature_classifier.feature_probabilities(none).shape[0] == 0
    assert asked == []


@pytest.mark.parametrize("where", ["head.Head.logits", "engine.feature_rows", "engine.rank"])
def test_no_memory_to_compute_is_the_machine_s_fault(feature_classifier, reference, photos, monkeypatch, where):
    features = reference.embed(photos)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(f"fastfsl.runtime.{where}", fail)
    with pytest.raises(ResourceError, match="cannot compute: out of memory; free memory"):
        feature_classifier.classify_features(features)


def test_batches_never_exceed_max_batch(bundle_dir, photos, monkeypatch):
    classifier = Classifier.load(bundle_dir, device="cpu", num_threads=1, max_batch=4)
    sizes = []

    def counting(session, output, feed):
        sizes.append(len(next(iter(feed.values()))))
        return run_finite(session, output, feed)

    for module in ("image_encoder", "flow_executor"):
        monkeypatch.setattr(f"fastfsl.runtime.{module}.run_finite", counting)
    classifier.predict(photos)
    assert sizes == [4, 4, 4, 4, 1, 1]
    sizes.clear()
    classifier.feature_probabilities(np.ones((600, 6)))
    assert sizes == [256, 256, 88]


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (4, 4), (5, 4), (1000, 4)])
def test_top_k_is_clipped(classifier, photos, top_k, count):
    assert len(classifier.predict(photos[0], top_k=top_k)[0].labels) == count
    assert len(classifier.classify_features(np.ones(6), top_k=top_k)[0].labels) == count


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"top_k": -1}, {"top_k": 2.0}, {"top_k": True}, {"on_error": "ignore"}]
)
def test_options_are_checked_even_without_images(classifier, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        classifier.predict([], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"num_threads": 0},
        {"num_threads": 1.5},
        {"num_threads": 10**7},
        {"device": "tpu"},
        {"preprocess": "quick"},
        {"image_threads": 0},
        {"image_threads": 10**7},
    ],
)
def test_load_options_are_checked(bundle_dir, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Classifier.load(bundle_dir, **options)


@pytest.fixture
def bad_photo(tmp_path: Path) -> Path:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(b"\xff\xd8 no picture")
    return path


def test_an_unreadable_image_raises_and_is_named(classifier, photos, bad_photo):
    for method in (classifier.predict, classifier.probabilities, classifier.embed):
        with pytest.raises(DataError, match=r"holiday\.jpg"):
            method([*photos, bad_photo])


def test_marked_images_do_not_lose_the_others(classifier, photos, bad_photo):
    sources = [bad_photo, photos[0], np.zeros((3, 3), np.float32), photos[1], photos[2], photos[3], None]
    marked = classifier.predict(sources, on_error="mark")
    good = classifier.predict(photos[:4])
    assert [marked[index] for index in (1, 3, 4, 5)] == good
    for index, words in ((0, "holiday.jpg"), (2, "float32"), (6, "NoneType")):
        assert words in marked[index].error
        assert (marked[index].labels, marked[index].probabilities) == ((), ())
        with pytest.raises(DataError, match=r"holiday|float32|NoneType"):
            _ = marked[index].label
    assert all(row.error for row in classifier.predict([bad_photo] * 5, on_error="mark"))


def test_a_stream_is_lazy_and_ends_at_a_bad_image(classifier, photos, bad_photo):
    asked = []

    def sources():
        for path in [*photos, bad_photo, *photos]:
            asked.append(path)
            yield path

    stream = classifier.stream(sources(), top_k=2)
    assert asked == []
    assert [next(stream) for _ in range(8)] == classifier.predict(photos[:8], top_k=2)
    assert len(asked) == 12
    with pytest.raises(DataError, match=r"holiday\.jpg"):
        next(stream)
    marked = list(classifier.stream([*photos, bad_photo, *photos], on_error="mark"))
    assert [bool(prediction.error) for prediction in marked] == [False] * 9 + [True] + [False] * 9
    with pytest.raises(ConfigError, match="top_k"):
        classifier.stream(photos, top_k=0)


def test_a_stream_of_a_closed_classifier_ends_in_its_error(bundle_dir, photos):
    classifier = Classifier.load(bundle_dir, device="cpu", num_threads=1, max_batch=2)
    stream = classifier.stream(photos)
    next(stream)
    classifier.close()
    next(stream)  # of the batch that was computed
    with pytest.raises(ClosedError):
        next(stream)


def test_fast_preprocessing_is_said_and_used(bundle_dir, preprocessing, reference, tmp_path):
    path = tmp_path / "photo.jpg"
    x, y = np.meshgrid(np.arange(160), np.arange(120))
    Image.fromarray(np.stack([x, y, x + y], axis=-1).astype(np.uint8)).save(path, quality=95)
    found = {}
    for preprocess, prepare in (("exact", exact_pixels), ("fast", fast_pixels)):
        with Classifier.load(bundle_dir, device="cpu", preprocess=preprocess, image_threads=3) as classifier:
            described = classifier.describe()
            assert (described["preprocess"], described["image_threads"]) == (preprocess, 3)
            found[preprocess] = classifier.embed(path)
        flat = prepare(path, preprocessing).astype(np.float32).reshape(1, -1) @ reference.projection
        np.testing.assert_allclose(found[preprocess], flat / np.linalg.norm(flat), atol=1e-5)
    assert 0.999 <= float((found["exact"] * found["fast"]).sum()) < 1


def test_an_image_too_thin_to_resize_is_named(classifier, tmp_path):
    path = tmp_path / "thread.png"
    Image.new("L", (1, 3_000_000)).save(path)
    (marked,) = classifier.predict(path, on_error="mark")
    assert "thread.png" in marked.error
    assert "too long and thin" in marked.error


def test_features_equal_the_reference(classifier, feature_classifier, reference):
    features = np.random.default_rng(0).normal(size=(9, 6)) * 50
    for clf in (classifier, feature_classifier):
        transported = clf.transport(features)
        assert transported.dtype == np.float32
        np.testing.assert_allclose(transported, reference.transport(features), atol=1e-6)
        np.testing.assert_allclose(clf.feature_probabilities(features), reference.probabilities(features), atol=2e-5)
        labels = [prediction.label for prediction in clf.classify_features(features)]
        assert labels == [NAMES[index] for index in reference.probabilities(features).argmax(axis=1)]


def test_images_and_their_embeddings_are_classified_alike(classifier, photos):
    features = classifier.embed(photos)
    np.testing.assert_allclose(classifier.feature_probabilities(features), classifier.probabilities(photos), atol=1e-6)
    labels = [prediction.labels for prediction in classifier.classify_features(features)]
    assert labels == [prediction.labels for prediction in classifier.predict(photos)]


# 1e-30 squared underflows float32 and 1e30 squared overflows it; float16 and integers are what stores hold.
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_the_length_of_features_does_not_matter(feature_classifier, scale):
    features = np.random.default_rng(0).normal(size=(3, 6))
    np.testing.assert_allclose(
        feature_classifier.transport(features * scale), feature_classifier.transport(features), atol=1e-6
    )


def test_feature_forms(feature_classifier):
    row = [1, 2, 3, 4, 5, 6]
    expected = feature_classifier.transport([row])
    for form in (row, np.array(row, np.float16), np.array(row, np.int8), np.array([row], order="F"), tuple(row)):
        np.testing.assert_allclose(feature_classifier.transport(form), expected, atol=1e-6)
    nothing: list[Any] = [[], np.empty((0, 6))]
    for empty in nothing:
        assert feature_classifier.transport(empty).shape == (0, 6)
        assert feature_classifier.feature_probabilities(empty).shape == (0, 4)
        assert feature_classifier.classify_features(empty) == []


@pytest.mark.parametrize(
    ("features", "error", "words"),
    [
        (np.ones((2, 5)), ShapeError, r"\(n, 6\)"),
        (np.ones(7), ShapeError, r"\(n, 6\)"),
        (np.ones((2, 3, 6)), ShapeError, r"\(n, 6\)"),
        (1.0, ShapeError, r"\(n, 6\)"),
        (["a"] * 6, ShapeError, "numbers"),
        ([[1], [1, 2]], ShapeError, "numbers"),
        (np.ones((1, 6), complex), ShapeError, "numbers"),
        (np.ones((1, 6), bool), ShapeError, "numbers"),
        ([[1, 2, 3, 4, 5, np.nan]], DataError, r"NaN.*rows 0"),
        (np.vstack([np.ones((3, 6)), np.full((1, 6), np.inf)]), DataError, r"rows 3"),
        (
            np.vstack([np.ones((3, 6)), np.zeros((2, 6))]),
            DataError,
            r"2 feature rows hold nothing but zeros.*rows 3, 4",
        ),
    ],
    ids=["narrow", "long", "3d", "scalar", "words", "ragged", "complex", "bool", "nan", "inf", "zeros"],
)
def test_bad_features(feature_classifier, features, error, words):
    for method in ("transport", "classify_features", "feature_probabilities"):
        with pytest.raises(error, match=words):
            getattr(feature_classifier, method)(features)


def test_a_bundle_without_encoder_points_to_the_feature_methods(feature_classifier, photos):
    for method in ("predict", "probabilities", "embed"):
        with pytest.raises(DataError, match="classify_features"):
            getattr(feature_classifier, method)(photos)
        with pytest.raises(DataError, match="classify_features"):
            getattr(feature_classifier, method)([])
    assert set(feature_classifier.describe()["providers"]) == {"flow"}


def test_threads_share_a_classifier(classifier, photos):
    expected = classifier.predict(photos)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: classifier.predict(photos), range(40)))
    assert results == [expected] * 40


def test_describe_is_json_and_says_what_runs_where(classifier, bundle_dir):
    described = json.loads(json.dumps(classifier.describe()))
    assert described["providers"] == {"visual": ["CPUExecutionProvider"], "flow": ["CPUExecutionProvider"]}
    assert described["bundle"] == str(bundle_dir)
    assert described["num_classes"] == 4
    assert described["num_threads"] == 1
    assert described["max_batch"] == 4
    assert len(described["digest"]) == 64
    assert set(described["files"]) == {"visual/model.onnx", "flow/model.onnx"}
    assert described["readout"] is None
    assert classifier.class_names == NAMES


def test_predictions_are_values():
    prediction = Prediction(("a", "b"), (0.75, 0.25))
    assert prediction == Prediction(("a", "b"), (0.75, 0.25))
    assert hash(prediction) == hash(Prediction(("a", "b"), (0.75, 0.25)))
    with pytest.raises(AttributeError):
        setattr(prediction, "error", "x")  # noqa: B010 - mypy refuses the plain assignment, as it should
    with pytest.raises(FastFSLError):
        _ = Prediction((), ()).label


def test_its_repr_tells_bundle_method_classes_and_device(feature_classifier):
    described = feature_classifier.describe()
    expected = f": method {described['method']}, {described['num_classes']} classes, on cpu>"
    assert repr(feature_classifier).startswith("<Classifier '/")
    assert described["bundle"].rpartition("/")[2] in repr(feature_classifier)
    assert repr(feature_classifier).endswith(expected)
    copied = feature_classifier.__copy__()
    copied.close()
    assert repr(copied).endswith(": closed>")

"""Classes added by name to bundles of every kind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastfsl import bundle
from fastfsl.errors import BundleError, ConfigError, DeviceError
from fastfsl.runtime import Classifier
from fastfsl.runtime.cuda_driver import Device
from tests.runtime.compiled_bundle import CLASSES, DIM, SCALE, random_flow, write_compiled
from tests.runtime.fake_driver import FakeDriver
from tests.runtime.fake_kernels import by_equation
from tests.runtime.text_bundle import embedding, tokenizer_json, unit, with_text

WIDTH, NAMES = 6, ("apple", "bear", "cat", "dog")
FEATURES = np.random.default_rng(5).normal(size=(9, WIDTH)).astype(np.float32)
SHIFT = np.linspace(-0.3, 0.4, WIDTH, dtype=np.float32)


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def path(write, reference, tmp_path_factory):
    """A flow whose graph takes other classes."""
    return with_text(write, WIDTH, reference.class_embeddings, SHIFT)(tmp_path_factory.mktemp("text") / "bundle")


def _load(path, **options):
    return Classifier.load(path, device="cpu", num_threads=1, **options)


def test_the_new_class_is_read_out_where_the_flow_would_send_it(path, reference, photos):
    classifier = _load(path)
    before, stream = classifier.feature_probabilities(FEATURES), classifier.stream(photos[:2])
    classifier.add_class("Red_kite")
    classifier.add_class("{}", ["photo", "red photo"])
    assert classifier.class_names == (*NAMES, "Red_kite", "{}")
    texts = [embedding(WIDTH, "a photo red kite", "red kite"), embedding(WIDTH, "photo", "red photo")]
    classes = np.concatenate([reference.class_embeddings, unit(np.stack(texts) + SHIFT)])
    logits = SCALE * reference.transport(FEATURES) @ classes.T
    np.testing.assert_allclose(before, _softmax(logits[:, :4]), atol=1e-5)
    np.testing.assert_allclose(classifier.feature_probabilities(FEATURES), _softmax(logits), atol=1e-5)
    np.testing.assert_allclose(classifier.transport(FEATURES), reference.transport(FEATURES), atol=1e-5)
    assert set(next(stream).labels) <= set(NAMES)
    assert len(classifier.predict(photos[:1], top_k=9)[0].labels) == 6
    about = classifier.describe()
    assert (about["num_classes"], about["added_classes"]) == (6, ["Red_kite", "{}"])
    assert _load(path).class_names == NAMES


def test_many_rows_are_cut_and_the_classes_are_not(path, reference):
    classifier = Classifier.load(path, device="cpu", num_threads=2)
    rows = np.random.default_rng(6).normal(size=(100, WIDTH)).astype(np.float32)
    classifier.add_class("red")
    classes = np.concatenate([reference.class_embeddings, unit(embedding(WIDTH, "a photo red", "red") + SHIFT)[None]])
    expected = _softmax(SCALE * reference.transport(rows) @ classes.T)
    np.testing.assert_allclose(classifier.feature_probabilities(rows), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "prompts", "words"),
    [
        ("", None, "expected a class name with a word in it, got ''"),
        (" \t", None, "expected a class name with a word"),
        (None, None, "expected a class name with a word"),
        ("_", None, "expected a class name with a word"),
        ("&nbsp;", None, "expected a class name with a word"),
        ("bear", None, "the class 'bear' is known already"),
        ("kite", [], "expected prompts to be one text or more"),
        ("kite", ["red", 3], "expected prompts to be one text or more"),
        ("kite", ["red", " "], "expected a prompt with a word in it, got ' '"),
    ],
)
def test_names_and_prompts_without_a_meaning_are_refused(path, name, prompts, words):
    classifier = _load(path)
    with pytest.raises(ConfigError, match=words):
        classifier.add_class(name, prompts)
    assert classifier.class_names == NAMES
    classifier.add_class("kite", "red kite")  # one prompt may come without a list
    with pytest.raises(ConfigError, match="known already"):
        classifier.add_class("kite")


LINEAR = np.random.default_rng(8).normal(size=(4, WIDTH)).astype(np.float32)
NO_LINEAR, NO_BIAS = np.zeros((4, WIDTH), np.float32), np.zeros(4, np.float32)
KERNEL = bundle.KernelArrays(LINEAR, np.eye(4, dtype=np.float32), 2.0)


def test_a_read_out_by_texts_alone_gets_a_row(write, tmp_path):
    readout = bundle.Readout(0.0, LINEAR, NO_BIAS, temperature=2.0, threshold=0.3)
    classifier = _load(
        with_text(write, WIDTH, None, linear_scale=7.5)(tmp_path / "bundle", with_flow=False, readout=readout)
    )
    classifier.add_class("kite", ["red kite"])
    weight = np.concatenate([LINEAR, 7.5 * embedding(WIDTH, "red kite")[None]])
    np.testing.assert_allclose(
        classifier.feature_probabilities(FEATURES), _softmax(unit(FEATURES) @ weight.T / 2), atol=1e-5
    )
    assert {prediction.known for prediction in classifier.classify_features(FEATURES)} <= {True, False}


def test_a_flow_that_is_only_weighted_and_calibrated_gets_a_class(write, reference, tmp_path):
    readout = bundle.Readout(0.5, NO_LINEAR, NO_BIAS, temperature=2.0)
    path = with_text(write, WIDTH, reference.class_embeddings)(tmp_path / "bundle", readout=readout)
    classifier = _load(path)
    classifier.add_class("kite", ["red kite"])
    classes = np.concatenate([reference.class_embeddings, embedding(WIDTH, "red kite")[None]])
    expected = _softmax(0.25 * SCALE * reference.transport(FEATURES) @ classes.T)
    np.testing.assert_allclose(classifier.feature_probabilities(FEATURES), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("readout", "scale"),
    [
        (bundle.Readout(0.0, LINEAR, NO_BIAS), 0),
        (bundle.Readout(0.0, LINEAR, NO_BIAS + 1), 7.5),
        (bundle.Readout(0.0, LINEAR, NO_BIAS, (KERNEL,)), 7.5),
    ],
)
def test_a_read_out_fitted_to_images_cannot_know_a_name(write, tmp_path, readout, scale):
    path = with_text(write, WIDTH, None, linear_scale=scale)(tmp_path / "bundle", with_flow=False, readout=readout)
    with pytest.raises(ConfigError, match=r"fitted to images of its classes.*train again with images"):
        _load(path).add_class("kite")


def test_bundles_without_text_say_what_to_do(bundle_dir):
    with pytest.raises(ConfigError, match="export it again with --text"):
        _load(bundle_dir).add_class("kite")


def test_files_that_contradict_each_other_are_refused(write, reference, tmp_path, make_flow):
    classes = reference.class_embeddings
    cases = {
        "its classes are not those of": with_text(write, WIDTH, classes[::-1].copy()),
        "expected arrays of 4 classes": with_text(write, WIDTH, classes[:3]),
        "holds NaN or infinite": with_text(write, WIDTH, classes * np.float32("nan")),
        "the tokenizer fails": with_text(write, WIDTH, classes, tokenizer=b"{}"),
        "cut and padded to 5 ids": with_text(write, WIDTH, classes, context_length=5),
        "expected token_ids -> text_embeds": with_text(
            write, WIDTH, classes, tokenizer=tokenizer_json().replace(b"4", b"5"), context_length=5, vocab_size=9
        ),
    }
    for words, make in cases.items():
        classifier = _load(make(tmp_path / words))
        with pytest.raises(BundleError, match=words):
            classifier.add_class("kite")
        assert classifier.feature_probabilities(FEATURES).shape == (9, 4)


def test_a_tower_altered_after_loading_is_refused(write, reference, tmp_path):
    path = with_text(write, WIDTH, reference.class_embeddings)(tmp_path / "bundle")
    classifier = _load(path)
    (path / bundle.TOKENIZER).write_bytes(tokenizer_json().replace(b"red", b"fed"))
    with pytest.raises(BundleError, match=r"tokenizer.json: altered"):
        classifier.add_class("kite")
    (path / bundle.TOKENIZER).unlink()
    with pytest.raises(BundleError, match="missing"):
        classifier.add_class("kite")


def test_a_call_answers_with_all_of_a_class_or_nothing(path):
    classifier = _load(path)
    added = [f"kite {number}" for number in range(20)]
    stop = threading.Event()

    def ask():
        seen = set()
        while not stop.is_set():
            (prediction,) = classifier.classify_features(FEATURES[:1], top_k=99)
            seen.add(len(prediction.labels))
            assert set(prediction.labels) == {*NAMES, *added[: len(prediction.labels) - 4]}
            assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-5)
        return seen

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask) for _ in range(3)]
        try:
            for name in added:
                classifier.add_class(name)
        finally:
            stop.set()
        assert set().union(*(task.result() for task in asked)) <= set(range(4, 25))
    assert classifier.class_names == (*NAMES, *added)


def test_classes_added_from_several_threads_are_all_there(path):
    classifier = _load(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(classifier.add_class, [f"kite {number}" for number in range(12)]))
    assert sorted(classifier.class_names[4:]) == sorted(f"kite {number}" for number in range(12))
    assert classifier.feature_probabilities(FEATURES).shape == (9, 16)


@pytest.fixture
def driver(monkeypatch) -> FakeDriver:
    driver = FakeDriver()
    driver.execute = by_equation(driver)
    monkeypatch.setattr("fastfsl.runtime.cuda_driver.load_driver", lambda: driver)
    return driver


@pytest.mark.parametrize("prototypes", [1, 3])
def test_compiled_kernels_get_the_class_on_the_card(write, tmp_path, driver, prototypes):
    flow = random_flow(prototypes=prototypes)
    rows = flow.class_embeddings.reshape(-1, DIM)
    writing = with_text(write, DIM, rows, np.full(DIM, 0.05, np.float32))
    path = write_compiled(writing, tmp_path / "bundle", flow, with_encoder=True, **_visual())
    features = np.random.default_rng(5).normal(size=(9, DIM))
    by_kernels, by_graph = _load_on(path, "compiled"), _load_on(path, "onnx")
    for classifier in (by_kernels, by_graph):
        classifier.add_class("kite", ["red kite"])
    found, expected = (one.feature_probabilities(features) for one in (by_kernels, by_graph))
    assert found.shape == (9, CLASSES + 1)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert by_kernels.describe()["flow"]["executor"] == "compiled sm_90"
    place = unit(embedding(DIM, "red kite") + 0.05)
    logits = SCALE * by_graph.transport(features) @ np.concatenate([rows, np.repeat(place[None], prototypes, 0)]).T
    np.testing.assert_allclose(expected, _softmax(logits.reshape(9, -1, prototypes).max(axis=2)), atol=1e-4)


@pytest.mark.parametrize("option", ["auto", "compiled"])
def test_a_card_without_room_for_the_class_leaves_the_flow_to_its_graph(
    write, tmp_path, driver, monkeypatch, caplog, option
):
    flow = random_flow()
    path = write_compiled(with_text(write, DIM, flow.class_embeddings), tmp_path / "bundle", flow, **_visual())
    classifier = _load_on(path, option)

    def refuse(*_):
        raise DeviceError("out of memory")

    monkeypatch.setattr(Device, "upload", refuse)
    if option == "compiled":
        with pytest.raises(DeviceError, match="flow='compiled': out of memory"):
            classifier.add_class("kite")
        return
    classifier.add_class("kite")
    assert classifier.describe()["flow"] == {"executor": "onnxruntime", "reason": "out of memory"}
    assert "ONNX Runtime computes the flow from now on: out of memory" in caplog.text
    assert classifier.feature_probabilities(np.ones((1, DIM))).shape == (1, CLASSES + 1)


def _load_on(path, flow):
    return Classifier.load(path, num_threads=1, max_batch=4, flow=flow)


def _visual():
    """Texts go with an encoder."""
    from tests.runtime.conftest import visual_model

    projection = np.random.default_rng(6).normal(size=(8 * 10 * 3, DIM)).astype(np.float32)
    return {"visual": visual_model(projection).SerializeToString()}

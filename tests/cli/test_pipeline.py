"""Images and features through train, evaluate, export and predict, on the tiny CLIP of the package."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastfsl.demo.digits import CLASS_NAMES, enlarge, load_scans
from fastfsl.fit.methods import METHODS, SOURCES
from fastfsl.images import open_image
from fastfsl.runtime import Classifier

SHOTS, CLASSES = 6, 3
QUICK = """
method: fma
num_blocks: 2
epochs: 40
batch_size: 16
num_folds: 2
num_views: 2
augmentation: {horizontal_flip: false}
backbone: tiny-clip
templates: ["a photo of the digit {}."]
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "quick.yaml"
    file.write_text(QUICK)
    return file


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Scans of three digits: 10 a class in train/, 8 a class in test/."""
    root = tmp_path_factory.mktemp("digits")
    scans, labels = load_scans()
    for label in range(CLASSES):
        indices = np.flatnonzero(np.array(labels) == label)[:18]
        for position, index in enumerate(indices):
            folder = root / ("train" if position < 10 else "test") / CLASS_NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(enlarge(scans[index])).save(folder / f"{index:04d}.png")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTFSL_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def trained(run_fastfsl, digits, config, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = run_fastfsl("train", digits, "--out", folder, "--shots", SHOTS, "--config", config, "--json")
    assert result.exit_code == 0, result.stderr
    return folder, result.document


@pytest.fixture(scope="module")
def exported(run_fastfsl, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    result = run_fastfsl("export", trained[0], folder, "--json")
    assert result.exit_code == 0, result.stderr
    return folder, result.document


def test_train_reports_and_keeps_what_it_did(trained, digits):
    folder, document = trained
    assert document["method"] == "fma"
    assert document["num_support"] == SHOTS * CLASSES
    assert document["train_seconds"] > 0
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["shots"] == SHOTS
    assert len(record["selection"]["accuracy_by_step"]) == 11
    assert record["selection"]["num_steps"] == document["num_steps"]
    assert record["encoder"]["backbone"] == "tiny-clip"
    assert len(set(record["support_digests"])) == SHOTS * CLASSES
    episode = json.loads((folder / "episode.json").read_text())
    assert all((digits / item).is_file() for item in episode["items"])


def test_the_next_run_takes_its_features_from_the_cache(run_fastfsl, trained, digits, config, tmp_path, monkeypatch):
    from fastfsl.encoders import Encoder

    def refuse(*_):
        raise AssertionError("the encoder was asked again")

    monkeypatch.setattr(Encoder, "encode_images", refuse)
    again = tmp_path / "again"
    result = run_fastfsl("train", digits, "--out", again, "--shots", SHOTS, "--config", config, "--json")
    assert result.exit_code == 0, result.stderr
    first = json.loads((trained[0] / "run.json").read_text())
    assert json.loads((again / "run.json").read_text())["selection"] == first["selection"]


def test_run_and_bundle_agree_on_every_test_image(run_fastfsl, trained, exported, digits):
    of_run = run_fastfsl("evaluate", trained[0], digits, "--json").document
    of_bundle = run_fastfsl("evaluate", exported[0], digits, "--json").document
    assert of_run["num_samples"] == of_bundle["num_samples"] == 24
    assert of_run["accuracy"] == of_bundle["accuracy"] > 0.5
    assert of_run["num_steps"] == of_bundle["num_steps"] == trained[1]["num_steps"]
    assert of_run["class_accuracy"] == of_bundle["class_accuracy"]


def test_evaluate_writes_the_same_report_for_run_and_bundle(run_fastfsl, trained, exported, digits, tmp_path):
    pages = []
    for model in (trained[0], exported[0]):
        page = tmp_path / f"{model.name}.html"
        result = run_fastfsl("evaluate", model, digits, "--report", page)
        assert result.exit_code == 0, result.stderr
        pages.append(page.read_text(encoding="utf-8"))
        assert "samples on the diagonal" in pages[-1]
    tables = [page.partition("<h2>Predictions</h2>")[2] for page in pages]
    counts = [re.findall(r"taken for [^<]*: \d+", table) for table in tables]
    assert counts[0] == counts[1]
    assert len(counts[0]) == CLASSES**2
    refused = run_fastfsl("evaluate", trained[0], digits, "--report", tmp_path)
    assert refused.exit_code == 2
    assert "is a folder" in refused.stderr.replace("\n", " ")


def test_training_leaves_a_report(trained):
    folder, document = trained
    assert document["report"] == str(folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in ("Accuracy against steps", "Held-out training samples", "Features along the flow", "tiny-clip"):
        assert words in page


def test_export_records_its_parity(exported):
    parity = exported[1]["parity"]
    assert parity["visual"]["batches"] == parity["flow"]["batches"] == [1, 2, 5]
    assert parity["visual"]["min_cosine"] > 0.99999
    assert parity["flow"]["max_probability_error"] < 1e-4


def test_bundle_names_no_path_of_this_machine(exported, digits):
    text = b"".join(file.read_bytes() for file in exported[0].rglob("*") if file.is_file())
    assert str(digits.parent).encode() not in text
    assert str(Path(__file__).parents[2]).encode() not in text


def test_every_kind_of_source_gives_the_torch_probabilities(trained, exported, digits):
    import torch

    from fastfsl.fit.evaluate import run_encoder
    from fastfsl.fit.run import Run

    run = Run.load(trained[0])
    encoder = run_encoder(run)
    paths = sorted((digits / "test").rglob("*.png"))
    pixels = torch.stack([encoder.transform(open_image(path)) for path in paths])
    expected = run.estimator.predict_proba(encoder.encode_images(pixels))
    classifier = Classifier.load(exported[0], max_batch=7)
    sources = {
        "paths": paths,
        "strings": [str(path) for path in paths],
        "bytes": [path.read_bytes() for path in paths],
        "pictures": [Image.open(path) for path in paths],
        "arrays": [np.asarray(Image.open(path).convert("RGB")) for path in paths],
    }
    for name, images in sources.items():
        got = classifier.probabilities(images)
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(classifier.embed(paths), encoder.encode_images(pixels).numpy(), atol=1e-5)


def test_an_encoder_that_prepares_images_differently_now_is_refused(run_fastfsl, trained, digits, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["encoder"]["preprocessing"]["mean"] = [0.4, 0.4, 0.4]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    for command in (("evaluate", tmp_path / "run", digits), ("export", tmp_path / "run", tmp_path / "bundle")):
        result = run_fastfsl(*command)
        assert result.exit_code == 2
        assert "prepares images differently" in " ".join(result.stderr.split())
    assert not (tmp_path / "bundle").exists()


def test_a_run_finds_its_checkpoint_from_any_folder(run_fastfsl, digits, config, cache, tmp_path, monkeypatch):
    import fastfsl.demo

    shutil.copytree(Path(fastfsl.demo.__file__).parent / "tiny_clip", tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    options = ("--shots", 2, "--config", config)
    trained = [
        ("folder", "--backbone", "local-dir:models/tiny"),
        ("file", "--backbone", "tiny-clip", "--pretrained", "models/tiny/open_clip_model.safetensors"),
    ]
    for run, *model in trained:
        result = run_fastfsl("train", digits, "--out", run, *model, *options)
        assert result.exit_code == 0, result.stderr
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for run, *_ in trained:
        result = run_fastfsl("evaluate", tmp_path / run, digits)
        assert result.exit_code == 0, result.stderr


def test_predict_classifies_files(run_fastfsl, exported, digits):
    files = sorted((digits / "test").rglob("*.png"))
    result = run_fastfsl("predict", exported[0], digits / "test", "--top-k", 2, "--json")
    assert result.exit_code == 0, result.stderr
    predictions = result.document["predictions"]
    assert len(predictions) == len(files)
    right = [Path(row["input"]).parent.name == row["labels"][0] for row in predictions]
    assert np.mean(right) > 0.5
    assert all(len(row["labels"]) == len(row["probabilities"]) == 2 for row in predictions)


def test_a_flat_folder_is_scored_on_what_was_not_trained_on(run_fastfsl, exported, digits, cache, config, tmp_path):
    flat = digits / "train"
    run = tmp_path / "run"
    assert run_fastfsl("train", flat, "--out", run, "--shots", SHOTS, "--config", config).exit_code == 0
    document = run_fastfsl("evaluate", run, flat, "--json").document
    assert document["num_excluded"] == SHOTS * CLASSES
    assert document["num_samples"] == 10 * CLASSES - SHOTS * CLASSES
    every = tmp_path / "every"
    assert run_fastfsl("train", flat, "--out", every, "--config", config).exit_code == 0
    result = run_fastfsl("evaluate", every, flat)
    assert result.exit_code == 2
    assert "every image" in result.stderr


def test_scoring_what_was_trained_on_is_warned_of(run_fastfsl, exported, digits, tmp_path):
    leaky = tmp_path / "leaky"
    shutil.copytree(digits / "train", leaky / "train")
    shutil.copytree(digits / "train", leaky / "test")
    result = run_fastfsl("evaluate", exported[0], leaky)
    assert result.exit_code == 0
    assert "support set" in result.stderr


@pytest.fixture
def write_features(tmp_path):
    """Writes a feature file of three classes, (3 · 8, 16), whose train and test are the same samples."""
    from safetensors.numpy import save_file

    def write(suffix: str) -> Path:
        rng = np.random.default_rng(0)
        embeddings = rng.normal(size=(3, 16)).astype(np.float32)
        labels = np.repeat(np.arange(3), 8)
        features = (embeddings[labels] + 0.7 * rng.normal(size=(24, 16))).astype(np.float32)
        arrays: dict[str, Any] = {
            "train_features": features,
            "train_labels": labels,
            "test_features": features,
            "test_labels": labels,
            "class_embeddings": embeddings,
        }
        data = tmp_path / f"features.{suffix}"
        if suffix == "npz":
            np.savez(data, **arrays)
        else:
            save_file(arrays, data)
        return data

    return write


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_features_go_the_same_way(run_fastfsl, write_features, tmp_path, suffix):
    data, config = write_features(suffix), tmp_path / "c.yaml"
    config.write_text("method: fma\nnum_blocks: 1\nepochs: 5\nnum_folds: 2\nnum_steps: 0\n")
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    assert run_fastfsl("train", data, "--out", run, "--config", config).exit_code == 0
    assert run_fastfsl("export", run, bundle).exit_code == 0  # no step at all: exports and runs too
    of_run = run_fastfsl("evaluate", run, data, "--json").document
    of_bundle = run_fastfsl("evaluate", bundle, data, "--json").document
    assert of_run["num_steps"] == of_bundle["num_steps"] == 0
    assert of_run["accuracy"] == of_bundle["accuracy"] > 0.5
    assert not (bundle / "visual").exists()
    result = run_fastfsl("predict", bundle, data)
    assert result.exit_code == 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_the_same_way(run_fastfsl, write_features, tmp_path, monkeypatch, method):
    from fastfsl.fit.fma import FlowMatchingAlignment

    monkeypatch.setitem(FlowMatchingAlignment.__init__.__kwdefaults__, "epochs", 3)  # of the flow inside auto
    data, run, bundle, config = write_features("npz"), tmp_path / "run", tmp_path / "bundle", tmp_path / "c.yaml"
    brief = "num_blocks: 1\nepochs: 3\nlearning_rate: 1e-2\nnum_folds: 2\n"
    config.write_text(brief if method.startswith("fma") else "")
    trained = run_fastfsl("train", data, "--out", run, "--method", method, "--config", config, "--json").document
    assert trained["method"] == method
    assert (trained["num_steps"] is not None) == (method == "auto" or method.startswith("fma"))
    assert trained["num_parameters"] > 0
    assert (trained["held_out_accuracy"] is None) == (method == "zero-shot")
    assert run_fastfsl("export", run, bundle).exit_code == 0
    of_run, of_bundle = (run_fastfsl("evaluate", model, data, "--json").document for model in (run, bundle))
    calibration = [document.pop("calibration_error") for document in (of_run, of_bundle)]
    assert calibration[0] == pytest.approx(calibration[1], abs=1e-4)
    assert of_run["threshold"] is of_bundle["threshold"] is None
    for document in (of_run, of_bundle):  # each names itself there
        del document["model"], document["next"]
    assert of_run == of_bundle
    assert of_run["accuracy"] == of_run["macro_accuracy"] > 0.5
    assert of_run["num_steps"] == trained["num_steps"]


@pytest.mark.parametrize(
    "method",
    [
        "lora+fma",  # what comes of mps is held in tests/export/test_blended_bundle.py
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mps", "clip-adapter", "lora", "coop", "mps+gda", "cocoop+gda")
        ),
    ],
)
def test_a_tuned_encoder_goes_the_same_way(run_fastfsl, digits, cache, tmp_path, method):
    run, bundle, config = tmp_path / "run", tmp_path / "bundle", tmp_path / "c.json"
    source, _, estimator = method.partition("+")
    parts: dict[str, Any] = {source: {"epochs": 2}}
    if estimator == "fma":
        parts["fma"] = {"num_blocks": 1, "epochs": 3, "num_folds": 2}
    shared = {"backbone": "tiny-clip", "num_views": 2, "augmentation": {"horizontal_flip": False}}
    config.write_text(json.dumps({"method": method, "templates": "a photo of the digit {}.", **shared, **parts}))
    trained = run_fastfsl("train", digits, "--out", run, "--config", config, "--shots", SHOTS, "--json").document
    assert trained["method"] == method
    exported = run_fastfsl("export", run, bundle, "--json").document
    assert exported["parity"]["visual"]["min_cosine"] >= 0.99999
    of_run, of_bundle = (run_fastfsl("evaluate", model, digits, "--json").document for model in (run, bundle))
    calibration = [document.pop("calibration_error") for document in (of_run, of_bundle)]
    assert calibration[0] == pytest.approx(calibration[1], abs=1e-4)
    # Each names itself, and a bundle holds no texts of the frozen encoder.
    assert of_run.pop("zero_shot_accuracy") is not None
    assert of_bundle.pop("zero_shot_accuracy") is None
    for document in (of_run, of_bundle):
        del document["model"], document["next"]
    assert of_run == of_bundle


def test_what_has_no_fixed_classifier_is_refused_with_what_to_do(run_fastfsl, digits, cache, tmp_path):
    config = tmp_path / "c.json"
    shared = {"backbone": "tiny-clip", "num_views": 2, "augmentation": {"horizontal_flip": False}}
    config.write_text(json.dumps({"method": "cocoop", "epochs": 1, "batch_size": 6, **shared}))
    options = ("--config", config, "--shots", SHOTS)
    assert run_fastfsl("train", digits, "--out", tmp_path / "run", *options).exit_code == 0
    assert 0 <= run_fastfsl("evaluate", tmp_path / "run", digits, "--json").document["accuracy"] <= 1
    refused = run_fastfsl("export", tmp_path / "run", tmp_path / "bundle")
    assert (refused.exit_code, (tmp_path / "bundle").exists()) == (2, False)
    assert "cocoop+fma" in refused.stderr


def test_a_run_may_replace_the_working_folder(run_fastfsl, write_features, tmp_path, monkeypatch):
    data, run = write_features("npz"), tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(run)
    result = run_fastfsl("train", data, "--out", ".", "--force", "--method", "zero-shot")
    assert result.exit_code == 0, result.stderr
    assert (run / "run.json").is_file()


def test_a_threshold_is_asked_for_kept_and_measured(run_fastfsl, write_features, tmp_path):
    data, run, bundle, config = write_features("npz"), tmp_path / "run", tmp_path / "bundle", tmp_path / "c.yaml"
    config.write_text("components: [gda, lp++]\n")  # quick: without the flow
    options = ("--config", config, "--target-precision", 0.9, "--json")
    trained = run_fastfsl("train", data, "--out", run, *options).document
    assert (trained["method"], trained["num_steps"]) == ("auto", None)
    assert 0 < trained["threshold"] < 1
    assert run_fastfsl("export", run, bundle).exit_code == 0
    for model in (run, bundle):
        document = run_fastfsl("evaluate", model, data, "--json").document
        assert document["threshold"] == pytest.approx(trained["threshold"])
        assert 0 < document["coverage"] <= 1
        assert document["precision"] >= document["accuracy"] > 0.5


def test_help_lists_every_method(run_fastfsl):
    words = run_fastfsl("train", "--help").stdout.split()
    assert all(f"{name}:" in words for name in (*METHODS, *SOURCES))

"""MPS-Tuning alone, and a flow on its features, from a run to a bundle: at any weight it answers as torch does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from fastfsl import bundle
from fastfsl.cli import app
from fastfsl.errors import BundleError, ConfigError
from fastfsl.export.bundle_writer import export_run
from fastfsl.fit.config import load_config
from fastfsl.fit.evaluate import base_encoder, run_encoder
from fastfsl.fit.run import Run
from fastfsl.fit.train import train
from fastfsl.images import open_image, preprocess
from fastfsl.runtime import Classifier

CLASSES, SIZE = ("ant", "bee", "cow"), 32
# The flow of mps+fma: trained briefly, but for steps that move the features.
FLOW = {"num_blocks": 1, "epochs": 5, "batch_size": 8, "learning_rate": 1e-2, "num_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set of noise about a colour for each class, an encoder of six blocks, and a cache."""
    root = tmp_path_factory.mktemp("mps")
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 5)):
        for label, name in enumerate(CLASSES):
            (root / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 200, (SIZE, SIZE, 3))
                pixels[..., label] += 55
                Image.fromarray(pixels.astype(np.uint8)).save(root / "data" / split / name / f"{index}.png")
    vision = {"image_size": SIZE, "layers": 6, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    preprocessing = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "size": [SIZE, SIZE]}
    (root / "clip").mkdir()
    described = json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing})
    (root / "clip" / "open_clip_config.json").write_text(described)
    torch.manual_seed(0)
    save_file(open_clip.model.CLIP(**config).state_dict(), root / "clip" / "open_clip_model.safetensors")
    return root


@pytest.fixture(scope="module", params=[pytest.param("mps", marks=pytest.mark.slow), "mps+fma"])
def run(request, folder) -> Run:
    """Trained for an epoch; then every trained tensor is moved, so that none is where the tuning began."""
    options = {"mps": {"epochs": 1}, **({"fma": FLOW} if request.param == "mps+fma" else {})}
    backbone = f"local-dir:{folder / 'clip'}"
    flags = {"method": request.param, "device": "cpu", "num_views": 2, "templates": "a {}", "backbone": backbone}
    run = train(folder / "data", load_config(flags=flags | options), cache_dir=folder / "cache")
    assert run.source is not None
    rng = np.random.default_rng(1)
    state = {
        name: array
        if name == "class_embeddings"
        else (array + rng.normal(size=array.shape) * (array[0].size ** -0.5 if array.ndim > 1 else 0.2)).astype("f4")
        for name, array in run.source.state().items()
    }
    run.source.restore(state, run.source.selection_record())
    return run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> tuple[Path, bundle.Manifest]:
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    return path, export_run(run, path)


def _features(run: Run, images: list[Path], alpha: float | None) -> Any:
    encoder = run_encoder(run, alpha=alpha)
    pixels = np.stack([preprocess(open_image(image), encoder.preprocessing) for image in images]) / 255
    prepared = (pixels - np.array(encoder.preprocessing.mean)) / np.array(encoder.preprocessing.std)
    return encoder.encode_images(torch.from_numpy(prepared).permute(0, 3, 1, 2).float()).numpy()


def test_the_manifest_tells_the_blend_and_its_parity(run, exported):
    path, manifest = exported
    alone = run.record.config.method == "mps"
    assert manifest.blend == {"alpha": 0.3, "normalized": not alone}
    assert manifest == bundle.check_bundle(path)
    visual = manifest.parity["visual"]
    assert (visual["batches"], visual["alphas"]) == ([1, 2, 5], [0.0, 0.3, 1.0])
    assert visual["min_cosine"] >= 0.99999
    assert manifest.parity["logits"]["max_probability_error"] <= 1e-4
    assert ("flow/model.onnx" in manifest.files) != alone
    assert manifest.training["source"]["num_parameters"] == run.record.source.num_parameters
    assert manifest.encoder is not None
    assert manifest.encoder["digest"] == run_encoder(run).digest != base_encoder(run).digest
    card = (path / "README.md").read_text()
    assert "alpha * tuned + (1 - alpha) * frozen" in card
    assert ("as long as that is" in card) == alone
    assert "Its alpha is 0.3;" in card


@pytest.mark.parametrize("alpha", [None, 0.0, 0.75, 1.0])
def test_the_runtime_answers_as_torch_with_that_weight(run, exported, folder, alpha):
    images = sorted((folder / "data" / "test").rglob("*.png"))
    features = _features(run, images, alpha)
    logits = np.asarray(run.estimator.decision_function(features))
    expected = run.estimator.predict_proba(features)
    classifier = Classifier.load(exported[0], device="cpu", num_threads=1, alpha=alpha)
    np.testing.assert_allclose(classifier.embed(images), features, atol=1e-5)
    found = classifier.probabilities(images)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_array_equal(found.argmax(axis=1), logits.argmax(axis=1))
    np.testing.assert_allclose(classifier.feature_probabilities(classifier.embed(images)), found, atol=1e-6)
    if alpha is not None:
        other = _features(run, images, None)
        assert np.abs(features - other).max() > 1e-2  # the weight does something
    if run.record.config.method == "mps":
        lengths = np.linalg.norm(features, axis=1)
        assert np.allclose(lengths, 1) == (alpha in {0.0, 1.0})
        rows = np.log(found) - np.log(found).mean(axis=1, keepdims=True)
        np.testing.assert_allclose(rows, logits - logits.mean(axis=1, keepdims=True), atol=2e-3)


def test_the_commands_take_the_weight(run, exported, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFSL_CACHE", str(folder / "cache"))
    run.save(tmp_path / "run")
    image, data = folder / "data" / "test" / "bee" / "0.png", folder / "data"

    def fastfsl(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    accuracies = []
    for alpha in ((), ("--alpha", 0.9)):
        of_run, of_bundle = (fastfsl("evaluate", model, data, *alpha) for model in (tmp_path / "run", exported[0]))
        assert of_run["class_accuracy"] == of_bundle["class_accuracy"]
        assert of_run["calibration_error"] == pytest.approx(of_bundle["calibration_error"], abs=1e-5)
        accuracies.append(of_run["calibration_error"])
        (row,) = fastfsl("predict", exported[0], image, *alpha)["predictions"]
        classifier = Classifier.load(exported[0], device="cpu", alpha=alpha[1] if alpha else None)
        np.testing.assert_allclose(row["probabilities"], classifier.predict(image)[0].probabilities, atol=1e-6)
    assert accuracies[0] != pytest.approx(accuracies[1], abs=1e-4)
    assert fastfsl("inspect", exported[0])["blend"] == exported[1].blend


def test_features_that_are_neither_unit_nor_a_blend_are_not_exported(run, folder, tmp_path, monkeypatch):
    plain = replace(base_encoder(run), normalized=False)
    monkeypatch.setattr("fastfsl.export.bundle_writer.run_encoder", lambda run: plain)
    with pytest.raises(BundleError, match="neither unit-length nor a blend"):
        export_run(run, tmp_path / "bundle")


def test_what_cannot_be_deployed_is_refused_before_any_work(run, tmp_path, monkeypatch):
    def refuse(self):
        raise ConfigError("every image has prompts of its own")

    def heavy(*_, **__):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(Run, "deployment", refuse)
    monkeypatch.setattr("fastfsl.export.bundle_writer.run_encoder", heavy)
    with pytest.raises(ConfigError, match="prompts of its own"):
        export_run(run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []

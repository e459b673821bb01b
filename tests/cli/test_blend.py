"""The weight of a blend on the command line, and what cannot be exported."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastfsl.export import bundle_writer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("train/ant", "train/bee", "test/ant", "test/bee"):
        (root / name).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTFSL_CACHE", str(tmp_path_factory.mktemp("cache")))


def _train(fastfsl, data, target, method):
    options = target.with_suffix(".yaml")
    options.write_text("cocoop: {epochs: 1}\n" if method == "cocoop" else "")
    arguments = ("--method", method, "--backbone", "tiny-clip", "--device", "cpu", "--config", options)
    result = fastfsl("train", data, "--out", target, *arguments)
    assert result.exit_code == 0, result.stderr
    return target


def _refused(result, *words):
    message = " ".join(result.stderr.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in message
    for word in words:
        assert word in message


def test_inspect_shows_the_blend(fastfsl, write_bundle, image_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle", blend={"alpha": 0.3, "normalized": False})
    assert fastfsl("inspect", path, "--json").document["blend"] == {"alpha": 0.3, "normalized": False}
    words = " ".join(fastfsl("inspect", path).stdout.split())
    assert "blend.alpha 0.3 blend.normalized no" in words
    assert fastfsl("inspect", image_bundle, "--json").document["blend"] is None


def test_a_weight_goes_with_a_blend(fastfsl, image_bundle, photos, data, tmp_path):
    _refused(fastfsl("predict", image_bundle, photos / "2.png", "--alpha", "0.3"), "no blend: leave alpha=0.3 out")
    _refused(fastfsl("evaluate", image_bundle, data, "--alpha", "0.3"), "no blend: leave alpha=0.3 out")
    run = _train(fastfsl, data, tmp_path / "run", "zero-shot")
    _refused(fastfsl("evaluate", run, data, "--alpha", "0.3"), "alpha", "zero-shot")
    _refused(fastfsl("evaluate", run, data, "--alpha", "0.3", "--transfer"), "--alpha does not go with --transfer")


@pytest.mark.parametrize("alpha", ["-0.1", "1.1", "nan"])
def test_a_weight_is_a_number_from_0_to_1(fastfsl, write_bundle, photos, tmp_path, alpha):
    path = write_bundle(tmp_path / "bundle", blend={"alpha": 0.3, "normalized": False})
    _refused(fastfsl("predict", path, photos / "2.png", "--alpha", alpha), alpha)


def test_a_weight_goes_with_images(fastfsl, write_bundle, tmp_path):
    """The features of a feature file are blended already, or not at all."""
    path = write_bundle(tmp_path / "bundle", class_names=("a", "b"), blend={"alpha": 0.3, "normalized": True})
    rows, labels = np.eye(5, dtype=np.float32)[:2], np.arange(2)
    np.savez(
        tmp_path / "features.npz",
        train_features=rows,
        train_labels=labels,
        test_features=rows,
        test_labels=labels,
        class_embeddings=rows,
        class_names=np.array(["a", "b"]),
    )
    _refused(fastfsl("evaluate", path, tmp_path / "features.npz", "--alpha", "0.5"), "these data are features")


def test_prompts_of_every_images_own_are_refused_before_any_work(fastfsl, data, tmp_path, monkeypatch):
    run = _train(fastfsl, data, tmp_path / "run", "cocoop")

    def loaded(*_):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(bundle_writer, "run_encoder", loaded)
    _refused(fastfsl("export", run, tmp_path / "bundle"), "cocoop cannot be exported", "cocoop+fma")
    assert not (tmp_path / "bundle").exists()

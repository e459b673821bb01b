"""From a run to a classifier in a process without torch, which learns one class more by its name."""

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastfsl.demo.digits import CLASS_NAMES, enlarge, load_scans
from fastfsl.encoders import class_embeddings
from fastfsl.fit.evaluate import run_encoder
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.run import Run
from fastfsl.images import open_image
from fastfsl.runtime import Classifier

CLASSES, SHOTS = 3, 5
ADDED, PROMPTS = "a_NEW {} digit", ["the number nine", "“9” &amp; nothing else"]
TEMPLATES = '["a photo of the digit {}.", "{}, hand-written"]'
QUICK = f"""
epochs: 10
num_blocks: 1
num_steps: 3
num_views: 2
num_prototypes: 2
templates: {TEMPLATES}
"""
# What a service would do; the outputs go to where the test reads them.
SERVICE = """
import sys
import numpy as np
from fastfsl.runtime import Classifier
bundle, out, name, *rest = sys.argv[1:]
prompts, images = rest[:2], rest[2:]
classifier = Classifier.load(bundle, device="cpu", num_threads=1)
before = classifier.probabilities(images)
classifier.add_class(name)
classifier.add_class("nine", prompts)
predictions = classifier.predict(images, top_k=99)
loaded = [module for module in ("torch", "transformers", "open_clip", "onnx", "scipy") if module in sys.modules]
assert not loaded, loaded
about = classifier.describe()
assert about["num_classes"] == len(classifier.class_names) == len(predictions[0].labels)
assert about["added_classes"] == [name, "nine"] == list(classifier.class_names[-2:])
np.savez(out, before=before, after=classifier.probabilities(images))
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    scans, labels = load_scans()
    for label in range(CLASSES):
        for position, index in enumerate(np.flatnonzero(np.array(labels) == label)[: SHOTS + 2]):
            folder = root / ("train" if position < SHOTS else "test") / CLASS_NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(enlarge(scans[index])).save(folder / f"{index:04d}.png")
    return root


def _backbone(folder, layers):
    """A CLIP whose export takes a second, with random weights."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": layers, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir()
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.25, 0.2], "size": [32, 32]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def make_run(run_fastfsl, digits, tmp_path_factory):
    """Trains a method, once for the module."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTFSL_CACHE", str(tmp_path_factory.mktemp("cache")))
    runs: dict[str, Any] = {}

    def make(method, config):
        if method not in runs:
            folder = tmp_path_factory.mktemp("runs") / "run"
            backbone = _backbone(folder.with_name("model"), layers=5 if method == "mps" else 1)
            file = folder.with_name("config.yaml")
            file.write_text(config)
            command = ("train", digits, "--out", folder, "--shots", SHOTS, "--method", method, "--config", file)
            result = run_fastfsl(*command, "--backbone", backbone, "--json")
            assert result.exit_code == 0, result.stderr
            runs[method] = folder
        return runs[method]

    yield make
    patch.undo()


def _text_config(method):
    return f"templates: {TEMPLATES}\n" + ("num_views: 2\nepochs: 1\n" if method == "mps" else "")


def test_a_flow_learns_a_class_by_name_as_it_would_in_torch(run_fastfsl, make_run, digits, tmp_path):
    folder, bundle, out = make_run("fma", QUICK), tmp_path / "bundle", tmp_path / "out.npz"
    result = run_fastfsl("export", folder, bundle, "--text", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.document["text"]["context_length"] == 24
    assert result.document["text"]["templates"] == json.loads(TEMPLATES)
    assert result.document["parity"]["text"]["max_abs_error"] < 1e-5
    assert result.document["parity"]["text"]["class_error"] < 1e-5
    images = sorted((digits / "test").rglob("*.png"))
    done = subprocess.run(
        [sys.executable, "-c", SERVICE, bundle, out, ADDED, *PROMPTS, *images],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    run = Run.load(folder)
    encoder, flow = run_encoder(run), run.estimator
    assert isinstance(flow, FlowMatchingAlignment)
    features = encoder.encode_images(torch.stack([encoder.transform(open_image(path)) for path in images]))
    with np.load(out) as found:
        np.testing.assert_allclose(found["before"], flow.predict_proba(features), atol=1e-5)
        after = found["after"]
    own = class_embeddings(encoder, ["a NEW {} digit"], run.record.templates)
    said = encoder.encode_texts(PROMPTS).mean(dim=0, keepdim=True).numpy()
    places = torch.from_numpy(flow.targets_of(np.concatenate([own, said])))
    assert np.abs(flow.target_shift_.numpy()).max() > 0.01
    flow.class_targets_ = torch.cat([flow.class_targets_, places[:, None].expand(-1, 2, -1)])
    assert flow.class_targets_.shape == (CLASSES + 2, 2, encoder.embed_dim)
    np.testing.assert_allclose(after, flow.predict_proba(features), atol=1e-5)
    assert after[:, CLASSES:].max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero-shot", "mps"])
def test_classes_that_texts_alone_read_out_can_be_added(run_fastfsl, make_run, digits, tmp_path, method):
    folder, bundle = make_run(method, _text_config(method)), tmp_path / "bundle"
    run = Run.load(folder)
    result = run_fastfsl("export", folder, bundle, "--text", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.document["text"]["linear_scale"] == pytest.approx(run.record.logit_scale)
    classifier = Classifier.load(bundle, device="cpu")
    images = sorted((digits / "test").rglob("*.png"))
    embeds, before = classifier.embed(images), classifier.probabilities(images)
    classifier.add_class("nine")
    encoder = run_encoder(run)
    texts = class_embeddings(encoder, [*run.record.class_names, "nine"], run.record.templates)
    logits = run.record.logit_scale * embeds @ texts.T
    np.testing.assert_allclose(
        classifier.probabilities(images), torch.from_numpy(logits).softmax(dim=1).numpy(), atol=1e-5
    )
    np.testing.assert_allclose(before, torch.from_numpy(logits[:, :CLASSES]).softmax(dim=1).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "extra", "words"),
    [
        ("gda", "", r"cannot be added to gda, part of which is fitted to images"),
        pytest.param(
            "coop",
            "epochs: 1\nnum_contexts: 2\n",
            "class embeddings are not those of its prompts",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_runs_that_cannot_know_a_class_by_its_name_are_not_exported_with_text(
    run_fastfsl, make_run, tmp_path, method, extra, words
):
    folder = make_run(method, _text_config(method) + extra)
    result = run_fastfsl("export", folder, tmp_path / "bundle", "--text")
    assert result.exit_code == 2
    assert "--text" in result.stderr
    assert re.search(words, " ".join(result.stderr.split()))
    assert not (tmp_path / "bundle").exists()

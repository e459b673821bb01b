"""Base and new classes, and transfer to other data, through the commands."""

import json

import numpy as np
import pytest
from PIL import Image

from fastfsl.demo.digits import CLASS_NAMES, enlarge, load_scans

QUICK = """
num_blocks: 1
epochs: 20
batch_size: 16
num_steps: 3
num_views: 2
backbone: tiny-clip
templates: ["a photo of the digit {}."]
augmentation: {horizontal_flip: false}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "quick.yaml"
    file.write_text(QUICK)
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTFSL_CACHE", str(file.parent / "cache"))
    yield file
    patch.undo()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Scans of five digits: 4 a class in train/, 6 a class in test/."""
    root = tmp_path_factory.mktemp("digits")
    scans, labels = load_scans()
    for label in range(5):
        for position, index in enumerate(np.flatnonzero(np.array(labels) == label)[:10]):
            folder = root / ("train" if position < 4 else "test") / CLASS_NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(enlarge(scans[index])).save(folder / f"{index:04d}.png")
    return root


@pytest.fixture(scope="module")
def base_run(run_fastfsl, digits, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "base"
    result = run_fastfsl(
        "train", digits, "-o", folder, "--method", "fma", "--classes", "base", "--config", config, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert result.document["num_classes"] == 3
    assert result.document["num_support"] == 3 * 4
    return folder


def names(digits):
    """In the order of the labels: of the folders' names."""
    return sorted(folder.name for folder in (digits / "test").iterdir())


def test_base_classes_are_kept_with_the_run(base_run, digits):
    record = json.loads((base_run / "run.json").read_text())
    assert record["config"]["classes"] == "base"
    assert record["class_names"] == names(digits)[:3]


def test_each_half_is_scored_among_its_own_classes(run_fastfsl, base_run, digits):
    base = run_fastfsl("evaluate", base_run, digits, "--classes", "base", "--json").document
    assert list(base["class_accuracy"]) == names(digits)[:3]
    assert base["num_samples"] == 18
    assert base["transfer"] is False
    new = run_fastfsl("evaluate", base_run, digits, "--classes", "new", "--transfer", "--json").document
    assert list(new["class_accuracy"]) == names(digits)[3:]
    assert (new["num_samples"], new["classes"], new["transfer"]) == (12, "new", True)
    assert new["accuracy"] > 0.5
    # All five classes, of which it was trained on three.
    everything = run_fastfsl("evaluate", base_run, digits, "--transfer", "--json").document
    assert everything["num_samples"] == 30


def test_other_prompts_can_read_the_new_classes_out(run_fastfsl, base_run, digits):
    options = ("--classes", "new", "--transfer", "--json")
    own = run_fastfsl("evaluate", base_run, digits, *options).document
    same = run_fastfsl("evaluate", base_run, digits, *options, "--template", "a photo of the digit {}.").document
    assert same == own
    result = run_fastfsl("evaluate", base_run, digits, *options, "--template", "euro-sat")
    assert result.exit_code == 2
    assert "did you mean 'eurosat'" in result.stderr


def test_a_bundle_of_base_classes_is_scored_on_them(run_fastfsl, base_run, digits, tmp_path):
    bundle = tmp_path / "bundle"
    assert run_fastfsl("export", base_run, bundle).exit_code == 0
    of_run = run_fastfsl("evaluate", base_run, digits, "--classes", "base", "--json").document
    of_bundle = run_fastfsl("evaluate", bundle, digits, "--classes", "base", "--json").document
    assert of_bundle["class_accuracy"] == of_run["class_accuracy"]
    result = run_fastfsl("evaluate", bundle, digits, "--transfer")
    assert result.exit_code == 2
    assert "give the run it came from" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--classes", "new"), "classes that the classifier does not know"),
        (("--template", "a {}"), "--template goes with --transfer"),
        (("--classes", "half"), "'all', 'base', 'new'"),
    ],
)
def test_what_does_not_go_together_is_named(run_fastfsl, base_run, digits, options, message):
    result = run_fastfsl("evaluate", base_run, digits, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_methods_that_know_their_classes_by_samples_do_not_transfer(run_fastfsl, digits, config, tmp_path):
    run, brief = tmp_path / "run", tmp_path / "brief.yaml"
    brief.write_text("num_views: 2\nbackbone: tiny-clip\naugmentation: {horizontal_flip: false}\n")
    options = ("--method", "gda", "--classes", "base", "--config", brief)
    assert run_fastfsl("train", digits, "--out", run, *options).exit_code == 0
    result = run_fastfsl("evaluate", run, digits, "--classes", "new", "--transfer")
    assert result.exit_code == 2
    assert "GDA has fitted weights for the classes it was trained on" in " ".join(result.stderr.split())

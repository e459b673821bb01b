"""Results beside chance, majority class and zero-shot, in train, evaluate and their pages."""

import importlib
import json
import shlex
import sys
from typing import Any

import numpy as np
import pytest

from fastfsl.data import Columns

CLASSES, DIM = 3, 8


def _write(path, *, noise, counts, seed=0):
    """Features about their class texts; `noise` of 100 leaves nothing of the classes."""
    rng = np.random.default_rng(seed)
    texts = np.eye(CLASSES, DIM, dtype=np.float32)
    arrays: dict[str, Any] = {"class_embeddings": texts, "class_names": np.array(["ant", "bee", "cow"])}
    for split in ("train", "test"):
        labels = np.repeat(np.arange(CLASSES), counts)
        arrays[f"{split}_features"] = (texts[labels] + noise * rng.normal(size=(len(labels), DIM))).astype(np.float32)
        arrays[f"{split}_labels"] = labels
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("good") / "f.npz", noise=0.1, counts=(6, 6, 6))


@pytest.fixture(scope="module")
def hopeless(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("hopeless") / "f.npz", noise=100.0, counts=(60, 8, 8))


def _train(fastfsl, data, tmp_path, *options):
    result = fastfsl("train", data, "--out", tmp_path / "run", "--method", "gda", *options)
    assert result.exit_code == 0, result.stderr
    return result


def test_train_and_evaluate_tell_what_their_accuracy_is_worth(fastfsl, good, tmp_path):
    trained = _train(fastfsl, good, tmp_path, "--json").document
    evaluated = fastfsl("evaluate", tmp_path / "run", good, "--json").document
    for document in (trained, evaluated):
        assert document["chance"] == pytest.approx(1 / 3)
        assert (document["majority_class"], document["majority_share"]) == ("ant", pytest.approx(1 / 3))
        assert document["zero_shot_accuracy"] == 1.0
        assert document["below_majority"] is False
    assert trained["num_held_out"] == 18
    assert trained["held_out_interval"] == pytest.approx([0.8241, 1.0], abs=1e-3)
    assert evaluated["interval"] == pytest.approx([0.8241, 1.0], abs=1e-3)
    assert trained["next"] == shlex.join(["fastfsl", "evaluate", str(tmp_path / "run"), str(good)])
    assert evaluated["next"].startswith(shlex.join(["fastfsl", "export", str(tmp_path / "run")]))


def test_a_person_reads_the_same(fastfsl, good, tmp_path):
    trained = _train(fastfsl, good, tmp_path)
    evaluated = fastfsl("evaluate", tmp_path / "run", good, "--report", tmp_path / "page.html")
    for result, what in ((trained, "held-out accuracy"), (evaluated, "accuracy")):
        words = " ".join(result.stdout.split())
        assert f"{what} 100.0 % (95 % interval 82.4 % to 100.0 %, 18 samples)" in words
        assert "zero-shot 100.0 %, majority class 'ant' 33.3 %, chance 33.3 %" in words
        assert "Next: fastfsl " in words
    for page in (tmp_path / "run" / "report.html", tmp_path / "page.html"):
        text = page.read_text(encoding="utf-8")
        assert "zero-shot: the class texts alone" in text
        assert "95 % interval" in text
        assert "below the majority" not in text


def test_a_set_on_which_the_classifier_stays_below_the_majority_class_says_so(fastfsl, hopeless, tmp_path):
    trained = _train(fastfsl, hopeless, tmp_path, "--json")
    page = tmp_path / "page.html"
    evaluated = fastfsl("evaluate", tmp_path / "run", hopeless, "--report", page, "--json")
    for result in (trained, evaluated):
        assert result.document["below_majority"] is True
        words = " ".join(result.stderr.split())
        assert "stays below the majority class" in words
        assert "always answering 'ant' would be for 78.9 %" in words
        assert result.document["next"] == shlex.join(["fastfsl", "compare", str(hopeless)])
    for file in (tmp_path / "run" / "report.html", page):
        assert "stays below the majority class" in file.read_text(encoding="utf-8")


def test_a_bundle_is_told_of_as_its_run(fastfsl, hopeless, tmp_path):
    _train(fastfsl, hopeless, tmp_path, "--json")
    assert fastfsl("export", tmp_path / "run", tmp_path / "bundle").exit_code == 0
    of_run, of_bundle = (
        fastfsl("evaluate", tmp_path / model, hopeless, "--json").document for model in ("run", "bundle")
    )
    for key in ("interval", "chance", "majority_share", "zero_shot_accuracy", "below_majority"):
        assert of_run[key] == of_bundle[key], key


def test_where_nothing_is_held_out_zero_shot_is_still_told(fastfsl, good, tmp_path):
    trained = _train(fastfsl, good, tmp_path, "--shots", 1, "--json").document
    assert trained["held_out_accuracy"] is trained["held_out_interval"] is trained["below_majority"] is None
    assert trained["num_held_out"] == 0
    assert trained["zero_shot_accuracy"] == 1.0


def test_a_run_of_an_older_version_has_no_texts_of_its_own(fastfsl, good, tmp_path):
    _train(fastfsl, good, tmp_path, "--json")
    (tmp_path / "run" / "texts.safetensors").unlink()
    assert fastfsl("evaluate", tmp_path / "run", good, "--json").document["zero_shot_accuracy"] == 1.0
    (tmp_path / "run" / "texts.safetensors").write_bytes(b"x" * 20)
    refused = fastfsl("evaluate", tmp_path / "run", good)
    assert refused.exit_code == 2
    assert "train it again" in refused.stderr


def test_every_next_command_is_one_that_the_program_takes(fastfsl, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = _train(fastfsl, good, tmp_path, "--json").document
    for expected in ("evaluate", "export", "evaluate"):
        program, command, *arguments = shlex.split(document["next"])
        assert (program, command) == ("fastfsl", expected)
        if arguments[-1] == "FEATURES.npz":
            arguments[-1] = str(good)
        result = fastfsl(command, *arguments, "--json")
        assert result.exit_code == 0, result.stderr
        document = json.loads(result.stdout)
    assert document["next"] == shlex.join(["fastfsl", "bench", "bundle"])


@pytest.mark.parametrize("bundle", [False, True])
def test_the_command_after_a_bad_score_names_the_same_encoder_and_columns(tmp_path, bundle, monkeypatch):
    if bundle:  # is scored where nothing can be trained, too
        monkeypatch.setitem(sys.modules, "fastfsl.fit.config", None)
    config = {"backbone": "tiny-clip", "pretrained": None, "templates": "imagenet"}
    (tmp_path / "run.json").write_text(json.dumps({"config": config}))
    (tmp_path / "manifest.json").write_text(json.dumps({"encoder": {"backbone": "tiny-clip", "pretrained": None}}))
    evaluation = importlib.import_module("fastfsl.cli.evaluate")  # the package's name is the command
    reading = evaluation._Reading(tmp_path, Columns(label="breed"), strict=False)
    document = {"below_majority": True, "classes": "base"}
    words = shlex.split(evaluation._next(tmp_path, "bundle" if bundle else "run", tmp_path, document, reading))
    assert words[:5] == ["fastfsl", "compare", str(tmp_path), "--classes", "base"]
    assert words[5:] == [
        *("--image-root", str(tmp_path), "--label-column", "breed", "--backbone", "tiny-clip"),
        *(() if bundle else ("--template", "imagenet")),
    ]

"""Every kind of bad input: one message that names it, exit code 2, no traceback, nothing written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

RNG = np.random.default_rng(0)


def picture(path, size=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for name in ("ant", "bee"):
        for index in range(4):
            picture(root / name / f"{index}.png")
    return root


@pytest.fixture
def features(tmp_path):
    def write(**changes):
        arrays = {
            "train_features": RNG.normal(size=(8, 6)).astype(np.float32),
            "train_labels": np.array([0, 0, 0, 0, 1, 1, 1, 1]),
            "class_embeddings": RNG.normal(size=(2, 6)).astype(np.float32),
        }
        path = tmp_path / "features.npz"
        np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
        return path

    return write


@pytest.fixture
def refused(fastfsl, tmp_path, monkeypatch):
    """Runs a command that must be refused with all the given words in its message, and must leave nothing behind."""
    monkeypatch.setenv("FASTFSL_CACHE", str(tmp_path / "cache"))

    def check(*arguments, words):
        before = _listing(tmp_path)
        result = fastfsl(*arguments)
        assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
        message = " ".join(result.stderr.split())
        assert message.count("error:") == 1
        assert "Traceback" not in message
        for word in words:
            assert word in message, message
        assert _listing(tmp_path) == before

    return check


def _listing(root):
    return sorted(path for path in root.rglob("*") if "cache" not in path.parts)


TINY = ("--backbone", "tiny-clip")


def test_missing_folder(refused, tmp_path):
    refused("train", tmp_path / "nowhere", "--out", tmp_path / "run", words=["nowhere"])


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("train", tmp_path / "empty", "--out", tmp_path / "run", words=["empty"])


def test_class_without_a_readable_image(refused, folder, tmp_path):
    for file in (folder / "bee").iterdir():
        file.write_bytes(b"not an image")
    refused("train", folder, "--out", tmp_path / "run", *TINY, words=["'bee'", "readable"])


def test_one_class_only(refused, folder, tmp_path):
    shutil.rmtree(folder / "bee")
    refused("train", folder, "--out", tmp_path / "run", *TINY, words=["ant", "class"])


def test_fewer_images_than_shots(refused, folder, tmp_path):
    refused(
        "train",
        folder,
        "--out",
        tmp_path / "run",
        "--shots",
        5,
        "--exact-shots",
        *TINY,
        words=["'ant' (4)", "at most 4"],
    )


def test_unknown_method(refused, folder, tmp_path):
    refused("train", folder, "--out", tmp_path / "run", "--method", "fmaa", words=["fmaa", "fma"])


def test_unknown_model(refused, folder, tmp_path):
    refused("train", folder, "--out", tmp_path / "run", "--backbone", "ViT-B-61", words=["ViT-B-61", "ViT-B-16"])


def test_unknown_tag(refused, folder, tmp_path):
    refused(
        "train", folder, "--out", tmp_path / "run", "--backbone", "ViT-B-32", "--pretrained", "opnai",
        words=["opnai", "openai"],
    )  # fmt: skip


def test_wrong_checkpoint(refused, folder, tmp_path):
    from safetensors.numpy import save_file

    save_file({"visual.conv1.weight": np.zeros((2, 3), np.float32)}, tmp_path / "other.safetensors")
    refused(
        "train", folder, "--out", tmp_path / "run", *TINY, "--pretrained", tmp_path / "other.safetensors",
        words=["other.safetensors"],
    )  # fmt: skip


def test_checkpoint_that_is_no_checkpoint(refused, folder, tmp_path):
    (tmp_path / "noise.pt").write_bytes(RNG.bytes(1000))
    refused(
        "train", folder, "--out", tmp_path / "run", *TINY, "--pretrained", tmp_path / "noise.pt", words=["noise.pt"]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": np.array([0, 0, 0, 0, 1, 1, 1, 2])}, ["train_labels"]),
        ({"train_labels": np.array([0, 0, 0, 0, 1, 1, 1, -1])}, ["train_labels"]),
        ({"train_features": np.full((8, 6), np.nan, np.float32)}, ["train_features", "NaN"]),
        ({"train_features": np.ones((8, 5), np.float32)}, ["5", "6"]),
        ({"train_features": np.ones((7, 6), np.float32)}, ["7", "8"]),
        ({"class_embeddings": np.ones((1, 6), np.float32), "train_labels": np.zeros(8, int)}, ["class"]),
        ({"class_embeddings": None}, ["class_embeddings"]),
        ({"train_features": np.array(["a"] * 8)}, ["train_features"]),
    ],
)
def test_bad_feature_files(refused, features, tmp_path, changes, words):
    refused("train", features(**changes), "--out", tmp_path / "run", words=words)


def test_pickled_arrays_are_not_unpickled(refused, tmp_path):
    np.savez(tmp_path / "features.npz", train_features=np.array([{"a": 1}], dtype=object))
    refused("train", tmp_path / "features.npz", "--out", tmp_path / "run", words=["features.npz"])


def test_unwritable_output(refused, features, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused("train", features(), "--out", tmp_path / "file" / "run", words=["file", "choose another"])


def test_existing_output(refused, features, tmp_path):
    (tmp_path / "run").mkdir()
    refused("train", features(), "--out", tmp_path / "run", words=["run exists", "--force"])
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    refused("train", features(), "--out", tmp_path / "run", "--force", words=["not replaced"])


def test_bad_configuration_file(refused, features, tmp_path):
    (tmp_path / "c.yaml").write_text("method: fma\nepoch: 3")
    refused(
        "train", features(), "--out", tmp_path / "run", "--config", tmp_path / "c.yaml", words=["'epoch'", "'epochs'"]
    )


def test_a_threshold_from_a_method_that_has_none(refused, features, tmp_path):
    options = ("--method", "gda", "--target-precision", 0.9)
    refused("train", features(), "--out", tmp_path / "run", *options, words=["'target_precision'", "'gda'"])


def test_a_training_that_diverges(refused, features, tmp_path):
    (tmp_path / "c.yaml").write_text("method: fma\nnum_blocks: 1\nnum_steps: 3\nlearning_rate: 1e30\n")
    refused("train", features(), "--out", tmp_path / "run", "--config", tmp_path / "c.yaml", words=["learning_rate"])


def test_evaluating_something_else(refused, features, tmp_path):
    refused("evaluate", tmp_path, features(), words=["run.json", "manifest.json"])


def test_evaluating_a_split_that_is_missing(refused, fastfsl, features, tmp_path):
    (tmp_path / "c.yaml").write_text("method: fma\nnum_blocks: 1\nepochs: 1\nnum_steps: 1\n")
    data = features()
    assert fastfsl("train", data, "--out", tmp_path / "run", "--config", tmp_path / "c.yaml").exit_code == 0
    refused("evaluate", tmp_path / "run", data, words=["test"])
    refused("export", tmp_path / "run", tmp_path / "run", words=["run exists"])
    (tmp_path / "run" / "model.safetensors").write_bytes(b"\x00" * 64)
    refused("export", tmp_path / "run", tmp_path / "bundle", words=["train it again"])
    (tmp_path / "run" / "model.safetensors").unlink()
    refused("export", tmp_path / "run", tmp_path / "bundle", words=["model.safetensors"])


def test_a_corrupt_image_among_good_ones_is_skipped_with_a_warning_in_training(fastfsl, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFSL_CACHE", str(tmp_path / "cache"))
    (folder / "ant" / "0.png").write_bytes((folder / "ant" / "0.png").read_bytes()[:60])
    (tmp_path / "c.yaml").write_text("method: fma\nnum_blocks: 1\nepochs: 1\nnum_steps: 1\nnum_views: 1\n")
    result = fastfsl("train", folder, "--out", tmp_path / "run", *TINY, "--config", tmp_path / "c.yaml", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.document["num_support"] == 7
    assert "ant/0.png" in result.stderr.replace("\n", "")


def _cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _edit(bundle, **fields):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | fields))


def _escape(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["../outside.onnx"] = manifest["files"].pop("flow/plan.safetensors")
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda bundle: (bundle / "flow" / "model.onnx").unlink(), ["flow/model.onnx"]),
        (lambda bundle: _cut(bundle / "flow" / "model.onnx"), ["flow/model.onnx"]),
        (lambda bundle: _flip(bundle / "visual" / "model.onnx"), ["visual/model.onnx"]),
        (lambda bundle: _flip(bundle / "flow" / "plan.safetensors"), ["plan.safetensors"]),
        (lambda bundle: _edit(bundle, format_version=99), ["99", "newer"]),
        (_escape, ["../outside.onnx"]),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), ["manifest.json"]),
    ],
    ids=["missing", "truncated", "altered", "altered-plan", "version", "leaves", "no-json"],
)
def test_bad_bundles(refused, image_bundle, tmp_path, damage, words):
    bundle = tmp_path / "bundle"
    shutil.copytree(image_bundle, bundle)
    damage(bundle)
    picture(tmp_path / "a.png")
    refused("predict", bundle, tmp_path / "a.png", words=words)
    refused("inspect", bundle, words=words)


def test_a_corrupt_image_is_an_error_in_predict(refused, image_bundle, tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"GIF89a?")
    refused("predict", image_bundle, tmp_path / "good.png", tmp_path / "bad.png", words=["bad.png"])


def test_impossible_names(refused, image_bundle, features):
    name = "x" * 5000
    refused("inspect", name, words=["too long"])
    refused("predict", image_bundle, name, words=["too long"])
    refused("evaluate", name, features(), words=["too long"])


def test_names_that_the_terminal_cannot_show_are_escaped(write_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle", class_names=("\xe9lan", "\u65e5\u672c", "cow"))
    picture(tmp_path / "a.png")
    command = [sys.executable, "-c", "from fastfsl.cli import main; main()", "predict", str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([*command, str(tmp_path / "a.png")], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\xe9lan" in done.stdout


# A process started in the background of a script inherits SIGINT ignored; Ctrl-C in a terminal meets the default.
_ANNOUNCED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from fastfsl.fit import fma
select = fma.select_num_steps
def announced(*args, **options):
    Path(STARTED).touch()
    return select(*args, **options)
fma.select_num_steps = announced
from fastfsl.cli import main
main()
"""


def test_ctrl_c_in_training_leaves_nothing_half_written(features, tmp_path):
    data, started = features(), tmp_path / "started"
    (tmp_path / "c.yaml").write_text("method: fma\nepochs: 100000\nnum_folds: 2\n")
    script = _ANNOUNCED.replace("STARTED", repr(str(started)))
    command = [sys.executable, "-c", script, "train", str(data), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*command, "--config", str(tmp_path / "c.yaml")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "FASTFSL_CACHE": str(tmp_path / "cache")},
    )
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # into the first of 100 000 epochs
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert b"interrupted" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "features.npz", "started"]

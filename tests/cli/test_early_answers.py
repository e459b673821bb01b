"""Bad input is answered before torch, open_clip, onnx or scikit-learn are imported, in every command."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

HEAVY = (
    "torch",
    "torchvision",
    "open_clip",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sklearn",
    "scipy",
    "matplotlib",
    "triton",
)

# One process for all: the imports would be the same ones anyway, and whoever imports too much is named by its place.
_PROGRAM = """
import json, sys
from typer.testing import CliRunner
from fastfsl.cli import app
answers = []
for arguments in json.load(sys.stdin):
    result = CliRunner().invoke(app, arguments)
    loaded = sorted({name.split(".")[0] for name in sys.modules} & set(HEAVY))
    answers.append([result.exit_code, result.stderr, loaded])
print(json.dumps(answers))
"""


def answers(commands):
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.replace("HEAVY", repr(HEAVY))],
        input=json.dumps([[str(word) for word in command] for command in commands]),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of two classes, feature files good and bad, a finished run's record, a bundle's manifest."""
    root = tmp_path_factory.mktemp("early")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        for index in range(2):
            file = root / "images" / name / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    arrays: dict[str, Any] = {
        "train_features": rng.normal(size=(4, 6)).astype(np.float32),
        "train_labels": np.array([0, 0, 1, 1]),
        "class_embeddings": rng.normal(size=(2, 6)).astype(np.float32),
        "class_names": np.array(["ant", "bee"]),
    }
    np.savez(root / "good.npz", **arrays)
    np.savez(root / "wide.npz", **{**arrays, "train_features": np.ones((4, 5), np.float32)})
    (root / "taken").mkdir()
    (root / "taken" / "thesis.tex").write_text("years of work")
    (root / "broken.yaml").write_text("method: [fma\n")
    (root / "typo.yaml").write_text("method: fma\nepoch: 3\n")
    (root / "range.yaml").write_text("method: fma\nnum_blocks: 0\n")
    (root / "text.yaml").write_text("method: gda\nnum_folds: many\n")
    for method in ("auto", "gda"):
        (root / method).mkdir()
        record = {
            "config": {"method": method},
            "encoder": {"backbone": "tiny-clip"},
            "selection": {"weights": {"gda": 1.0}},
            "class_names": ["ant", "bee"],
            "embed_dim": 6,
        }
        (root / method / "run.json").write_text(json.dumps(record))
    (root / "bundle").mkdir()
    (root / "bundle" / "manifest.json").write_text("{}")
    return root


def test_every_command_answers_before_the_imports_that_take_seconds(place):
    new, images, good = place / "new", place / "images", place / "good.npz"
    tiny = ("--backbone", "tiny-clip")
    cases = [
        (("train", place / "mistyped", "--out", new), "mistyped does not exist"),
        (("train", images, "--out", place / "taken"), "taken exists"),
        (("train", images, "--out", place / "taken", "--force"), "not replaced"),
        (("train", images, "--out", new, "--method", "fmaa"), "unknown method 'fmaa'"),
        (("train", images, "--out", new, *tiny, "--shots", "0"), "shots"),
        (("train", images, "--out", new, *tiny, "--shots", "3", "--exact-shots"), "at most 2"),
        (("train", images, "--out", new, "--backbone", "ViT-B-61"), "did you mean ViT-B-16"),
        (("train", images, "--out", new), "needs weights"),
        (("train", images, "--out", new, "--pretrained", "missing.pt"), "checkpoint file missing.pt does not exist"),
        (("train", images, "--out", new, "--pretrained", "opnai"), "did you mean openai"),
        (("train", images, "--out", new, "--pretrained", "openai"), "--backbone ViT-B-16-quickgelu --pretrained"),
        (("train", images, "--out", new, "--backbone", "hf-hub:some/model"), "local-dir:FOLDER"),
        (("train", images, "--out", new, "--backbone", f"local-dir:{place}"), "open_clip_config.json is missing"),
        (("train", images, "--out", new, *tiny, "--template", "no braces {"), "exactly once"),
        (("train", images, "--out", new, "--device", "gpu"), "device"),
        (("train", images, "--out", new, "--config", place / "broken.yaml"), "broken.yaml"),
        (("train", images, "--out", new, "--config", place / "typo.yaml"), "did you mean 'epochs'"),
        (("train", images, "--out", new, "--config", place / "text.yaml"), "'num_folds'"),
        (("train", images, "--out", new, "--config", place / "range.yaml"), "expected num_blocks >= 1, got 0"),
        (("train", images, "--out", new, *tiny, "--target-precision", "3"), "target_precision between 0 and 1, got 3"),
        (("train", place / "wide.npz", "--out", new), "has width 5"),
        (("train", good, "--out", new, "--method", "mps"), "a feature file has none"),
        (("evaluate", place / "mistyped", good), "which does not exist"),
        (("evaluate", place / "gda", place / "mistyped"), "mistyped does not exist"),
        (("evaluate", place / "gda", good, "--split", "test"), "'test'"),
        (("evaluate", place / "gda", good, "--split", "tset"), "--split"),
        (("evaluate", place / "gda", images, "--device", "gpu"), "device"),
        (("evaluate", place / "bundle", good), "manifest.json"),
        (("compare", place / "mistyped"), "mistyped does not exist"),
        (("compare", good, "--methods", "gdaa"), "unknown method 'gdaa'"),
        (("compare", good, "--shots", "one"), "--shots"),
        (("compare", good, "--out", place / "taken"), "holds no comparison"),
        (("compare", good, "--config", place / "broken.yaml"), "broken.yaml"),
        (("compare", good), "no 'test' split"),
        (("export", place / "mistyped", new), "which does not exist"),
        (("export", place / "bundle", new), "is a bundle already"),
        (("export", place / "gda", place / "taken"), "taken exists"),
        (("export", place / "gda", new, "--arch", "sm_12"), "unknown architecture"),
        (("export", place / "gda", new, "--text"), "cannot be added to gda"),
        (("export", place / "auto", new, "--text"), "train one of zero-shot, fma"),
        (("demo", "--out", place / "taken"), "not a demo's folder"),
        (("demo", "--out", new, "--method", "fmaa"), "unknown method 'fmaa'"),
        (("bench", place / "mistyped"), "no such bundle folder"),
        (("bench", place / "gda"), "is a run, not a bundle"),
        (("bench", place / "bundle", "--batch", "many"), "--batch"),
        (("bench", place / "bundle", "--out", place / "taken"), "taken exists"),
        (("predict", place / "mistyped", images), "no such bundle folder"),
        (("predict", place / "gda", images), "is a run, not a bundle"),
        (("predict", place / "bundle", place / "mistyped.jpg"), "no such image file"),
        (("inspect", place / "mistyped"), "no such bundle folder"),
        (("inspect", place / "gda"), "is a run, not a bundle"),
    ]
    before = sorted(place.rglob("*"))
    for (command, words), (code, message, loaded) in zip(cases, answers([c for c, _ in cases]), strict=True):
        shown = " ".join(message.split())
        assert code == 2, (command, shown)
        assert words in shown, (command, shown)
        assert loaded == [], (command, loaded)
    assert sorted(place.rglob("*")) == before


def _seconds(*arguments):
    """The best of three: what the command takes where nothing else runs."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from fastfsl.cli import main; main()", *map(str, arguments)],
            capture_output=True,
            check=False,
        )
        found.append(time.perf_counter() - start)
    return min(found)


def test_a_mistyped_folder_takes_little_longer_than_the_help(tmp_path):
    mistyped = _seconds("train", tmp_path / "nowhere", "--out", tmp_path / "run")
    # On a quiet machine 0.3 s against 0.2 s; the slack is for one that is busy.
    assert mistyped <= 2 * _seconds("--help") + 0.3

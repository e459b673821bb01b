"""The keys of every command's --json are those that docs/json.md lists, no more and no fewer, and of those types."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TYPES: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "list": list, "object": dict,
    "null": type(None),
}  # fmt: skip
COMMANDS = ("train", "evaluate", "compare", "export", "predict", "bench", "inspect", "doctor", "demo")


def documented(page):
    """Of each command the keys with their types and whether they may be missing."""
    found = {}
    for section in page.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = re.findall(r"^\| (\()?`([\w.\[\]]+)`(?:\))? \| ([\w, ]+) \|", body, flags=re.MULTILINE)
        found[title.strip()] = {key: (kinds.split(", "), bool(optional)) for optional, key, kinds in rows}
    return found


def check(document, keys, prefix=""):
    own = {
        key.removeprefix(prefix): rule
        for key, rule in keys.items()
        if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    }
    assert set(document) <= set(own), f"not documented under {prefix or 'the document'}"
    missing = {key for key, (_, optional) in own.items() if not optional} - set(document)
    assert not missing, f"documented and not there under {prefix or 'the document'}"
    for key, value in document.items():
        kinds = own[key][0]
        fits = any(isinstance(value, TYPES[kind]) for kind in kinds)
        assert fits, (key, value, kinds)
        assert not isinstance(value, bool) or "boolean" in kinds, key
        below = f"{prefix}{key}[]."
        if isinstance(value, list) and any(other.startswith(below) for other in keys):
            for entry in value:
                check(entry, keys, below)


@pytest.fixture(scope="module")
def pages(checkout_docs):
    return documented(checkout_docs / "json.md")


@pytest.fixture(scope="module")
def checkout_docs():
    folder = Path(__file__).resolve().parents[2] / "docs"
    if not folder.is_dir():  # the wheel is tested where no sources are
        pytest.skip("no docs here")
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = np.eye(3, 8, dtype=np.float32)
    arrays: dict[str, Any] = {"class_embeddings": texts, "class_names": np.array(["ant", "bee", "cow"])}
    for split in ("train", "test"):
        labels = np.repeat(np.arange(3), 4)
        arrays[f"{split}_features"] = (texts[labels] + 0.1 * rng.normal(size=(12, 8))).astype(np.float32)
        arrays[f"{split}_labels"] = labels
    path = tmp_path_factory.mktemp("features") / "f.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("dark", "bright")):
            for index in range(2):
                path = root / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(120 * label, 120 * label + 99, (16, 16, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def documents(run_fastfsl, features, folder, image_bundle, photos, tmp_path_factory):
    """At least one document of each command but the demo."""
    root = tmp_path_factory.mktemp("out")
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTFSL_CACHE", str(root / "cache"))
    config = root / "c.yaml"
    config.write_text("backbone: tiny-clip\nnum_views: 1\nnum_folds: 2\n")
    broken = root / "broken.png"
    broken.write_bytes(b"x")
    run, bundle = root / "run", root / "bundle"
    commands = [
        ("train", features, "--out", run, "--method", "gda"),
        ("train", folder, "--out", root / "images", "--method", "gda", "--config", config),
        ("train", features, "--out", root / "one", "--method", "gda", "--shots", 1),
        ("evaluate", run, features),
        ("evaluate", root / "images", folder),
        ("compare", features, "--methods", "gda,zero-shot", "--shots", "1,all", "--seeds", 1, "--out", root / "all"),
        ("export", run, bundle),
        ("evaluate", bundle, features),
        ("predict", image_bundle, photos),
        ("predict", image_bundle, photos, broken, "--on-error", "mark"),
        ("predict", image_bundle, photos, broken, "--output", root / "rows.jsonl"),
        ("predict", image_bundle, photos, broken, "--output", root / "rows.jsonl", "--resume"),
        ("bench", bundle, "--batch", 1, "--seconds", 0.01),
        ("inspect", bundle),
        ("inspect", image_bundle),
        ("doctor",),
    ]
    found = []
    for arguments in commands:
        result = run_fastfsl(*arguments, "--json")
        assert result.exit_code == 0, (arguments, result.stderr)
        found.append((arguments, result.document))
    patch.undo()
    return found


def test_every_command_has_a_section(pages):
    assert [title for title in pages if pages[title]] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_the_keys_are_those_of_the_page(documents, pages, command):
    of_command = [(arguments, document) for arguments, document in documents if arguments[0] == command]
    assert of_command
    for _, document in of_command:
        check(document, pages[command])


def test_files_add_up(documents):
    accounts = [document["files"] for _, document in documents if isinstance(document.get("files"), dict)]
    accounts = [files for files in accounts if "seen" in files]
    assert len(accounts) >= 4
    for files in accounts:
        assert files["seen"] == files["used"] + files["skipped"]


def test_the_keys_that_others_rely_on_are_on_the_page(pages):
    relied = {
        "evaluate": "accuracy num_samples method num_steps",
        "compare": "rows[].method rows[].shots rows[].accuracy_mean rows[].accuracy_sd rows[].train_seconds "
        "rows[].num_parameters",
        "bench": "rows[].batch rows[].p50_ms rows[].p95_ms rows[].p99_ms rows[].images_per_second rows[].provider",
        "predict": "predictions[].input predictions[].labels predictions[].probabilities predictions[].error",
        "train": "run method num_steps train_seconds",
        "doctor": "providers problems",
    }
    for command, keys in relied.items():
        assert set(keys.split()) <= set(pages[command])


def test_the_demos_document(pages):
    """As its source writes it: the demo itself takes too long here."""
    source = inspect.getsource(sys.modules["fastfsl.cli.demo"].run_demo)
    rows, _, document = source.partition("    document = {")
    assert set(re.findall(r'^ {8}"(\w+)":', document, flags=re.MULTILINE)) == {
        key for key in pages["demo"] if "." not in key
    }
    measured = {"ms_per_image_batch_1", "ms_per_image_batch_32"}
    assert set(re.findall(r'^ {12}"(\w+)":', rows, flags=re.MULTILINE)) | measured == {
        key.removeprefix("rows[].") for key in pages["demo"] if "." in key
    }

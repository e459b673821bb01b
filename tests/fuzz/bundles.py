"""Mutants of bundles, with hashes that fit, so that what was altered reaches its parser; and what is done with each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from fastfsl import bundle
from fastfsl.errors import DataError
from fastfsl.runtime import Classifier
from tests.fuzz.mutation import ONNX, json_bytes, mutated_bytes, mutated_json, mutated_message, mutated_safetensors
from tests.fuzz.strangers import lies, with_added
from tests.fuzz.tokenizers import mutated_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
BASES = tuple(GOLDEN / name for name in ("images", "blend", "compiled", "text"))
Files = dict[str, bytes]

# Some files of a bundle, and the bundle with the most parsers, are altered more often than their number would have it.
_WEIGHTS = {
    bundle.MANIFEST_NAME: 6,
    bundle.FLOW_GRAPH: 6,
    bundle.VISUAL_GRAPH: 6,
    bundle.TEXT_GRAPH: 6,
    bundle.READOUT: 3,
    bundle.TOKENIZER: 14,
}
_TEXT_BUNDLES = 3
# Of the graphs and manifests this part is altered as somebody would who means harm, the others blindly.
_ON_PURPOSE = 0.35


def read_folder(folder: Path) -> Files:
    """Every file of a bundle."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mutant(bases: tuple[Files, ...], seed: int, index: int) -> Files:
    """One mutant; the same numbers give the same one."""
    rng, files, target, kind = _choice(bases, seed, index)
    manifest = json.loads(files.pop(bundle.MANIFEST_NAME))
    names = _alterable(files)
    if kind == 0:
        one, other = rng.choice(names), rng.choice(names)
        files[one], files[other] = files[other], files[one]
    elif kind == 1:
        del files[rng.choice(list(files))]
    elif kind == 2:
        files[rng.choice(("text/x.bin", "flow/kernels/x", "heads/more.safetensors"))] = rng.randbytes(40)
    elif target != bundle.MANIFEST_NAME:
        files[target] = _altered(target, files[target], rng, files[rng.choice(names)])
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in files.items()
        if kind != 2 or rng.random() < 0.9
    }
    values = {**manifest, "files": listed}
    if kind > 2 and target == bundle.MANIFEST_NAME:
        values = lies(values, rng) if rng.random() < _ON_PURPOSE else mutated_json(values, rng)
    encoded = json_bytes(values, rng) if target == bundle.MANIFEST_NAME else json.dumps(values).encode()
    return {**files, bundle.MANIFEST_NAME: encoded}


def _choice(bases: tuple[Files, ...], seed: int, index: int) -> tuple[random.Random, Files, str, int]:
    """Whatever else is drawn for a mutant, a copy of the bundle, the file that is altered, and how (see `mutant`)."""
    rng = random.Random(f"bundles {seed} {index}")
    files = dict(rng.choices(bases, [_TEXT_BUNDLES if bundle.TOKENIZER in base else 1 for base in bases])[0])
    choices = [bundle.MANIFEST_NAME, *_alterable(files)]
    target = rng.choices(choices, [_WEIGHTS.get(name, 2) for name in choices])[0]
    return rng, files, target, rng.randrange(30)


def _alterable(files: Files) -> list[str]:
    return [name for name in files if not name.endswith((".cubin", ".ptx", ".md")) and name != bundle.MANIFEST_NAME]


def altered_file(bases: tuple[Files, ...], seed: int, index: int) -> str:
    """The file that a mutant's alteration is in; "" for one whose files are exchanged, missing or too many."""
    _, _, target, kind = _choice(bases, seed, index)
    return target if kind > 2 else ""


def _altered(name: str, data: bytes, rng: random.Random, other: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(data, rng, other)
    if name == bundle.TOKENIZER:
        return mutated_tokenizer(data, rng)
    if name.endswith(".json"):
        return json_bytes(mutated_json(json.loads(data), rng), rng)
    if name.endswith(".safetensors"):
        return mutated_safetensors(data, rng)
    return with_added(data, rng) if rng.random() < _ON_PURPOSE else mutated_message(data, rng, ONNX)


def write_folder(files: Files, folder: Path) -> None:
    """Put a mutant on the disk."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


_IMAGES = [np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 32), (20, 50))]


_PROMPTS = ["a photo of a <end_of_text> bird", "a" * 60 + "b", "it&#39;s 3 \u00c3\u00a9 日本 😀", "aab " * 300]


def exercise(folder: Path) -> None:
    """All that can be done with a bundle on a processor.

    Raises:
        FastFSLError: it was refused.
        AssertionError: it gave something that is no answer.
    """
    manifest = bundle.check_bundle(folder)
    if bundle.FLOW_PLAN in manifest.files:
        bundle.read_plan(folder / bundle.FLOW_PLAN, bundle.read_file(folder, manifest, bundle.FLOW_PLAN))
    kernels = bundle.read_flow_kernels(folder, manifest)
    if kernels is not None:
        bundle.read_flow_weights(folder, manifest)
        for target in kernels.targets.values():
            bundle.read_kernel(folder, manifest, target.kernels[0])
    with Classifier.load(folder, device="cpu", num_threads=1, max_batch=4) as classifier:
        classes, width = len(classifier.class_names), manifest.embed_dim
        features = np.random.default_rng(1).normal(size=(3, width)).astype(np.float32)
        if manifest.blend is not None:
            features *= 0.9 / np.linalg.norm(features, axis=1, keepdims=True)
        _probable(classifier.feature_probabilities(features), (3, classes))
        assert np.isfinite(classifier.transport(features)).all(), "transport is not finite"
        if manifest.encoder is not None:
            _probable(classifier.probabilities(_IMAGES), (2, classes))
            assert np.isfinite(classifier.embed(_IMAGES)).all(), "embeddings are not finite"
            labels = [label for prediction in classifier.predict(_IMAGES) for label in prediction.labels]
            assert set(labels) <= set(classifier.class_names), "unknown labels"
        if manifest.text is not None:
            classifier.add_class("blue jay")
            with contextlib.suppress(DataError):
                classifier.add_class("a \ud800 jay")
                raise AssertionError("a class that cannot be written")
            classifier.add_class("another", _PROMPTS)
            _probable(classifier.probabilities(_IMAGES), (2, classes + 2))
        json.dumps(classifier.describe(), allow_nan=False)


def _probable(rows: Any, shape: tuple[int, int]) -> None:
    assert rows.shape == shape, f"probabilities of shape {rows.shape}, expected {shape}"
    assert np.isfinite(rows).all(), "probabilities are not finite"
    assert np.allclose(rows.sum(axis=1), 1, atol=1e-4), "probabilities do not add up to one"

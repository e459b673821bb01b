"""The bound on the memory of a graph: it is kept, changes no answer, and leaves the application's sessions alone."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from fastfsl.bundle.onnx_graph import GraphFacts
from fastfsl.errors import BundleError, ConfigError
from fastfsl.runtime import Classifier
from fastfsl.runtime.arena import VARIABLE, arena_bytes, limit_folding
from fastfsl.runtime.session import create_session, run_rows
from tests.runtime.forged_bundles import GOLDEN, WIDTH, flow, node

ROWS = np.random.default_rng(0).normal(size=(9, WIDTH)).astype(np.float32)
GIBIBYTE = 2**30


def _large(megabytes: int) -> bytes:
    """A flow that takes so much when it runs, which its graph does not show."""
    nodes = [node("Mul", ["count", "each"], ["shape"]), node("Expand", ["zero", "shape"], ["made"])]
    return flow(nodes, count=np.array([megabytes]), each=np.array([2**18]))


def _computed(megabytes: int) -> bool:
    session = create_session(_large(megabytes), "flow", device="cpu", num_threads=1)
    try:
        run_rows(session, "logits", {"image_embeds": ROWS})
    except BundleError as error:
        assert f"set {VARIABLE} in the environment" in str(error)  # noqa: PT017 - there may be none
        return False
    return True


def test_more_than_the_bound_is_a_bundle_error_and_the_environment_moves_it(monkeypatch):
    assert _computed(20)
    assert not _computed(200)
    monkeypatch.setenv(VARIABLE, str(400 * 2**20))
    assert _computed(200)
    monkeypatch.setenv(VARIABLE, "0")
    assert _computed(200)
    monkeypatch.setenv(VARIABLE, str(2**20))
    assert not _computed(20)


@pytest.mark.parametrize("said", ["-1", "1e9", "much", "10 GB", "9" * 30, "٣"])
def test_an_environment_that_names_no_number_of_bytes_is_refused(monkeypatch, said):
    monkeypatch.setenv(VARIABLE, said)
    with pytest.raises(ConfigError, match=f"{VARIABLE} must be a number of bytes"):
        create_session(flow(), "flow", device="cpu")


def test_a_session_that_met_its_bound_still_answers():
    session = create_session(flow(), "flow", device="cpu", num_threads=1)
    wanted = run_rows(session, "logits", {"image_embeds": ROWS})
    many = np.ones((2 * 10**6, WIDTH), np.float32)
    with pytest.raises(BundleError, match="Available memory"):
        run_rows(session, "logits", {"image_embeds": many})
    np.testing.assert_array_equal(run_rows(session, "logits", {"image_embeds": ROWS}), wanted)


@pytest.mark.parametrize("name", ["images", "blend", "text"])
def test_the_bound_changes_no_bit_of_an_answer(monkeypatch, name):
    images = [np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8) for _ in range(5)]
    found = []
    for said in ("", "0"):
        monkeypatch.setenv(VARIABLE, said)
        with Classifier.load(GOLDEN / name, device="cpu", num_threads=2) as classifier:
            found.append(classifier.probabilities(images))
    np.testing.assert_array_equal(found[0], found[1])


def test_a_large_batch_of_features_is_computed_in_parts():
    """So what the graph may take need not grow with `max_batch`."""
    features = np.random.default_rng(2).normal(size=(2000, 24)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    with (
        Classifier.load(GOLDEN / "images", device="cpu", num_threads=1, max_batch=2000) as large,
        Classifier.load(GOLDEN / "images", device="cpu", num_threads=1) as small,
    ):
        np.testing.assert_allclose(
            large.feature_probabilities(features), small.feature_probabilities(features), atol=1e-6
        )


def test_the_applications_sessions_are_left_alone():
    """Those that do not ask for the environment's allocator, and those that do and are made afterwards."""
    create_session(flow(), "flow", device="cpu", num_threads=1)
    for shared in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.use_env_allocators", shared)
        theirs = onnxruntime.InferenceSession(_large(200), options, providers=["CPUExecutionProvider"])
        assert theirs.run(["logits"], {"image_embeds": ROWS})[0].shape == (9, 5)


_LEAK = """
import gc, sys, numpy
from fastfsl.runtime.session import create_session, run_rows

def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) // 1024

rows, graph = numpy.ones((2, 24), numpy.float32), open(sys.argv[1], "rb").read()
run_rows(create_session(graph, "flow", device="cpu", num_threads=1), "logits", {"image_embeds": rows})
gc.collect()
before = resident()
for _ in range(8):
    run_rows(create_session(graph, "flow", device="cpu", num_threads=1), "logits", {"image_embeds": rows})
gc.collect()
print(resident() - before)
"""


def test_an_arena_goes_with_its_session(tmp_path):
    """The environment, which hands it to the session, would keep the last one."""
    (tmp_path / "model.onnx").write_bytes(_large(50))
    ended = subprocess.run(
        [sys.executable, "-c", _LEAK, str(tmp_path / "model.onnx")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert int(ended.stdout) < 30, f"{ended.stdout} MB more after eight sessions of 50"
    gc.collect()


def test_the_bound_grows_with_weights_rows_and_images(tmp_path):
    """Ours take a third of it at most; the most memory that there is stays a bound."""
    small, images = GraphFacts(10**5, row_values=24), GraphFacts(350 * 10**6, row_values=3 * 224 * 224, images=True)
    assert arena_bytes(small, 16, tmp_path) < 80 * 2**20
    assert arena_bytes(images, 4, tmp_path) > 0.9 * GIBIBYTE
    assert arena_bytes(images, 8, tmp_path) > arena_bytes(images, 4, tmp_path)
    assert arena_bytes(GraphFacts(10**5, row_values=65536), 16, tmp_path) < 400 * 2**20
    (tmp_path / "memory.max").write_text(f"{GIBIBYTE}\n")
    assert arena_bytes(images, 64, tmp_path) == 0.75 * GIBIBYTE
    (tmp_path / "memory.max").write_text("max\n")
    assert arena_bytes(images, 8, tmp_path) > GIBIBYTE


@pytest.mark.parametrize(("version", "known", "refused"), [("1.26.1", False, True), ("1.26.1", True, False)])
def test_a_release_that_cannot_be_told_makes_nothing_of_constants(version, known, refused):
    entries: dict[str, str] = {}
    options = SimpleNamespace(add_session_config_entry=entries.__setitem__)
    facts = GraphFacts(100, folding_bytes=1000, folding_known=known)
    old = SimpleNamespace(__version__=version)
    assert (limit_folding(old, options, facts) == {"disabled_optimizers": ["ConstantFolding"]}) is refused  # type: ignore[arg-type]  # a stand-in
    assert not entries
    assert limit_folding(SimpleNamespace(__version__="1.27.0"), options, facts) == {}  # type: ignore[arg-type]  # a stand-in
    assert list(entries.values()) == ["1000"]


def test_without_folding_the_answers_are_the_same(monkeypatch):
    images = [np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)]
    path: Path = GOLDEN / "images"
    with Classifier.load(path, device="cpu", num_threads=1) as classifier:
        wanted = classifier.probabilities(images)
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with Classifier.load(path, device="cpu", num_threads=1) as classifier:
        np.testing.assert_allclose(classifier.probabilities(images), wanted, atol=1e-6)

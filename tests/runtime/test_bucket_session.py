"""Graphs over fixed buffers answer as plain runs do, and where they do not, plain runs answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfsl.bundle.onnx_graph import GraphFacts
from fastfsl.errors import ConfigError
from fastfsl.runtime import Classifier
from fastfsl.runtime import session as session_module
from fastfsl.runtime.bucket_session import MAX_KEPT, BucketSession
from fastfsl.runtime.session import Session, create_row_session
from tests.runtime.fake_onnxruntime import CPU, CUDA, CudaOnnxruntime


@pytest.fixture
def use(monkeypatch):
    monkeypatch.setenv("FASTFSL_ARENA_BYTES", "0")  # it has no arenas

    def install(**options) -> CudaOnnxruntime:
        module = CudaOnnxruntime(**options)
        monkeypatch.setattr(session_module, "load_onnxruntime", lambda: module)
        return module

    return install


@pytest.fixture(scope="module")
def model(make_flow, reference) -> bytes:
    graph: bytes = make_flow(reference.class_embeddings, reference.rotation).SerializeToString()
    return graph


def _rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 6)).astype(np.float32)


def _on_card(model: bytes, **options) -> BucketSession:
    session = create_row_session(model, "flow", device="cuda", **options)
    assert isinstance(session, BucketSession)
    return session


def _plain(model: bytes) -> Session:
    return session_module._create(session_module.load_onnxruntime(), model, "flow", GraphFacts(len(model)), [CPU], 1)


def _same(session, plain, rows, **others):
    feed = {"image_embeds": rows, **others}
    for found, expected in zip(session.run(None, feed), plain.run(None, feed), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_options_of_cuda(use, model):
    module = use()
    session = _on_card(model, gpu_mem_limit=2**30)
    assert session.graphs == "captured"
    assert session.get_providers() == [CUDA, CPU]
    assert module.settings == [
        {
            "device_id": "0",
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            "gpu_mem_limit": str(2**30),
            "enable_cuda_graph": "1",
        }
    ]


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_any_sequence_of_row_counts_answers_as_plain_runs_do(model, counts):
    module: Any = CudaOnnxruntime()
    plain = module.InferenceSession(model, None, [CPU], 0)
    inner = module.InferenceSession(model, None, [(CUDA, {"enable_cuda_graph": "1"}), CPU], 0)
    session = BucketSession(inner, module)
    for rows in counts:
        _same(session, plain, _rows(rows))
    buckets = {1 << (rows - 1).bit_length() for rows in counts}
    assert len(inner.captured) == inner.plain_runs == len(buckets)
    assert session.graphs == "captured"


def test_other_classes_have_graphs_of_their_own_and_no_more_are_kept_than_may_be(use, model, reference):
    module = use()
    session, plain = _on_card(model), _plain(model)
    for count in (*range(1, MAX_KEPT + 4), 1, 2):
        classes = np.repeat(reference.class_embeddings, count, axis=0)
        _same(session, plain, _rows(3), class_embeddings=classes)
        _same(session, plain, _rows(4), class_embeddings=classes[::-1])
    assert len(session._kept) == MAX_KEPT
    assert len(module.sessions[0].captured) == MAX_KEPT + 5  # the first two were captured again, by other names


def test_sixteen_threads_share_the_buffers(use, model):
    use()
    session, plain = _on_card(model), _plain(model)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda index: _same(session, plain, _rows(1 + index % 7)), range(200)))


def test_more_rows_than_the_largest_bucket_go_in_parts(use, model):
    use()
    _same(_on_card(model), _plain(model), _rows(8192 + 5))


def test_a_graph_with_parts_on_the_cpu_is_run_plainly(use, model, caplog):
    module = use(refuse_graphs=True)
    session = _on_card(model)
    assert "not all nodes are on CUDA" in session.graphs
    assert "no CUDA graphs: flow" in caplog.text
    assert "enable_cuda_graph" not in module.settings[-1]
    _same(session, _plain(model), _rows(3))


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_capture_or_replay_that_fails_costs_no_answer(use, model, caplog, when):
    module = use()
    session, plain = _on_card(model), _plain(model)
    if when == "later":
        _same(session, plain, _rows(3))
    module.sessions[0].fail = RuntimeError("cudaErrorStreamCaptureUnsupported\nmore")
    for _ in range(3):
        _same(session, plain, _rows(4))
    assert session.graphs == "none: cudaErrorStreamCaptureUnsupported"
    assert caplog.text.count("no CUDA graphs from now on") == 1


def test_a_graph_that_gives_something_else_never_answers(use, model, caplog):
    module = use()
    session, plain = _on_card(model), _plain(model)
    module.sessions[0].stale = True
    _same(session, plain, _rows(3))
    assert "something else than a plain run" in session.graphs


def test_a_classifier_on_the_card_answers_as_one_on_the_cpu_does(use, bundle_dir, classifier, photos):
    module = use()
    with Classifier.load(bundle_dir, device="cuda", max_batch=4, warm_up=True) as on_card:
        described = on_card.describe()
        assert described["providers"] == {"visual": [CUDA, CPU], "flow": [CUDA, CPU]}
        assert described["cuda_graphs"] == {"visual": "captured", "flow": "captured"}
        assert described["device_fallback"] is None
        captured = [len(session.captured) for session in module.sessions]
        assert captured == [3, 3]  # 1, 2 and 4 rows
        np.testing.assert_allclose(on_card.probabilities(photos), classifier.probabilities(photos), atol=1e-6)
        assert [len(session.captured) for session in module.sessions] == captured  # warm: nothing new


@pytest.mark.parametrize("limit", [0, -1, 1.5, "1 GB", True])
def test_the_limit_of_the_cards_memory_is_checked(bundle_dir, limit):
    with pytest.raises(ConfigError, match="gpu_mem_limit"):
        Classifier.load(bundle_dir, gpu_mem_limit=limit)
    with pytest.raises(ConfigError, match="gpu_mem_limit is for device"):
        Classifier.load(bundle_dir, device="cpu", gpu_mem_limit=2**30)

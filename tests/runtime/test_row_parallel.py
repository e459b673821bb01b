import threading

import numpy as np
import pytest

from fastfsl.runtime import Classifier
from fastfsl.runtime import session as session_module
from fastfsl.runtime.row_parallel import ROWS_PER_THREAD, RowParallelSession
from fastfsl.runtime.session import create_row_session


class Doubling:
    """A session that doubles its input and remembers how many rows it was given, and by which thread."""

    def __init__(self, fails=False):
        self.calls: list[tuple[int, str]] = []
        self.fails = fails

    def run(self, output_names, input_feed):
        rows = input_feed["x"]
        self.calls.append((len(rows), threading.current_thread().name))
        if self.fails:
            raise RuntimeError("no")
        return [2 * rows, rows.sum(axis=1)]

    def get_inputs(self):
        return []

    def get_overridable_initializers(self):
        return []

    def get_outputs(self):
        return []

    def get_providers(self):
        return ["CPUExecutionProvider"]


@pytest.mark.parametrize("count", [0, 1, 3 * ROWS_PER_THREAD - 1])
def test_few_rows_stay_together(count):
    shared, single = Doubling(), Doubling()
    rows = np.arange(2 * count).reshape(count, 2)
    doubled, _ = RowParallelSession(shared, single, 3).run(None, {"x": rows})
    np.testing.assert_array_equal(doubled, 2 * rows)
    assert [size for size, _ in shared.calls] == [count]
    assert single.calls == []


@pytest.mark.parametrize("count", [3 * ROWS_PER_THREAD, 100, 257])
def test_many_rows_are_shared_out_and_come_back_in_order(count):
    shared, single = Doubling(), Doubling()
    rows = np.arange(2 * count).reshape(count, 2)
    doubled, sums = RowParallelSession(shared, single, 3).run(None, {"x": rows})
    np.testing.assert_array_equal(doubled, 2 * rows)
    np.testing.assert_array_equal(sums, rows.sum(axis=1))
    sizes = [size for size, _ in single.calls]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert shared.calls == []


def test_a_scalar_goes_to_every_part_whole():
    class Scaling(Doubling):
        def run(self, output_names, input_feed):
            assert input_feed["by"].shape == ()
            return [input_feed["by"] * input_feed["x"]]

    rows = np.arange(200.0).reshape(100, 2)
    for count in (1, 100):
        feed = {"by": np.array(3.0), "x": rows[:count]}
        np.testing.assert_array_equal(RowParallelSession(Scaling(), Scaling(), 2).run(None, feed)[0], 3 * rows[:count])


def test_an_error_in_a_part_is_the_calls_error():
    with pytest.raises(RuntimeError, match="no"):
        RowParallelSession(Doubling(), Doubling(fails=True), 2).run(None, {"x": np.ones((64, 2))})


def test_a_classifier_gives_the_same_on_one_thread_and_on_three(bundle_dir):
    rows = np.random.default_rng(0).normal(size=(100, 6))
    one = Classifier.load(bundle_dir, device="cpu", num_threads=1)
    three = Classifier.load(bundle_dir, device="cpu", num_threads=3)
    np.testing.assert_allclose(three.feature_probabilities(rows), one.feature_probabilities(rows), atol=1e-6)
    np.testing.assert_allclose(three.transport(rows), one.transport(rows), atol=1e-6)


def test_one_thread_keeps_the_weights_once(bundle_dir):
    model = (bundle_dir / "flow" / "model.onnx").read_bytes()
    assert not isinstance(create_row_session(model, "flow", device="cpu", num_threads=1), RowParallelSession)
    assert isinstance(create_row_session(model, "flow", device="cpu", num_threads=2), RowParallelSession)


def test_small_products_of_few_rows_stay_on_one_thread_with_the_weights_once(bundle_dir, monkeypatch):
    model = (bundle_dir / "flow" / "model.onnx").read_bytes()
    create, threads = session_module._create, []

    def counted(*given):
        threads.append(given[-1])
        return create(*given)

    monkeypatch.setattr(session_module, "_create", counted)
    session = create_row_session(model, "flow", device="cpu", num_threads=3, small_products=True)
    assert threads == [1]
    rows = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    apart = [session.run(None, {"image_embeds": rows[at : at + 4]})[0] for at in range(0, 100, 4)]
    np.testing.assert_allclose(session.run(None, {"image_embeds": rows})[0], np.concatenate(apart), atol=1e-6)


def test_a_large_graph_keeps_the_weights_once(bundle_dir, monkeypatch):
    model = (bundle_dir / "flow" / "model.onnx").read_bytes()
    monkeypatch.setattr(session_module, "MAX_TWICE_BYTES", len(model) - 1)
    assert not isinstance(create_row_session(model, "flow", device="cpu", num_threads=2), RowParallelSession)

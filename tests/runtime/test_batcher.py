"""Every accepted request is answered exactly once: with its own answer, its own error, or a cancellation."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import time
import traceback
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from itertools import chain
from typing import Any

import numpy as np
import pytest

from fastfsl.errors import ClosedError, ConfigError, DataError, OverloadError
from fastfsl.runtime import Prediction
from fastfsl.runtime.batcher import Batcher
from fastfsl.runtime.metrics import Metric, Metrics

LONG = 10.0  # seconds that nothing here takes


class Model:
    """Images are numbers, and the answer is the number; computing waits until it may go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.begun = threading.Event()
        self.batches: list[list[int]] = []
        self.error: BaseException | None = None
        self.pool = ThreadPoolExecutor(4)

    def decode(self, image: Any) -> Future[Any]:
        return self.pool.submit(self._pixels, image)

    def _pixels(self, image):
        if image == -2:
            assert self.may_go_on.wait(LONG)
        if image < 0:
            raise DataError(f"image {image} is unreadable")
        return np.full((2, 2, 3), image, np.uint8)

    def answer(self, pixels, top_k) -> list[Prediction]:
        numbers = pixels[:, 0, 0, 0].tolist()
        self.batches.append(numbers)
        self.begun.set()
        assert self.may_go_on.wait(LONG)
        if self.error is not None:
            raise self.error
        return [Prediction(tuple(f"{n}.{k}" for k in range(top_k)), (0.5,) * top_k) for n in numbers]

    def hold(self) -> None:
        self.may_go_on.clear()
        self.begun.clear()


@pytest.fixture
def model():
    model = Model()
    yield model
    model.may_go_on.set()
    model.pool.shutdown()


@pytest.fixture
def make(model):
    def batcher(**options) -> Batcher:
        defaults = {"max_batch": 4, "max_delay_ms": 2, "max_queue": 64, "top_k": 1}
        return Batcher(model.decode, model.answer, **{**defaults, **options})

    return batcher


def _busy(model, submit) -> Future[Prediction]:
    """The worker computes this one, and goes on when the test says so."""
    model.hold()
    first = submit(99)
    assert model.begun.wait(LONG)
    return first


def test_sixteen_threads_get_the_classifiers_own_answers(classifier, photos):
    expected = classifier.predict(photos, top_k=2)
    with classifier.batcher(max_delay_ms=1, top_k=2) as submit, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda index: submit(photos[index % 9]).result(LONG), range(180)))
    for index, prediction in enumerate(found):
        assert prediction.labels == expected[index % 9].labels
        np.testing.assert_allclose(prediction.probabilities, expected[index % 9].probabilities, atol=1e-6)


def test_an_unreadable_image_gets_its_own_error_and_the_others_their_answers(classifier, photos):
    with classifier.batcher(max_delay_ms=20) as submit:
        futures = [submit(photos[0]), submit(b"no image"), submit("nowhere.jpg"), submit(photos[1])]
    assert [futures[0].result().labels, futures[3].result().labels] == [
        prediction.labels for prediction in classifier.predict(photos[:2])
    ]
    assert "8 bytes" in str(futures[1].exception())
    assert "nowhere.jpg" in str(futures[2].exception())


def test_batches_are_as_large_as_allowed(model, make):
    with make() as submit:
        first = _busy(model, submit)
        rest = [submit(number) for number in range(10)]
        while sum(future.done() for future in rest) + len(submit._ready) < 10:
            time.sleep(0.001)
        model.may_go_on.set()
        wait([first, *rest], LONG)
    assert [len(batch) for batch in model.batches] == [1, 4, 4, 2]
    assert sorted(chain(*model.batches[1:])) == list(range(10))
    assert [future.result().label for future in rest] == [f"{number}.0" for number in range(10)]


def test_a_batch_waits_for_others_no_longer_than_it_may(model, make):
    with make(max_delay_ms=150) as submit:
        start = time.perf_counter()
        pair = submit(1), submit(2)
        wait(pair, LONG)
        assert 0.14 <= time.perf_counter() - start < 5
        assert [sorted(batch) for batch in model.batches] == [[1, 2]]
        start = time.perf_counter()
        wait([submit(number) for number in range(4)], LONG)
        assert time.perf_counter() - start < 0.14  # a full batch waits for nobody


def test_a_full_queue_turns_away_at_once_and_says_so_once(model, make, caplog):
    with caplog.at_level(logging.WARNING, "fastfsl.runtime"), make(max_queue=3) as submit:
        first = _busy(model, submit)
        accepted = [submit(1), submit(2)]
        for _ in range(5):
            with pytest.raises(OverloadError, match=r"max_queue=3.*try again"):
                submit(3)
        assert accepted[0].cancel()
        accepted.append(submit(4))  # in the place of the one that was cancelled
        model.may_go_on.set()
        assert [future.result(LONG).label for future in (first, *accepted[1:])] == ["99.0", "2.0", "4.0"]
        assert submit.queue_depth == 0
    assert len([record for record in caplog.records if "turned away" in record.message]) == 1


def test_a_cancelled_request_leaves_its_batch_and_everybody_hears_of_it(model, make):
    with make() as submit:
        first = _busy(model, submit)
        rest = [submit(number) for number in range(4)]
        waiting: list[Any] = []
        waiter = threading.Thread(target=lambda: waiting.append(wait(rest[1:2], LONG)))
        waiter.start()
        while len(submit._ready) < 4:
            time.sleep(0.001)
        assert rest[1].cancel()
        assert len(submit._ready) == 3  # its pixels are let go of at once
        waiter.join(LONG)
        assert waiting[0].done == {rest[1]}
        assert not first.cancel()  # it has begun
        model.may_go_on.set()
        assert [rest[index].result(LONG).label for index in (0, 2, 3)] == ["0.0", "2.0", "3.0"]
    with pytest.raises(CancelledError):
        rest[1].result()
    assert 1 not in chain(*model.batches)


def test_a_failing_model_answers_with_its_error_and_the_next_batch_is_computed(model, make):
    with make(max_delay_ms=50) as submit:
        model.error = MemoryError("no room")
        pair = submit(1), submit(2)
        for future in pair:
            with pytest.raises(MemoryError, match="no room"):
                future.result(LONG)
        model.error = None
        assert submit(3).result(LONG).label == "3.0"


@pytest.mark.parametrize("kept", [True, False])
def test_a_failed_batch_leaves_its_pixels_to_nobody(model, make, monkeypatch, kept):
    """Not even for as long as its error is kept, nor until the garbage collector runs."""
    pixels, errors, read = [], [], model._pixels

    def decode(image):
        decoded = read(image)
        pixels.append(weakref.ref(decoded))
        return decoded

    def answer(batch, top_k):
        pixels.append(weakref.ref(batch))
        try:
            raise OSError(f"the batch of {len(batch)}")
        except OSError as error:
            raise DataError("no answer") from error

    monkeypatch.setattr(model, "answer", answer)
    monkeypatch.setattr(model, "_pixels", decode)
    gc.collect()
    gc.disable()
    try:
        with make() as submit:
            future = submit(3)
            error = future.exception(LONG)
            assert "in answer" in "".join(traceback.format_exception(error))
            errors.append(weakref.ref(error))
            if not kept:
                del error, future
        assert [ref() for ref in pixels] == [None, None]
        assert kept or errors[0]() is None
    finally:
        gc.enable()


def test_a_callback_that_fails_takes_no_answer_from_others(model, make, caplog):
    def leave(_):
        raise SystemExit

    with make(max_delay_ms=50) as submit:
        futures = [submit(1), submit(2)]
        futures[0].add_done_callback(leave)
        assert [future.result(LONG).label for future in futures] == ["1.0", "2.0"]
        assert submit(3).result(LONG).label == "3.0"
    assert "a callback of a request failed" in caplog.text


def test_each_request_may_ask_for_its_own_number_of_classes(make):
    with make(max_delay_ms=50, top_k=2) as submit:
        futures = [submit(1), submit(2, top_k=5), submit(3, top_k=1)]
        assert [len(future.result(LONG).labels) for future in futures] == [2, 5, 1]
        assert len(futures[0].result().probabilities) == 2


def test_leaving_answers_everything(model, make):
    with make() as submit:
        first = _busy(model, submit)
        rest = [submit(number) for number in (*range(9), -1)]
        threading.Timer(0.05, model.may_go_on.set).start()
    assert all(future.done() for future in (first, *rest))
    assert [future.result().label for future in rest[:9]] == [f"{number}.0" for number in range(9)]
    assert isinstance(rest[9].exception(), DataError)
    with pytest.raises(ClosedError, match="batcher is closed"):
        submit(1)
    submit.close()


def test_closing_may_cancel_what_has_not_begun(model, make):
    submit = make()
    first = _busy(model, submit)
    rest = [submit(number) for number in range(9)]
    threading.Timer(0.05, model.may_go_on.set).start()
    submit.close(cancel_pending=True)
    assert first.result().label == "99.0"
    assert all(future.cancelled() for future in rest)
    assert not wait(rest, 0).not_done


@pytest.mark.parametrize("number", [1, -2], ids=["computed", "unreadable"])
def test_closing_from_a_callback_and_from_many_threads_at_once_ends(model, make, number):
    submit = make(max_delay_ms=50)
    model.hold()
    other = submit(2)
    future = submit(number)
    future.add_done_callback(lambda _: submit.close())
    threads = [threading.Thread(target=submit.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    model.may_go_on.set()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert future.done()
    assert other.result(LONG).label == "2.0"


def test_a_callback_may_ask_again(make):
    answers: list[str] = []
    done = threading.Event()

    def again(future):
        answers.append(future.result().label)
        if len(answers) == 20:
            done.set()
        else:
            submit(len(answers)).add_done_callback(again)

    with make() as submit:
        submit(0).add_done_callback(again)
        assert done.wait(LONG)
    assert answers == [f"{number}.0" for number in range(20)]


def test_an_interpreter_that_ends_waits_for_the_answers_and_for_nothing_else(classifier, photos):
    code = (
        "from fastfsl.runtime import Classifier; "
        f"clf = Classifier.load({classifier.describe()['bundle']!r}, device='cpu', num_threads=1); "
        "submit = clf.batcher(max_delay_ms=50); "
        "ask = lambda: submit("
        f"{str(photos[0])!r}).add_done_callback(lambda f: print(type(f.result()).__name__, flush=True)); "
        "submit(b'no image').exception(); ask()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("Prediction\n", "")


@pytest.mark.parametrize(
    "options",
    [{"max_batch": 0}, {"max_batch": 5}, {"max_delay_ms": -1}, {"max_delay_ms": "2"}, {"max_queue": 0}, {"top_k": 0}],
)
def test_options_are_checked(classifier, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        classifier.batcher(**options)
    with classifier.batcher() as submit, pytest.raises(ConfigError, match="top_k"):
        submit(b"", top_k=0)


def test_a_bundle_without_encoder_has_no_batcher(feature_classifier):
    with pytest.raises(DataError, match="classify_features"):
        feature_classifier.batcher()


def test_what_happens_is_told_and_the_counts_balance(model, make):
    events: list[Metric] = []
    with make(max_queue=4, metrics=Metrics(events.append)) as submit:
        first = _busy(model, submit)
        rest = [submit(1), submit(2), submit(-1)]
        while not rest[2].done():
            time.sleep(0.001)
        rest.append(submit(3))
        with pytest.raises(OverloadError):
            submit(4)
        rest[0].cancel()
        model.may_go_on.set()
        wait([first, *rest], LONG)
    counted: dict[str, float] = {}
    for event in events:
        counted[event.name] = counted.get(event.name, 0) + (event.value if event.kind == "counter" else 1)
    assert {name: counted[name] for name in ("errors", "rejections", "cancellations")} == {
        "errors": 1,
        "rejections": 1,
        "cancellations": 1,
    }
    assert counted["queue_wait_seconds"] == 3
    assert [event.value for event in events if event.name == "queue_depth"][-1] == 0
    assert [event.labels for event in events if event.name == "errors"] == [{"kind": "DataError"}]

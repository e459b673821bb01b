"""A classifier as a service has it: many threads, warm, watched, awaited, and closed in the end."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from fastfsl.errors import BundleError, ClosedError, ConfigError, DataError, OverloadError
from fastfsl.runtime import Classifier, Metric
from fastfsl.runtime.prometheus import exporter


def _load(path, **options) -> Classifier:
    return Classifier.load(path, device="cpu", num_threads=1, max_batch=4, **options)


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastfsl")]


def _until_none_left(before: list[str]) -> bool:
    end = time.monotonic() + 5
    while len(_threads()) > len(before) and time.monotonic() < end:
        time.sleep(0.01)
    return len(_threads()) <= len(before)


def test_every_method_from_every_thread_gives_its_own_answer(bundle_dir, photos):
    features = np.random.default_rng(0).normal(size=(9, 6))
    with _load(bundle_dir) as classifier:
        asked = [
            lambda index: classifier.predict(photos[index])[0],
            lambda index: classifier.probabilities(photos[index]).tolist(),
            lambda index: classifier.embed(photos[index]).tolist(),
            lambda index: classifier.transport(features[index]).tolist(),
            lambda index: classifier.classify_features(features[index])[0],
        ]
        expected = [[method(index) for index in range(9)] for method in asked]
        draws = np.random.default_rng(1).integers(0, (len(asked), 9), (400, 2)).tolist()
        switching = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(16) as pool:
                found = list(pool.map(lambda draw: asked[draw[0]](draw[1]), draws))
        finally:
            sys.setswitchinterval(switching)
    assert found == [expected[method][index] for method, index in draws]


def test_a_closed_classifier_has_no_threads_and_says_that_it_is_closed(bundle_dir, photos):
    before = _threads()
    classifier = _load(bundle_dir)
    classifier.predict(photos)
    submit = classifier.batcher(max_delay_ms=200)
    future = submit(photos[0])
    assert len(_threads()) > len(before)
    classifier.close()
    classifier.close()
    assert future.result().label  # it was accepted, so it was answered
    assert _until_none_left(before)
    with pytest.raises(ClosedError, match="batcher is closed"):
        submit(photos[0])
    for method in (classifier.predict, classifier.embed, classifier.classify_features):
        with pytest.raises(ClosedError, match="classifier is closed; load it again"):
            method(photos)
    for ended in (classifier.describe, classifier.batcher, lambda: classifier.class_names):
        with pytest.raises(ClosedError):
            ended()


def test_closing_from_a_batchers_callback_ends(bundle_dir, photos):
    before = _threads()
    classifier = _load(bundle_dir)
    future = classifier.batcher()(photos[0])
    future.add_done_callback(lambda _: classifier.close())
    assert future.result(10).label
    del future
    assert _until_none_left(before)


def test_closing_from_a_callback_waits_for_nothing_that_needs_its_thread(bundle_dir, photos):
    classifier = _load(bundle_dir, image_threads=1)
    pool = classifier._engine.encoder.reader._pool
    go_on, predicted = threading.Event(), []
    pool.submit(go_on.wait, 10)
    bad, other = classifier.batcher()(b"no image"), classifier.batcher()(photos[0])
    bad.add_done_callback(lambda _: classifier.close())  # on the thread that all images are read on
    call = threading.Thread(target=lambda: predicted.extend(classifier.predict(photos[:2])), daemon=True)
    call.start()
    while pool._jobs.qsize() < 4:
        time.sleep(0.001)
    go_on.set()
    call.join(10)
    assert not call.is_alive()
    assert len(predicted) == 2
    with pytest.raises(ClosedError):
        other.result(10)


def test_what_was_not_read_when_the_classifier_closed_ends_in_its_error(bundle_dir, photos):
    classifier = _load(bundle_dir, image_threads=1)
    pool = classifier._engine.encoder.reader._pool
    waits = threading.Event(), threading.Event()
    submit = classifier.batcher()
    pool.submit(waits[0].wait, 10)
    first = submit(photos[0])
    first.add_done_callback(lambda _: classifier.close())
    pool.submit(waits[1].wait, 10)
    unread = submit(photos[1])
    waits[0].set()
    with pytest.raises(ClosedError, match="before this image was read"):
        unread.result(10)
    waits[1].set()
    assert first.result().label


def test_no_batcher_is_made_while_the_classifier_closes(bundle_dir, monkeypatch):
    classifier = _load(bundle_dir)
    first = classifier.batcher()
    refused = []

    def close(**_):
        with pytest.raises(ClosedError, match="classifier is closed"):
            classifier.batcher()
        refused.append(True)

    monkeypatch.setattr(first, "close", close)
    classifier.close()
    assert refused


def test_threads_may_ask_while_another_closes(bundle_dir, photos):
    classifier = _load(bundle_dir)
    expected = classifier.predict(photos)

    def ask(_) -> str:
        try:
            while True:
                assert classifier.predict(photos) == expected
        except ClosedError:
            return "closed"

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, index) for index in range(4)]
        time.sleep(0.05)
        classifier.close()
        assert [future.result(10) for future in asking] == ["closed"] * 4


def test_a_warm_classifier_has_computed_every_bucket(bundle_dir, write, tmp_path, monkeypatch, photos):
    rows: list[int] = []
    monkeypatch.setattr("fastfsl.runtime.head.Head.image_logits", lambda _, __, pixels: rows.append(len(pixels)))
    monkeypatch.setattr("fastfsl.runtime.head.Head.logits", lambda _, embeds: rows.append(len(embeds)))
    Classifier.load(bundle_dir, device="cpu", num_threads=1, max_batch=6, warm_up=True).close()
    assert rows == [1, 2, 4, 6]
    rows.clear()
    Classifier.load(bundle_dir, device="cpu", num_threads=1, max_batch=6).close()
    assert rows == []
    _load(write(tmp_path / "features", with_encoder=False), warm_up=True).close()
    assert rows == [1, 2, 4]


def test_what_cannot_be_warmed_up_fails_at_the_load(write, make_visual, tmp_path):
    broken = write(tmp_path / "broken", visual=make_visual(np.full((240, 6), np.nan, np.float32)).SerializeToString())
    with pytest.raises(BundleError, match="NaN"):
        _load(broken, warm_up=True)


def test_metrics_of_every_kind_of_call(bundle_dir, photos):
    events: list[Metric] = []
    with _load(bundle_dir, on_metrics=events.append, warm_up=True) as classifier:
        assert not events  # warming up is nobody's request
        classifier.predict([*photos, b"bad"], on_error="mark")
        classifier.embed(photos[:2])
        with pytest.raises(DataError):
            classifier.predict("nowhere.jpg")
        classifier.classify_features(np.ones(6))
        with classifier.batcher() as submit:
            submit(photos[0]).result()
    assert sum(event.value for event in events if event.name == "images") == 9 + 2 + 1
    assert [event.value for event in events if event.name == "batch_size"] == [4, 4, 1, 2, 1]
    assert [event.labels for event in events if event.name == "errors"] == [{"kind": "DataError"}] * 2
    stages = [event.labels["stage"] for event in events if event.name == "stage_seconds"]
    assert {stage: stages.count(stage) for stage in set(stages)} == {"decode": 12, "encode": 5, "flow": 5}
    assert all(event.value >= 0 for event in events)


def test_a_failing_callback_costs_no_answer_and_is_logged_once(bundle_dir, photos, caplog):
    with _load(bundle_dir, on_metrics=lambda metric: 1 / 0) as classifier:
        assert len(classifier.predict(photos)) == 9
        with classifier.batcher() as submit:
            assert submit(photos[0]).result().label
    assert caplog.text.count("on_metrics failed") == 1
    assert "ZeroDivisionError" in caplog.text


def test_two_classifiers_share_a_prometheus_registry(bundle_dir, photos):
    registry = CollectorRegistry()
    with (
        _load(bundle_dir, on_metrics=exporter("one", registry)) as one,
        _load(bundle_dir, on_metrics=exporter("two", registry)) as two,
    ):
        one.predict(photos)
        two.predict([b"bad"], on_error="mark")
        with two.batcher(max_queue=1, max_delay_ms=300) as submit:
            submit(photos[0])
            with pytest.raises(OverloadError):
                submit(photos[0])
    assert registry.get_sample_value("fastfsl_images_total", {"classifier": "one"}) == 9
    assert registry.get_sample_value("fastfsl_images_total", {"classifier": "two"}) == 1
    assert registry.get_sample_value("fastfsl_errors_total", {"classifier": "two", "kind": "DataError"}) == 1
    assert registry.get_sample_value("fastfsl_rejections_total", {"classifier": "two"}) == 1
    assert registry.get_sample_value("fastfsl_queue_depth", {"classifier": "two"}) == 0
    assert registry.get_sample_value("fastfsl_stage_seconds_count", {"classifier": "one", "stage": "decode"}) == 9
    text = generate_latest(registry).decode()
    assert "# HELP fastfsl_stage_seconds Of a stage" in text
    assert "# TYPE fastfsl_batch_size histogram" in text


def test_without_prometheus_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"fastfsl\[metrics\]"):
        exporter("one")


def test_an_event_loop_awaits_answers_and_is_not_blocked(classifier, photos):
    expected = [prediction.labels for prediction in classifier.predict(photos)]

    async def main() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        async with classifier.async_batcher(max_delay_ms=100) as predict:
            found = await asyncio.gather(*(predict(photo) for photo in photos))
            assert [prediction.labels for prediction in found] == expected
            assert len((await predict(photos[0], top_k=1)).labels) == 1
            with pytest.raises(DataError, match=r"nowhere\.jpg"):
                await predict("nowhere.jpg")
        with pytest.raises(ClosedError):
            await predict(photos[0])
        ticking.cancel()
        return ticks

    assert asyncio.run(main()) > 20


def test_a_cancelled_task_takes_its_request_back(classifier, photos):
    async def main() -> None:
        async with classifier.async_batcher(max_delay_ms=10_000, max_queue=1) as predict:
            task = asyncio.create_task(predict(photos[0]))
            await asyncio.sleep(0.05)
            with pytest.raises(OverloadError):
                await predict(photos[1])
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(100):
                if predict.queue_depth == 0:
                    break
                await asyncio.sleep(0.01)
            assert predict.queue_depth == 0

    start = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - start < 5

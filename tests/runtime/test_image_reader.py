"""Batches of prepared images: in order, read ahead of their use, and no more of them than two batches."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import wait

import numpy as np
import pytest

from fastfsl.errors import BundleError, DataError, ResourceError
from fastfsl.images import exact_pixels
from fastfsl.runtime.image_reader import ImageReader, _Batch

SECONDS = 20


@pytest.fixture
def reader(preprocessing):
    made = ImageReader(preprocessing, threads=2)
    yield made
    made.close()


def _watch(reader, *, block=()):
    """What has been prepared, and an event that lets the sources in ``block`` be."""
    prepared, release = [], threading.Event()
    prepare = reader._prepare

    def watched(source, preprocessing):
        if source in block:
            assert release.wait(SECONDS)
        prepared.append(source)
        return prepare(source, preprocessing)

    reader._prepare = watched
    return prepared, release


@pytest.mark.parametrize("size", [1, 2, 4, 9, 100])
def test_batches_hold_the_images_in_order(reader, photos, preprocessing, size):
    batches = list(reader.batches(photos, size))
    assert [len(errors) for _, errors in batches] == [min(size, 9 - start) for start in range(0, 9, size)]
    assert all(errors == [None] * len(errors) for _, errors in batches)
    expected = np.stack([exact_pixels(path, preprocessing) for path in photos])
    np.testing.assert_array_equal(np.concatenate([pixels for pixels, _ in batches]), expected)


def test_the_next_batch_is_read_while_one_is_in_use(reader, photos):
    prepared, _ = _watch(reader)
    batches = reader.batches(iter(photos), 3)
    next(batches)
    wait(reader._pool.submit(bool) for _ in range(9))  # behind everything that was begun
    assert set(prepared) == set(photos[:6])


def test_the_iterator_of_images_is_read_no_further_than_the_next_batch(reader, photos):
    asked: list[int] = []

    def endless():
        while True:
            asked.append(len(asked))
            yield photos[len(asked) % 9]

    batches = reader.batches(endless(), 4)
    for number in range(1, 6):
        next(batches)
        assert len(asked) == 4 * (number + 1)
    batches.close()


def test_a_bad_image_leaves_a_row_to_nobody(reader, photos, preprocessing, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8")
    ((pixels, errors),) = reader.batches([photos[0], bad, photos[1], None], 9)
    assert [type(error) for error in errors] == [type(None), DataError, type(None), DataError]
    np.testing.assert_array_equal(pixels, [exact_pixels(path, preprocessing) for path in photos[:2]])
    ((pixels, errors),) = reader.batches([bad, bad], 9)
    assert pixels.shape == (0, *preprocessing.image_size, 3)


def test_an_error_does_not_keep_the_pixels_of_its_batch(reader, photos, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8")
    gc.disable()
    try:
        batch = reader._start([bad, photos[0]], here=True)
        pixels = weakref.ref(batch._pixels)
        errors = batch.result()[1]
        del batch
        assert isinstance(errors[0], DataError)
        assert pixels() is None
    finally:
        gc.enable()


def test_a_call_that_raises_leaves_its_pixels_to_nobody(classifier, photos, monkeypatch):
    """Whether an image of it is bad, or the graph fails: not until the garbage collector runs."""
    pixels, result = [], _Batch.result

    def recorded(batch):
        found = result(batch)
        pixels.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(_Batch, "result", recorded)
    gc.collect()
    gc.disable()
    try:
        for images in ([photos[0], b"bad", photos[1]], [b"bad"]):
            for ask in (classifier.predict, classifier.embed, classifier.probabilities):
                with pytest.raises(DataError, match="not an image"):
                    ask(images)
        monkeypatch.setattr(type(classifier._engine.encoder), "embed", _failing)
        with pytest.raises(BundleError, match="no embedding"):
            classifier.predict(photos[:3])
        assert len(pixels) == 7
        assert [ref() for ref in pixels if ref() is not None] == []
    finally:
        gc.enable()


def _failing(encoder, pixels):
    raise BundleError("no embedding")


def test_what_the_iterator_raises_comes_after_the_batches_before_it(reader, photos):
    def broken():
        yield from photos[:5]
        raise LookupError("the list ends here")

    seen: list[list[object]] = []
    with pytest.raises(LookupError, match="the list ends here"):
        seen.extend(errors for _, errors in reader.batches(broken(), 2))
    assert [len(errors) for errors in seen] == [2, 2]


def test_an_error_that_is_no_verdict_on_an_image_is_raised(reader, photos):
    def out_of_memory(source, preprocessing):
        raise MemoryError

    reader._prepare = out_of_memory
    with pytest.raises(ResourceError, match=r"0\.png: out of memory"):
        list(reader.batches(photos, 4))


def test_no_thread_to_be_had_is_no_verdict_on_an_image(reader, photos, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ResourceError, match="can't start new thread; lower the number of threads"):
        list(reader.batches(photos, 4))


def test_what_nobody_asks_for_any_more_is_not_read(reader, photos):
    prepared, release = _watch(reader, block=photos[1:5])
    batches = reader.batches([photos[0]] * 4 + photos[1:], 4)
    next(batches)
    batches.close()  # two threads have begun with the second batch, at most
    release.set()
    reader.close()
    assert prepared[:4] == [photos[0]] * 4
    assert not set(prepared) & set(photos[3:])


def test_a_single_image_is_read_on_its_caller_s_thread(reader, photos):
    threads = []
    prepare = reader._prepare

    def watched(source, preprocessing):
        threads.append(threading.current_thread())
        return prepare(source, preprocessing)

    reader._prepare = watched
    list(reader.batches(photos[:1], 32))
    list(reader.batches(photos[:2], 32))
    assert threads[0] is threading.current_thread()
    assert threading.current_thread() not in threads[1:]


def test_submit_gives_pixels_or_the_error(reader, photos, preprocessing):
    np.testing.assert_array_equal(reader.submit(photos[0]).result(), exact_pixels(photos[0], preprocessing))
    assert isinstance(reader.submit("missing.jpg").exception(), DataError)


def test_closing_ends_the_threads(preprocessing, photos):
    reader = ImageReader(preprocessing, threads=2)
    list(reader.batches(photos, 4))
    assert any(thread.name.startswith("fastfsl-images") for thread in reader._pool._threads)
    reader.close()
    assert not any(thread.is_alive() for thread in reader._pool._threads)

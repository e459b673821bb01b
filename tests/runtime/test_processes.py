"""One classifier in many processes: forked, spawned, pickled, and ended by a signal."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from fastfsl.errors import ClosedError, ConfigError, DeviceError
from fastfsl.runtime import Classifier, Metric
from fastfsl.runtime import recipe as recipe_module
from fastfsl.runtime.prometheus import exporter
from tests.runtime.text_bundle import with_text

SCRIPT = Path(__file__).with_name("processes.py")
# For what takes a second or two; who runs into it has hung.
LIMIT = 60
UNIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def _run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPT), name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@UNIX
def test_a_child_forked_after_a_warm_up_answers_as_its_parent(bundle_dir):
    _run("fork_after_warm_up", bundle_dir)


@UNIX
def test_a_child_that_goes_on_within_a_call_of_its_parent_hears_so(bundle_dir):
    _run("fork_within_calls", bundle_dir)


@UNIX
def test_children_of_a_busy_parent_answer(bundle_dir):
    _run("fork_of_a_busy_parent", bundle_dir, 12)


@UNIX
def test_locks_that_other_threads_held_are_new_in_a_child(bundle_dir):
    _run("fork_while_locks_are_held", bundle_dir)


@UNIX
def test_a_fork_waits_until_no_library_holds_its_locks(bundle_dir):
    _run("fork_waits_for_a_calm_moment", bundle_dir)


@UNIX
@pytest.mark.parametrize("telemetry", ["0", "1"])
def test_a_child_ends_with_its_own_status(bundle_dir, monkeypatch, telemetry):
    """Where the environment asks for onnxruntime's telemetry, or it was imported before, its thread is missing."""
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", telemetry)
    assert _run("end_of_a_child", bundle_dir, telemetry) == "the end\n" * 2
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    assert telemetry == "0" or _run("end_of_a_child", bundle_dir, "1") == "the end\n" * 2


@UNIX
def test_a_batcher_of_the_parent_says_in_the_child_that_it_is_one(bundle_dir):
    _run("inherited_batcher", bundle_dir)


@UNIX
def test_a_bundle_that_changed_before_a_child_loads_it_again_is_an_error(bundle_dir, tmp_path):
    _run("fork_and_changed_bundle", bundle_dir, tmp_path)


@UNIX
def test_added_classes_go_with_forks_and_pickles(write, reference, tmp_path):
    _run("fork_with_added_classes", with_text(write, 6, reference.class_embeddings)(tmp_path / "bundle"))


@pytest.mark.parametrize("method", [pytest.param("fork", marks=UNIX), "spawn"])
def test_worker_processes_of_multiprocessing_classify(bundle_dir, method):
    _run("multiprocessing_workers", bundle_dir, method)


@UNIX
def test_two_workers_of_a_data_loader_classify(bundle_dir):
    _run("data_loader", bundle_dir)


@UNIX
def test_two_processes_of_datasets_map_classify(bundle_dir, tmp_path):
    pytest.importorskip("datasets")
    _run("datasets_map", bundle_dir, tmp_path)


@UNIX
def test_workers_of_gunicorn_classify_with_what_was_loaded_before_they_forked(bundle_dir, classifier):
    pytest.importorskip("gunicorn")
    options = ["--preload", "--workers", "2", "--bind", "127.0.0.1:0", "--chdir", str(SCRIPT.parent)]
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        *options,
        "--no-control-socket",
        f"processes:wsgi({str(bundle_dir)!r})",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as server:
        try:
            assert server.stderr is not None
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://127[.\d:]+", line)))
            threading.Thread(target=server.stderr.read, daemon=True).start()
            with ThreadPoolExecutor(4) as pool:
                answers = [json.load(page) for page in pool.map(lambda _: urlopen(address, timeout=LIMIT), range(12))]
            pixels = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3), dtype=np.uint8)
            expected = [answer.label for answer in classifier.predict(pixels)]
            assert all(answer["labels"] == expected for answer in answers)
            assert server.pid not in {answer["pid"] for answer in answers}
            started = time.monotonic()
            server.terminate()
            assert server.wait(LIMIT) == 0
            assert time.monotonic() - started < 10  # after 30 seconds gunicorn would kill workers that hang
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def test_a_pickle_round_trip_keeps_answers_bit_for_bit(bundle_dir, tmp_path):
    pytest.importorskip("cloudpickle")
    _run("pickled", bundle_dir, tmp_path)


def test_every_option_of_load_is_pickled(bundle_dir):
    import inspect

    classifier = Classifier.load(bundle_dir, device="cpu", num_threads=1)
    parameters = set(inspect.signature(Classifier.load).parameters)
    assert parameters == {*classifier._recipe.options, "path", "expected_digest", "on_metrics"}


def test_the_weight_of_a_blend_is_pickled(write, tmp_path, make_blend, photos):
    rng = np.random.default_rng(3)
    towers = [rng.normal(size=(8 * 10 * 3, 6)).astype(np.float32) for _ in range(2)]
    path = write(
        tmp_path / "blend",
        visual=make_blend(*towers).SerializeToString(),
        blend={"alpha": 0.3, "normalized": False},
    )
    for alpha in (None, 0.75):
        classifier = Classifier.load(path, device="cpu", num_threads=1, alpha=alpha)
        again = pickle.loads(pickle.dumps(classifier))
        assert again.describe()["blend"] == classifier.describe()["blend"]
        assert again.embed(photos).tobytes() == classifier.embed(photos).tobytes()


_events: list[Metric] = []


class Unpicklable:
    def __call__(self, metric):
        _events.append(metric)

    def __reduce__(self):
        raise TypeError("no")


def test_a_callback_that_cannot_be_pickled_is_left_behind_with_a_word(bundle_dir, photos, caplog):
    for callback in (Unpicklable(), lambda _: None, exporter("birds", CollectorRegistry())):
        caplog.clear()
        classifier = Classifier.load(bundle_dir, device="cpu", num_threads=1, on_metrics=callback)
        again = pickle.loads(pickle.dumps(classifier))
        assert "without on_metrics" in caplog.text
        caplog.clear()
        copy.copy(classifier)
        assert not caplog.text  # in this process nothing is lost
        assert again.predict(photos[0]) == classifier.predict(photos[0])
    caplog.clear()
    for callback in (_events.append, exporter("birds")):
        classifier = Classifier.load(bundle_dir, device="cpu", num_threads=1, on_metrics=callback)
        pickle.loads(pickle.dumps(classifier)).predict(photos[0])
    assert not caplog.text
    assert recipe_module.can_be_pickled(exporter("birds"))


def test_cuda_is_refused_at_once_in_a_forked_child(bundle_dir, photos):
    classifier = Classifier.load(bundle_dir, device="cpu", num_threads=1)
    classifier._on_card = True  # as where a session is on a card
    classifier.after_fork()
    for call in (
        lambda: classifier.predict(photos),
        lambda: classifier.stream(photos),
        lambda: classifier.embed(photos),
        classifier.describe,
        classifier.batcher,
        lambda: classifier.add_class("emu"),
        lambda: classifier.classify_features([[1.0] * 6]),
    ):
        with pytest.raises(DeviceError, match="load the classifier in each worker process"):
            call()
    classifier.close()
    with pytest.raises(ClosedError):
        classifier.predict(photos)


@pytest.mark.parametrize(
    ("way", "waiting"),
    [
        ("context", 20_000),
        ("while it closes", 5000),
        ("no context", 5000),
        ("caught and left", 20_000),
        ("SystemExit", 5000),
        ("classifier", 5000),
        ("event loop", 3000),
        ("event loop that closes", 3000),
        ("event loop without context", 3000),
    ],
)
@UNIX
def test_requests_that_wait_do_not_hold_up_the_end(bundle_dir, way, waiting):
    command = [sys.executable, str(SCRIPT), "interrupted", str(bundle_dir), way, str(waiting)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            started = time.monotonic()
            process.send_signal(signal.SIGTERM if way == "SystemExit" else signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT)
            seconds = time.monotonic() - started
        finally:
            process.kill()
    # Python forgets that Ctrl-C ended the program where another thread imports a module meanwhile: it leaves with 1.
    expected = {"SystemExit": {4}, "caught and left": {3}, "while it closes": {3}}.get(way, {-signal.SIGINT, 1})
    assert process.returncode in expected, out + err
    count: dict[str, Any] = json.loads(out)  # printed once the last of them was over
    assert sum(count.values()) == waiting
    assert count.get("failed", 0) == 0
    assert count.get("over") or count["cancelled"] > 1000
    # Two seconds on a quiet machine; computing all of them would take twenty.
    assert seconds < 6


def test_the_interpreter_lives_for_as_long_as_other_threads_serve(bundle_dir):
    assert _run("main_thread_ends_first", bundle_dir) == "served\n"


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_numpy_integers_are_whole_numbers(bundle_dir, photos, kind):
    counts = {name: kind(2) for name in ("max_batch", "num_threads", "image_threads")}
    classifier = Classifier.load(bundle_dir, device="cpu", **counts)
    json.dumps(classifier.describe())
    assert classifier.predict(photos, top_k=kind(3)) == classifier.predict(photos, top_k=3)
    assert len(classifier.classify_features(np.eye(6), top_k=kind(3))[0].labels) == 3
    with classifier.batcher(max_batch=kind(2), max_queue=kind(9), top_k=kind(2), max_delay_ms=kind(1)) as submit:
        assert len(submit(photos[0]).result(LIMIT).labels) == 2
        assert len(submit(photos[0], top_k=kind(3)).result(LIMIT).labels) == 3
    pickle.loads(pickle.dumps(classifier)).close()


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2), "2", 0, np.int64(0), np.int64(-1), None, [2]])
def test_what_is_no_whole_number_is_refused(bundle_dir, classifier, photos, value):
    for name in ("max_batch", "num_threads", "image_threads", "gpu_mem_limit"):
        if value is not None or name == "max_batch":
            with pytest.raises(ConfigError, match=name):
                Classifier.load(bundle_dir, **{name: value})
    with pytest.raises(ConfigError, match="top_k"):
        classifier.predict(photos, top_k=value)
    with pytest.raises(ConfigError, match="max_queue"):
        classifier.batcher(max_queue=value)

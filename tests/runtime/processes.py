"""What tests run in processes of their own: `python processes.py NAME ARGUMENTS...`.

In a process of pytest's a fork would copy pytest, and a hang would be its own. Every child that is forked here has an
alarm, so a hang is a child that died of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastfsl.errors import BundleError, ClosedError, ConfigError
from fastfsl.images import opening
from fastfsl.runtime import Classifier
from fastfsl.runtime.forking import undisturbed
from fastfsl.runtime.session import create_session
from fastfsl.runtime.worker_pool import WorkerPool

SECONDS = 10  # for what takes a tenth of one
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3), dtype=np.uint8)

Check = Callable[[], Any]


def load(bundle: str | Path, **options: Any) -> Classifier:
    return Classifier.load(bundle, device="cpu", **{"num_threads": 4, "image_threads": 2, **options})


def in_child(check: Check, *, leave: Callable[[int], Any] = os._exit) -> None:
    """Run a check in a forked child, which leaves by `os._exit` or `sys.exit`, and fail where it fails or hangs."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if status:
            how = "hung" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else f"gave {status}"
            raise SystemExit(f"the child {how}: {check}")
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    try:
        check()
    except BaseException:  # noqa: BLE001 - whatever it is, the child is not to go on as its parent
        traceback.print_exc()
        os._exit(1)
    leave(0)


def raises(kind: type[BaseException], call: Check) -> str:
    try:
        found = call()
    except kind as error:
        return str(error)
    raise AssertionError(f"expected {kind}, got {found}")


def same(first: Any, second: Any) -> None:
    if isinstance(first, np.ndarray):
        assert first.tobytes() == second.tobytes()
    else:
        assert first == second, (first, second)


def _same_as(call: Check, expected: Any) -> None:
    same(call(), expected)


_leaves: tuple[Callable[[int], Any], ...] = (os._exit, sys.exit)


def calls(classifier: Classifier) -> dict[str, Check]:
    """Every call that answers, by its name."""
    features = np.random.default_rng(1).normal(size=(40, classifier.describe()["embed_dim"])).astype(np.float32)

    def by_batcher() -> list[tuple[str, ...]]:
        with classifier.batcher(top_k=2) as submit:
            return [future.result().labels for future in [submit(image) for image in PIXELS]]

    async def ask() -> list[tuple[str, ...]]:
        async with classifier.async_batcher(top_k=2) as predict:
            return [answer.labels for answer in await asyncio.gather(*map(predict, PIXELS))]

    return {
        "predict": lambda: classifier.predict(PIXELS),
        "predict one": lambda: classifier.predict(PIXELS[0]),
        "stream": lambda: list(classifier.stream(iter(PIXELS))),
        "embed": lambda: classifier.embed(PIXELS),
        "probabilities": lambda: classifier.probabilities(PIXELS),
        "transport": lambda: classifier.transport(features),
        "classify_features": lambda: classifier.classify_features(features),
        "feature_probabilities": lambda: classifier.feature_probabilities(features),
        "batcher": by_batcher,
        "async_batcher": lambda: asyncio.run(ask()),
        "describe": classifier.describe,
        "class_names": lambda: classifier.class_names,
    }


def fork_after_warm_up(bundle: str) -> None:
    classifier = load(bundle, warm_up=True)
    submit = classifier.batcher()
    expected = {name: call() for name, call in calls(classifier).items()}
    for name, call in calls(classifier).items():
        in_child(partial(_same_as, call, expected[name]))
    predict, want, inherited = calls(classifier)["predict"], expected["predict"], id(classifier._loaded)

    def from_threads() -> None:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: (predict(), id(classifier._loaded)), range(16)))
        for answer, _ in found:
            same(answer, want)
        assert len({loaded for _, loaded in found} | {inherited}) == 2  # loaded again, once

    def grandchild() -> None:
        in_child(lambda: same(predict(), want))
        same(predict(), want)
        in_child(lambda: same(predict(), want))

    def closed() -> None:
        classifier.close()
        raises(ClosedError, predict)

    for leave in _leaves:
        for check in (from_threads, closed, classifier.close, lambda: classifier.__exit__(None, None, None)):
            in_child(check, leave=leave)
    in_child(grandchild)
    in_child(lambda: same(pickle.loads(pickle.dumps(classifier)).predict(PIXELS), want))
    in_child(lambda: None, leave=sys.exit)
    same(predict(), want)  # the parent goes on, and its batcher
    assert submit(PIXELS[0]).result(SECONDS).labels == want[0].labels


def fork_within_calls(bundle: str) -> None:
    """A child that goes on in the middle of a call, or of a stream, of the parent's."""
    classifier = load(bundle, max_batch=4)
    stream = classifier.stream(iter(PIXELS))
    next(stream)
    in_child(lambda: raises(ClosedError, lambda: list(stream)))
    in_child(lambda: (raises(ClosedError, lambda: list(stream)), classifier.predict(PIXELS)), leave=sys.exit)
    inside: list[str] = []

    def images():
        for index, image in enumerate(PIXELS):
            if index == 13:
                in_child(lambda: None)
                if not (child := os.fork()):
                    inside.append("child")
                    signal.alarm(SECONDS)
                else:
                    assert os.waitpid(child, 0)[1] == 0
            yield image

    try:
        answers = classifier.predict(images())
    except ClosedError:
        assert inside
        same(len(classifier.predict(PIXELS)), 24)
        classifier.close()
        sys.exit(0)
    assert not inside
    same(answers, classifier.predict(PIXELS))
    assert len(list(stream)) == 23


def fork_of_a_busy_parent(bundle: str, count: str) -> None:
    classifier = load(bundle, max_batch=16)
    expected = calls(classifier)["predict"]()
    stop = threading.Event()

    def predict() -> None:
        while not stop.is_set():
            classifier.predict(PIXELS)

    def submit() -> None:
        with classifier.batcher() as ask:
            while not stop.is_set():
                wait([ask(image) for image in PIXELS])

    def make() -> None:
        while not stop.is_set():
            load(bundle, num_threads=1).classify_features(np.eye(6))
            time.sleep(0.002)

    threads = [threading.Thread(target=work) for work in (predict, predict, submit, make)]
    for thread in threads:
        thread.start()
    try:
        for number in range(int(count)):
            time.sleep(random.random() / 100)
            in_child(lambda: same(classifier.predict(PIXELS), expected), leave=_leaves[number % 4 == 3])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    same(classifier.predict(PIXELS), expected)


def fork_while_locks_are_held(bundle: str) -> None:
    classifier = load(bundle, warm_up=True)
    photo = Path(bundle).with_suffix(".png")
    Image.fromarray(PIXELS[0]).save(photo)
    submit = classifier.batcher()
    pool = WorkerPool(2, "test")
    assert pool.submit(int, "7").result() == 7
    reader = classifier._engine.encoder.reader._pool
    locks: list[Any] = [classifier._adding, classifier._loading, classifier._gate._changed, classifier._gate._releasing]
    locks += [submit._lock, reader._lock, pool._lock, opening._decoding_in_place]
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            over.wait()

    def check() -> None:
        image = Image.open(photo)  # decoded in place
        assert len(classifier.predict([image, *PIXELS])) == 25
        assert pool.submit(int, "8").result() == 8
        with classifier.batcher() as other:
            other(image).result()
        raises(ClosedError, lambda: submit(image))
        submit.close()
        classifier.close()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    held.wait()
    for leave in _leaves:
        in_child(check, leave=leave)
    over.set()
    thread.join()
    assert submit(PIXELS[0]).result(SECONDS).label


def fork_waits_for_a_calm_moment(bundle: str) -> None:
    del bundle
    inside = threading.Event()

    def compute(seconds: float) -> None:
        with undisturbed, undisturbed:
            inside.set()
            time.sleep(seconds)

    with undisturbed:
        in_child(lambda: compute(0))  # a callback that forks does not wait for itself
    for seconds, least, most in ((0.4, 0.2, 1.5), (8.0, 1.5, 5.0)):  # for so long, but not for ever
        inside.clear()
        thread = threading.Thread(target=compute, args=(seconds,), daemon=True)
        thread.start()
        inside.wait()
        started = time.monotonic()
        in_child(lambda: compute(0))
        assert least < time.monotonic() - started < most
        compute(0)
    os._exit(0)  # the end of the interpreter would wait as well


def end_of_a_child(bundle: str, telemetry: str) -> None:
    """Its status is its own, whatever onnxruntime does at the end."""
    classifier = load(bundle, warm_up=True)
    apart = create_session((Path(bundle) / "flow" / "model.onnx").read_bytes(), "another", device="cpu", num_threads=4)
    assert os.environ["ORT_DISABLE_TELEMETRY"] == telemetry
    for use in (False, True):
        sys.stdout.flush()
        if not (child := os.fork()):
            signal.alarm(SECONDS)
            del apart
            if use:
                classifier.predict(PIXELS)
            print("the end")
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def inherited_batcher(bundle: str) -> None:
    classifier = load(bundle, max_batch=4)
    submit = classifier.batcher(max_delay_ms=60_000, max_batch=4)
    pending = [submit(image) for image in PIXELS[:2]]  # wait for others to come
    heard: list[object] = []
    pending[0].add_done_callback(heard.append)

    def check() -> None:
        assert "make one in this process" in raises(ClosedError, lambda: submit(PIXELS[0]))
        assert "another process" in raises(ClosedError, pending[0].result)
        assert isinstance(pending[1].exception(), ClosedError)
        assert not wait(pending).not_done
        assert not pending[0].cancel()
        assert not heard
        submit.close()
        submit.__exit__(None, None, None)
        submit.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        with classifier.batcher() as other:
            assert len(other(PIXELS[0]).result().labels) == 4

    async def asked() -> None:
        predict = classifier.async_batcher()
        in_child(lambda: raises(ClosedError, lambda: predict._batcher.submit(PIXELS[0])))
        await predict.close()

    for leave in (os._exit, sys.exit):
        in_child(check, leave=leave)
        in_child(lambda: None, leave=leave)
    asyncio.run(asked())
    rest = [submit(image) for image in PIXELS[2:4]]
    assert [len(future.result(SECONDS).labels) for future in pending + rest] == [4] * 4
    assert heard


def fork_and_changed_bundle(bundle: str, scratch: str) -> None:
    path = Path(scratch) / "bundle"
    shutil.copytree(bundle, path)
    os.chdir(scratch)
    classifier = load("bundle", max_batch=4)
    expected = classifier.predict(PIXELS)
    features = np.eye(6, dtype=np.float32)
    classifier.classify_features(features)

    def check() -> None:
        os.chdir("/")
        same(classifier.predict(PIXELS), expected)

    in_child(check)
    graph = path / "visual" / "model.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for call in (lambda: classifier.predict(PIXELS), lambda: classifier.classify_features(features)):
        in_child(partial(raises, BundleError, call))
    manifest = path / "manifest.json"
    text = manifest.read_text()
    graph.write_bytes(data)
    manifest.write_text(text.replace('"method": "fma"', '"method": "mps"'))
    assert manifest.read_text() != text
    in_child(lambda: raises(BundleError, classifier.describe))
    manifest.write_text(text)
    path.rename(Path(scratch) / "elsewhere")

    def comes_back() -> None:
        assert "altered or removed" in raises(BundleError, lambda: classifier.predict(PIXELS))
        (Path(scratch) / "elsewhere").rename(path)
        same(classifier.predict(PIXELS), expected)

    in_child(comes_back)


def fork_with_added_classes(bundle: str) -> None:
    classifier = load(bundle)
    classifier.add_class("red kite")
    classifier.add_class("emu", ["photo photo", "a red photo"])
    features = np.random.default_rng(1).normal(size=(40, classifier.describe()["embed_dim"]))
    expected = classifier.feature_probabilities(features)

    def check() -> None:
        same(classifier.feature_probabilities(features), expected)
        assert classifier.class_names[-2:] == ("red kite", "emu")
        classifier.add_class("kite")
        assert classifier.class_names[-3:] == ("red kite", "emu", "kite")
        in_child(lambda: same(classifier.class_names[-1], "kite"))

    in_child(check)
    in_child(lambda: classifier.add_class("kite"))
    again = pickle.loads(pickle.dumps(classifier))
    same(again.feature_probabilities(features), expected)
    assert again.class_names == classifier.class_names
    assert again.describe()["added_classes"] == ["red kite", "emu"]


_served: Classifier | None = None


def _begin(classifier: Classifier | None) -> None:
    global _served  # noqa: PLW0603 - as workers have it
    _served = classifier or _served


def _answer(images: np.ndarray[Any, Any]) -> Any:
    assert _served is not None
    return _served.predict(images)


def multiprocessing_workers(bundle: str, method: str) -> None:
    context: Any = get_context(method)
    classifier = load(bundle, warm_up=True)
    expected = classifier.predict(PIXELS)
    halves = [PIXELS[:12], PIXELS[12:]]
    _begin(classifier)
    given = (None,) if method == "fork" else (classifier,)  # inherited, or sent
    with context.Pool(2, _begin, given) as pool:
        same([answer for part in pool.map_async(_answer, halves).get(30) for answer in part], expected)
    with ProcessPoolExecutor(2, context, _begin, given) as executor:
        same([answer for part in executor.map(_answer, halves, timeout=30) for answer in part], expected)
        same(executor.submit(classifier.predict, PIXELS).result(30), expected)  # sent with the job, in either case


class _Photos:
    """A data set whose worker processes classify."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[str]:
        return [answer.label for answer in self.classifier.predict(PIXELS[6 * index : 6 * index + 6])]


def data_loader(bundle: str) -> None:
    from torch.utils.data import DataLoader

    classifier = load(bundle, warm_up=True)
    expected = [answer.label for answer in classifier.predict(PIXELS)]
    loader: Any = DataLoader(
        _Photos(classifier),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=30,
    )
    same([label for labels in loader for label in labels], expected)


def datasets_map(bundle: str, scratch: str) -> None:
    os.environ |= {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    classifier = load(bundle, warm_up=True)
    expected = [answer.label for answer in classifier.predict(PIXELS)]
    rows = Dataset.from_dict({"index": list(range(24))})

    def label(batch: dict[str, list[int]]) -> dict[str, list[str | None]]:
        return {"label": [answer.label for answer in classifier.predict(PIXELS[batch["index"]])]}

    found = rows.map(label, batched=True, batch_size=6, num_proc=2)
    same(list(found["label"]), expected)


def pickled(bundle: str, scratch: str) -> None:
    import cloudpickle

    os.chdir(Path(bundle).parent)
    classifier = load(Path(bundle).name, max_batch=8, preprocess="fast", flow="onnx")
    expected = {name: call() for name, call in calls(classifier).items()}
    del expected["describe"]["bundle"]
    data = [pickle.dumps(classifier, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    data.append(cloudpickle.dumps(classifier))
    copies = [copy.copy(classifier), copy.deepcopy([classifier])[0]]
    os.chdir("/")
    assert all(len(one) < 2000 for one in data)
    for again in copies + [pickle.loads(one) for one in data]:
        assert type(again) is Classifier
        for name, call in calls(again).items():
            answer = call()
            if name == "describe":
                assert answer.pop("bundle") == bundle
            same(answer, expected[name])
    with load(bundle) as closed:
        pass
    for way in (pickle.dumps, copy.copy, copy.deepcopy, cloudpickle.dumps):
        raises(ClosedError, partial(way, closed))
    answer = classifier.predict([PIXELS[0], b"no image"], on_error="mark")
    same(pickle.loads(pickle.dumps(answer)), answer)
    with classifier.batcher() as submit:
        for way in (pickle.dumps, copy.copy, copy.deepcopy, cloudpickle.dumps):
            assert "Classifier" in raises(ConfigError, partial(way, submit))
            assert "Classifier" in raises(ConfigError, partial(way, classifier.async_batcher()))
    shutil.copytree(bundle, Path(scratch) / "moved")
    gone = pickle.dumps(load(Path(scratch) / "moved"))
    shutil.rmtree(Path(scratch) / "moved")
    assert "altered or removed" in raises(BundleError, lambda: pickle.loads(gone))
    shutil.copytree(bundle, Path(scratch) / "moved")
    (Path(scratch) / "moved" / "flow" / "model.onnx").write_bytes(b"")
    raises(BundleError, lambda: pickle.loads(gone))


def _sleep() -> None:
    """A minute, but awake for a signal that comes just before it."""
    for _ in range(600):
        time.sleep(0.1)


def interrupted(bundle: str, way: str, waiting: str) -> None:
    """Says when the requests wait, and what became of them once the signal has come."""
    total = int(waiting)
    classifier = load(bundle, max_batch=4)
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    count = {"answered": 0, "cancelled": 0, "failed": 0}
    counting = threading.Lock()

    def heard(future: Any) -> None:
        kind = "cancelled" if future.cancelled() else "failed" if future.exception() else "answered"
        with counting:
            count[kind] += 1
            if sum(count.values()) == total:
                print(json.dumps(count), flush=True)

    def ask(submit: Any) -> None:
        for _ in range(total):
            submit(pixels).add_done_callback(heard)
        print("waiting", flush=True)

    if way == "SystemExit":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
    options: Any = {"max_queue": total, "max_delay_ms": 1}
    if way in ("context", "SystemExit"):
        with classifier.batcher(**options) as submit:
            ask(submit)
            _sleep()
    elif way == "while it closes":
        with contextlib.suppress(KeyboardInterrupt), classifier.batcher(**options) as submit:
            ask(submit)
        classifier.close()
        sys.exit(3 if sum(count.values()) == total else 5)
    elif way == "classifier":
        with classifier:
            ask(classifier.batcher(**options))
            _sleep()
    elif way == "no context":
        ask(classifier.batcher(**options))
        _sleep()
    elif way == "caught and left":
        with contextlib.suppress(KeyboardInterrupt):
            ask(classifier.batcher(**options))
            _sleep()
        sys.exit(3)
    else:
        asyncio.run(_interrupted_loop(classifier, way, pixels, options))


async def _interrupted_loop(classifier: Classifier, way: str, pixels: Any, options: Any) -> None:
    over = 0

    async def one(predict: Any) -> None:
        nonlocal over
        try:
            await predict(pixels)
        finally:
            over += 1
            if over == options["max_queue"]:
                print(json.dumps({"over": over}), flush=True)

    async def ask(predict: Any) -> None:
        tasks.extend(asyncio.create_task(one(predict)) for _ in range(options["max_queue"]))
        await asyncio.sleep(0)  # they begin
        print("waiting", flush=True)

    tasks: list[Any] = []
    if way == "event loop without context":
        await ask(classifier.async_batcher(**options))
    else:
        async with classifier.async_batcher(**options) as predict:
            await ask(predict)
            if way == "event loop that closes":
                return
            await asyncio.sleep(60)
    await asyncio.sleep(60)


def wsgi(bundle: str) -> Callable[..., list[bytes]]:
    """An application that gunicorn loads before it forks."""
    classifier = load(bundle, warm_up=True)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        labels = [answer.label for answer in classifier.predict(PIXELS)]
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"pid": os.getpid(), "labels": labels}).encode()]

    return application


def main_thread_ends_first(bundle: str) -> None:
    """Other threads go on serving, which keeps the interpreter from ending."""
    classifier = load(bundle)
    expected = classifier.predict(PIXELS)
    submit = classifier.batcher()

    def serve() -> None:
        threading.main_thread().join()
        same(classifier.predict(PIXELS), expected)
        assert submit(PIXELS[0]).result(SECONDS).labels == expected[0].labels
        print("served", flush=True)

    threading.Thread(target=serve).start()


def threads_that_never_end(bundle: str) -> None:
    classifier = load(bundle, warm_up=True)
    features = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)

    def serve() -> None:
        while True:
            classifier.classify_features(features)
            classifier.predict(PIXELS[0])

    for _ in range(3):
        threading.Thread(target=serve, daemon=True).start()
    time.sleep(0.1)
    sys.exit(0)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # which is the point
    # Whoever starts the tests in the background has them ignore Ctrl-C, which programs inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    globals()[sys.argv[1]](*sys.argv[2:])

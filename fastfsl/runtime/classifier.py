"""The classifier: a bundle, loaded once, called from any thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self
from weakref import WeakSet

import numpy as np

from fastfsl.errors import ClosedError, ConfigError, DeviceError, memory_error
from fastfsl.runtime.batcher import Batcher, is_interruption
from fastfsl.runtime.class_adder import ClassAdder
from fastfsl.runtime.engine import Engine
from fastfsl.runtime.forking import keep_for_ever, reset_in_child
from fastfsl.runtime.gate import Gate
from fastfsl.runtime.image_reader import check_reading
from fastfsl.runtime.loading import Loaded, load_bundle
from fastfsl.runtime.metrics import Metric, Metrics
from fastfsl.runtime.prediction import Prediction, softmax
from fastfsl.runtime.recipe import AddedClass, Recipe
from fastfsl.runtime.session import check_count, check_memory_limit, check_threads

if TYPE_CHECKING:
    from types import TracebackType

    from fastfsl.images import ImageSource
    from fastfsl.runtime.asynchronous import AsyncBatcher

    Images = ImageSource | Iterable[ImageSource]


class Classifier:
    """Classifies images, or embeddings, with a bundle. Make one with ``Classifier.load``.

    All methods may be called from several threads at once. In a child that was forked the first call loads the bundle
    again, from the same folder, which has to be unaltered: ONNX Runtime's sessions do not survive ``fork``. CUDA does
    not either and cannot be started again there: calls raise DeviceError. It can be pickled and copied, as its folder,
    digest, options and added classes, and is loaded anew from them. ``close`` it when it is no longer wanted, or use it
    as a context manager; calls made later raise ClosedError.
    """

    def __init__(self, loaded: Loaded, recipe: Recipe) -> None:
        self._recipe = recipe
        self._max_batch: int = recipe.options["max_batch"]
        self._metrics = Metrics(recipe.on_metrics)
        self._added: tuple[AddedClass, ...] = ()
        self._on_card = loaded.on_card()
        self._forked = self._closing = self._released = False
        self._gate = Gate("classifier", self._release)
        self._new_locks()
        self._begin(loaded)
        reset_in_child(self)

    def _begin(self, loaded: Loaded) -> None:
        """Compute with these sessions from now on."""
        adder = ClassAdder(self._recipe.path, loaded.manifest, loaded.origin["num_threads"])
        head = loaded.head
        for name, prompts in self._added:
            head = adder.extended(head, name, prompts)
        if loaded.encoder is not None:
            loaded.encoder.reader.metrics = self._metrics
        self._loaded = loaded
        self._engine = Engine(loaded, self._max_batch, self._metrics)
        # Replaced as a whole, never altered: each call reads it once, and its classes and logits belong together.
        self._head = head
        self._class_adder = adder

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        num_threads: int | None = None,
        max_batch: int = 32,
        alpha: float | None = None,
        flow: str = "auto",
        preprocess: str = "exact",
        image_threads: int | None = None,
        expected_digest: str | None = None,
        gpu_mem_limit: int | None = None,
        on_metrics: Callable[[Metric], None] | None = None,
        warm_up: bool = False,
        wide_int8: bool = False,
    ) -> Classifier:
        """Check a bundle completely and load it.

        Args:
            path: the bundle's folder.
            device: "cpu"; "cuda", which fails unless every part really runs there; "auto", CUDA where it comes up.
            num_threads: threads of one operator of a graph on the CPU; None uses all this process may use. The
                read-out of a bundle that has one is computed by numpy, whose threads the process sets for itself
                (OMP_NUM_THREADS or OPENBLAS_NUM_THREADS, before numpy is imported).
            max_batch: largest number of images computed at once; it bounds the memory. Embeddings, which are small,
                are computed 256 at once, or `max_batch` if that is more.
            alpha: weight, from 0 to 1, of the tuned image tower in its blend with the frozen one, where the bundle's
                encoder is such a blend; None: the bundle's own.
            flow: what computes the flow. "auto": the bundle's compiled kernels where a card runs them and they give
                what the ONNX graph gives, else that graph, and `describe()["flow"]` and the log say why; "compiled":
                the kernels, or an error; "onnx": the graph.
            preprocess: "exact" prepares images as open_clip does, bit for bit; "fast" decodes JPEGs at 1/2, 1/4 or 1/8
                of their size where that leaves 1.5 times what they are resized to, and resizes only what the crop
                keeps: a few grey values off, with the same outcome for every kind of image.
            image_threads: threads that decode images, the next batch while one is computed; None: one a processor, up
                to 8.
            expected_digest: what `fastfsl inspect BUNDLE --digest` prints of the one bundle that may be loaded. The
                hashes inside a bundle tell damage; only a digest that is kept elsewhere tells forgery.
            gpu_mem_limit: bytes that ONNX Runtime may take on the card for each graph; None: what it needs.
            on_metrics: is called with every `fastfsl.runtime.Metric`, from whatever thread it happens on; e.g. what
                `fastfsl.runtime.prometheus.exporter` returns. What it raises is logged once and costs no answer.
            wide_int8: run an older int8 bundle where it is refused because the processor would cut sums of its products
                off at 16 bits (AVX2 or AVX-512 without VNNI): with unsigned weights, which are exact there, in about
                1.3 times the time. Anywhere else, and with bundles of today, it changes nothing.
            warm_up: compute one batch of every size that is prepared for, so that no request pays for memory, kernels
                or the import of Pillow.

        Raises:
            BundleError: the bundle is incomplete, altered, of an unknown version, or not the expected one.
            DeviceError: CUDA or compiled kernels were asked for and did not come up, both onnxruntime packages are
                installed, or this processor would compute an older int8 bundle wrongly (see `wide_int8`).
            ConfigError: an option is out of range, or onnxruntime is not installed.
        """
        max_batch = check_count("max_batch", max_batch)
        options: dict[str, Any] = {
            "device": device,
            "num_threads": check_threads(num_threads),
            "alpha": alpha,
            "flow": flow,
            "gpu_mem_limit": check_memory_limit(gpu_mem_limit, device),
            "preprocess": preprocess,
            "image_threads": check_reading(preprocess, image_threads),
            "wide_int8": wide_int8,
        }
        loaded = load_bundle(path, **options, expected_digest=expected_digest)
        if warm_up:
            loaded.warm_up(max_batch)
        return cls(loaded, Recipe.of(loaded, path, {**options, "max_batch": max_batch, "warm_up": warm_up}, on_metrics))

    def close(self) -> None:
        """Close the batchers, wait for the calls in progress, stop all threads and let go of the sessions.

        It may be called twice and from several threads. From a callback of a batcher it does not wait: requests whose
        batch has not begun then end in a ClosedError. Where Ctrl-C interrupts the wait, and where a context is left by
        it, they are cancelled, and calls in progress are not waited for.
        """
        self._close(interrupted=False)

    def _close(self, *, interrupted: bool) -> None:
        with self._adding:
            self._closing = True
            batchers = list(self._batchers)
        # The threads that a callback holds up may be those that the others' answers need.
        wait = not any(batcher.calling_back for batcher in batchers)
        try:
            for batcher in batchers:
                batcher.close(cancel_pending=interrupted, wait=wait)
            self._gate.close(wait=wait and not interrupted)
        except BaseException:
            for batcher in batchers:
                batcher.close(cancel_pending=True, wait=False)
            self._gate.close(wait=False)
            raise

    def after_fork(self) -> None:
        """The sessions are of no use in the child; the first call makes others."""
        self._forked = True
        self._new_locks()
        if not self._released:
            # Letting go of them would wait for their threads, or ask CUDA to free what it no longer knows.
            keep_for_ever((self._loaded, self._head, self._class_adder))

    def _new_locks(self) -> None:
        self._batchers: WeakSet[Batcher] = WeakSet()
        self._adding = threading.Lock()
        self._loading = threading.RLock()

    @contextmanager
    def _call(self) -> Iterator[None]:
        """For the length of a call.

        Raises:
            ResourceError: there is no memory for it.
        """
        if self._forked:
            self._load_again()
        with self._gate.call():
            try:
                yield
            except MemoryError as error:
                raise memory_error("compute") from error

    def _load_again(self) -> None:
        with self._loading:
            if not self._forked or self._closing:
                return
            if self._on_card:
                raise DeviceError(
                    "the process forked after the classifier was loaded, and CUDA cannot be used in the child; load "
                    "the classifier in each worker process, or start them by spawn"
                )
            loaded = self._recipe.load_again(self._loaded.origin)
            with self._adding:
                if not self._closing:
                    self._begin(loaded)
                    self._forked = False

    def __reduce__(self) -> tuple[Callable[..., Classifier], Any]:
        return self._recipe.pickled(type(self), self._classes_to_copy())

    def __repr__(self) -> str:
        """The bundle, its method, the number of classes, and where they are computed; a closed one says so."""
        loaded, head = getattr(self, "_loaded", None), getattr(self, "_head", None)
        if loaded is None or head is None or self._closing:
            return f"<Classifier {str(self._recipe.path)!r}: closed>"
        device = "cuda" if loaded.on_card() else "cpu"
        return (
            f"<Classifier {str(self._recipe.path)!r}: method {loaded.manifest.method}, "
            f"{len(head.class_names)} classes, on {device}>"
        )

    def __copy__(self) -> Classifier:
        return self._recipe.copied(type(self), self._classes_to_copy())

    def __deepcopy__(self, memo: object) -> Classifier:
        return self.__copy__()

    def _classes_to_copy(self) -> tuple[AddedClass, ...]:
        with self._adding:
            if self._closing:
                raise ClosedError("a closed classifier can be neither pickled nor copied; load it again")
            return self._added

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(interrupted=is_interruption(kind))

    @property
    def class_names(self) -> tuple[str, ...]:
        """One label per class, in the order of the columns of ``probabilities``."""
        with self._call():
            return self._head.class_names

    def predict(
        self, images: Images, *, top_k: int = 5, on_error: Literal["raise", "mark"] = "raise"
    ) -> list[Prediction]:
        """Classify images.

        Args:
            images: one image or any number: paths, bytes of image files, open files, PIL images, or uint8 arrays of
                shape (H, W, 3).
            top_k: classes per image; more than there are means all.
            on_error: "raise" on the first unreadable image, or "mark" its prediction with the error and go on.

        Returns:
            One prediction per image, in order.

        Raises:
            DataError: an image cannot be read (it is named), or the bundle holds no image encoder.
            ShapeError: an array of another shape or dtype.
            ConfigError: an option is out of range.
        """
        with self._call():
            return list(self.stream(images, top_k=top_k, on_error=on_error))

    def stream(
        self, images: Images, *, top_k: int = 5, on_error: Literal["raise", "mark"] = "raise"
    ) -> Iterator[Prediction]:
        """Classify any number of images, a generator's included, holding no more than two batches of them.

        Arguments and errors as for ``predict``; an unreadable image raises when its batch has its turn. The iterator of
        images is read up to two batches ahead, on the thread that asks for predictions.

        Returns:
            An iterator of one prediction per image, in order.
        """
        top_k = check_count("top_k", top_k)
        if on_error not in ("raise", "mark"):
            raise ConfigError(f"on_error must be 'raise' or 'mark', got {on_error!r}")
        with self._call():
            _ = self._engine.encoder  # if there is none, it is said at once
            return self._stream(self._engine.predictions(self._head, images, top_k, mark=on_error == "mark"))

    def probabilities(self, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Softmax probabilities of every class, (n, C) float32. Images and errors as for ``predict``."""
        with self._call():
            head = self._head
            parts = [softmax(logits) for logits in self._engine.image_logits(head, images)]
            return _stack(parts, len(head.class_names))

    def embed(self, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The encoder's embeddings, (n, d) float32. Images and errors as for ``predict``.

        They are L2-normalised, but for those of a bundle whose blend is not (``describe()["blend"]["normalized"]``):
        alpha * tuned + (1 - alpha) * frozen as it is, at most 1 long.
        """
        with self._call():
            return _stack(list(self._engine.embeddings(images)), self._engine.embed_dim)

    def batcher(
        self, *, max_batch: int | None = None, max_delay_ms: float = 2, max_queue: int = 1024, top_k: int = 5
    ) -> Batcher:
        """Compute the single images of many threads in batches.

        >>> with classifier.batcher() as submit:  # doctest: +SKIP
        ...     prediction = submit("a.jpg").result()

        Images are decoded on the classifier's pool while others are computed. ``submit(image, top_k=None)`` returns a
        ``concurrent.futures.Future`` and raises OverloadError at once when the queue is full; the end of the context
        waits for every answer; if Ctrl-C or the like ends it, what has not begun is cancelled. More is said at
        `fastfsl.runtime.batcher.Batcher`.

        Args:
            max_batch: most images computed at once; None: the classifier's own ``max_batch``, which is the most.
            max_delay_ms: how long the first image of a batch waits for others, in milliseconds.
            max_queue: most requests accepted and not yet answered; each may hold its image.
            top_k: classes per image, where a request does not say.

        Raises:
            DataError: the bundle holds no image encoder.
            ConfigError: an option is out of range.
        """
        largest = self._max_batch if max_batch is None else check_count("max_batch", max_batch)
        if largest > self._max_batch:
            raise ConfigError(
                f"max_batch must be at most the classifier's {self._max_batch}, got {largest}; load the classifier "
                "with a larger one"
            )
        with self._call():
            batcher = Batcher(
                self._engine.encoder.reader.submit,
                self._answer,
                max_batch=largest,
                max_delay_ms=max_delay_ms,
                max_queue=max_queue,
                top_k=top_k,
                metrics=self._metrics,
            )
            with self._adding:
                if self._closing:
                    raise ClosedError("the classifier is closed; load it again")
                self._batchers.add(batcher)
            return batcher

    def async_batcher(
        self, *, max_batch: int | None = None, max_delay_ms: float = 2, max_queue: int = 1024, top_k: int = 5
    ) -> AsyncBatcher:
        """As ``batcher``, for an event loop, which it does not block.

        >>> async with classifier.async_batcher() as predict:  # doctest: +SKIP
        ...     prediction = await predict("a.jpg")
        """
        from fastfsl.runtime.asynchronous import AsyncBatcher  # asyncio takes 30 ms to import

        return AsyncBatcher(
            self.batcher(max_batch=max_batch, max_delay_ms=max_delay_ms, max_queue=max_queue, top_k=top_k)
        )

    def transport(self, features: Any) -> np.ndarray[Any, np.dtype[np.float32]]:  # noqa: ANN401 - any array-like
        """Where the flow carries embeddings: L2-normalised, (n, d) float32. Without a flow they stay where they are.

        Args:
            features: (n, d) or (d,), of any length but zero; they are normalised first. Of a bundle whose blend is not
                normalised they are taken as ``embed`` gives them, at most 1 long.

        Raises:
            ShapeError: another shape, or no numbers.
            DataError: NaN, infinite, all-zero or, of such a blend, longer rows; they are named.
        """
        with self._call():
            head = self._head
            parts = [head.transport(rows) for rows in self._engine.feature_parts(features)]
            return _stack(parts, self._engine.embed_dim)

    def classify_features(self, features: Any, *, top_k: int = 5) -> list[Prediction]:  # noqa: ANN401 - any array-like
        """Classify embeddings; features and errors as for ``transport``, ``top_k`` as for ``predict``."""
        top_k = check_count("top_k", top_k)
        with self._call():
            head, engine = self._head, self._engine
            parts = [engine.ranked(head, logits, top_k) for logits in engine.feature_logits(head, features)]
            return [prediction for part in parts for prediction in part]

    def feature_probabilities(self, features: Any) -> np.ndarray[Any, np.dtype[np.float32]]:  # noqa: ANN401 - any array-like
        """Softmax probabilities of every class, (n, C) float32. Features and errors as for ``transport``."""
        with self._call():
            head = self._head
            parts = [softmax(logits) for logits in self._engine.feature_logits(head, features)]
            return _stack(parts, len(head.class_names))

    def add_class(self, name: str, prompts: Sequence[str] | None = None) -> None:
        """Teach a bundle that was exported with ``--text`` one class more, by what the text tower reads of it.

        Calls that begin later know the class; those in progress end with the classes that they began with. It lives as
        long as the classifier, and goes into its copies. The temperature and the threshold of the bundle stay what they
        are. The first call reads the text tower from the bundle, a second or so for a large one.

        Args:
            name: its label, the last of ``class_names``.
            prompts: texts that describe it, whose embeddings are averaged; None: the name in the templates that the
                bundle was trained with. Taken literally, braces included.

        Raises:
            ConfigError: the name is empty or known, a prompt is empty, the bundle cannot read texts or was fitted to
                images of its classes in a way that leaves a name saying nothing, or the packages tokenizers and ftfy
                are not installed.
            BundleError: the bundle's files were altered or removed after it was loaded.
        """
        with self._call(), self._adding:
            head = self._class_adder.extended(self._head, name, prompts)
            given = [prompts] if isinstance(prompts, str) else prompts
            self._added = (*self._added, (name, None if given is None else tuple(given)))
            self._head = head

    def describe(self) -> dict[str, Any]:
        """What is loaded and what runs where, as JSON values.

        ``providers`` holds, for each graph, the execution providers its session really has, best first, and
        ``cuda_graphs``, for those on a card, "captured" or why there are none; ``device_fallback`` why "auto" came down
        to the CPU, or None; ``int8`` the largest sum of two adjacent int8 weights, whether no processor cuts their
        products' sums off, and whether they are computed with unsigned weights here, or None without int8; ``flow``
        what computes the flow, "onnxruntime" or e.g. "compiled sm_90", and the reason, or None without; ``readout``
        what numpy computes: the weight of the flow's logits, whether there is a linear part, the kernels, temperature
        and threshold, or None if the logits are simply the flow's; ``blend`` the weight in use, and whether the blend
        is normalised, or None if the encoder is no blend; ``added_classes`` what ``add_class`` added.
        """
        with self._call():
            return {**self._loaded.describe(self._head), "max_batch": self._max_batch}

    def _stream(self, parts: Generator[list[Prediction], None, None]) -> Iterator[Prediction]:
        """Within the gate for each batch, outside it for what the caller does in between."""
        with closing(parts):
            while True:
                with self._call():
                    part = next(parts, None)
                if part is None:
                    return
                yield from part

    def _answer(self, pixels: np.ndarray[Any, np.dtype[np.uint8]], top_k: int) -> list[Prediction]:
        with self._call():
            return self._engine.answer(self._head, pixels, top_k)

    def _release(self) -> None:
        if self._loaded.encoder is not None:
            self._loaded.encoder.reader.close(wait=False)  # the last call may end on one of its threads
        # Sessions and their executors end their threads when nobody refers to them any more.
        del self._loaded, self._engine, self._head, self._class_adder
        self._released = True


def _stack(parts: list[np.ndarray[Any, Any]], width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)

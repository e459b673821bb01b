"""A bundle's flow by its compiled kernels, without torch or Triton: numpy and the CUDA driver.

Weights are uploaded once. For each bucket of row counts there are buffers and a CUDA graph of all launches, kept until
they take too much memory together. Before the kernels of a class of row counts answer for the first time they prove
themselves on rows whose features ONNX Runtime has computed: a miscompiled kernel must never answer.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastfsl.bundle.flow_kernels import LOGITS
from fastfsl.bundle.flow_launches import MAX_BUCKET, Argument, Place, flow_launches, row_bucket, work_buffers
from fastfsl.bundle.flow_weights import FlowWeights, read_flow_weights
from fastfsl.bundle.manifest import Manifest
from fastfsl.errors import BundleError, DeviceError
from fastfsl.runtime.cuda_driver import Device, Graph, Memory
from fastfsl.runtime.cuda_kernels import FlowKernels, load_kernels

Rows = np.ndarray[Any, np.dtype[np.float32]]

# The buffers of all buckets together; those of 8192 rows and d = 1024 take 200 MB.
MAX_WORK_BYTES = 512 * 2**20
# Logits of one pass, of every state and prototype: where there are many, fewer rows go at once.
MAX_LOGITS_BYTES = 64 * 2**20
_CLASSES = "classes"
_ITEM_BYTES = {"float32": 4, "state": 2, "weight": 2}
# torch.nn.functional.normalize divides by max(norm, 1e-12).
_UNIT_EPS = 1e-12

# What the kernels may differ from the float32 flow: 16-bit weights move a row by some hundredths of its way.
_LEAST_COSINE = 0.999
_MOST_OF_THE_WAY, _MOST_AT_REST = 0.1, 1e-3
# The logits are those of the kernels' own states, in float32: of the scale.
_MOST_OF_THE_SCALE = 1e-3
_PROOF_ROWS = 4


@dataclass(frozen=True)
class _Work:
    """What the flow of a bucket of rows works on: (rows, d) `staging` and (S, rows, C K) `logits` are on the host."""

    rows: int
    memory: Mapping[str, Memory]
    graph: Graph
    staging: Rows
    logits: Rows

    @property
    def size(self) -> int:
        return sum(memory.size for memory in self.memory.values())


class CompiledFlow:
    """The flow of a bundle on a card. Several threads may call it; the card takes one of them at a time.

    Args:
        device: the card.
        kernels: on that card.
        weights: what they compute with.
        read_steps: steps whose states the logits average, ascending; 0 is the source.
        uploaded: what of the weights is on the card already, each with the size of a number.
        proof: embeddings and their features, as for `prove`, where they are known.

    Raises:
        DeviceError: there is not enough memory.
    """

    def __init__(
        self,
        device: Device,
        kernels: FlowKernels,
        weights: FlowWeights,
        read_steps: Sequence[int],
        *,
        uploaded: Mapping[str, tuple[Memory, int]] | None = None,
        proof: tuple[Rows, Rows] | None = None,
    ) -> None:
        self.device = device
        self.target = kernels.name
        self.dtype = weights.dtype
        self._kernels = kernels
        self._weights = weights
        self._read_steps = tuple(read_steps)
        arrays = {**weights.arrays, _CLASSES: weights.class_embeddings}
        self._constants = dict(uploaded or {})
        for name in arrays.keys() - self._constants.keys():
            self._constants[name] = device.upload(arrays[name]), arrays[name].itemsize
        bytes_a_row = 4 * len(read_steps) * len(weights.class_embeddings)
        self._chunk = max(1, min(MAX_BUCKET, MAX_LOGITS_BYTES // bytes_a_row))
        self._work: OrderedDict[int, _Work] = OrderedDict()
        self._proof = proof
        self._proven: set[int | None] = set()

    @classmethod
    def load(cls, path: str | os.PathLike[str], manifest: Manifest, device: Device) -> CompiledFlow:
        """Load a bundle's kernels and weights.

        Raises:
            BundleError: a file is altered, or contradicts the manifest.
            DeviceError: the bundle has no kernels for this card, the driver refuses them, or memory is short.
        """
        kernels = load_kernels(path, manifest, device)
        return cls(device, kernels, read_flow_weights(path, manifest), manifest.read_steps or (manifest.num_steps,))

    def with_classes(self, class_embeddings: Rows) -> CompiledFlow:
        """The same kernels and weights with other classes, proven on the same rows, whose features stay the same.

        Args:
            class_embeddings: L2-normalised, (C K, d), a class's K prototypes one after the other.

        Raises:
            DeviceError: there is not enough memory.
        """
        weights = replace(self._weights, class_embeddings=class_embeddings)
        uploaded = {name: memory for name, memory in self._constants.items() if name != _CLASSES}
        return CompiledFlow(self.device, self._kernels, weights, self._read_steps, uploaded=uploaded, proof=self._proof)

    def proof_rows(self) -> Rows:
        """Unit embeddings to prove the kernels on: some classes and some of random direction, (up to 8, d)."""
        noise = np.random.default_rng(0).standard_normal((_PROOF_ROWS, self._weights.dim)).astype(np.float32)
        return _unit(np.concatenate([self._weights.class_embeddings[:_PROOF_ROWS], noise]))

    def prove(self, embeds: Rows, features: Rows) -> None:
        """Compare with features computed otherwise, now for few rows, and for more rows when they first come.

        Args:
            embeds: unit embeddings, (k, d).
            features: where the flow carries them, L2-normalised, (k, d).

        Raises:
            DeviceError: the kernels give something else.
        """
        with self.device.active():
            self._proof = embeds, features
            self._proven.clear()
            self._work.clear()
            self._ready(row_bucket(len(embeds)))

    def logits(self, embeds: Rows) -> Rows:
        """Logits (n, C) of embeddings (n, d), n above 0, as the flow's ONNX graph defines them.

        Raises:
            BundleError: NaN or infinite values came out.
            DeviceError: the card failed, or its kernels prove wrong.
        """
        return self._passes(embeds, self._read_logits)

    def features(self, embeds: Rows) -> Rows:
        """The last state read of embeddings (n, d), n above 0, L2-normalised, (n, d); errors as for `logits`."""
        return _finite(self._passes(embeds, self._read_features))

    def encoded_logits(self, count: int, write: Callable[[int], None]) -> tuple[Rows, Rows] | None:
        """Logits of embeddings that are made on the card; errors as for `logits`.

        Args:
            count: n, above 0.
            write: writes n unit embeddings (n, d), float32, to an address on the card, in the order of its stream.

        Returns:
            The embeddings (n, d) and the logits (n, C); None: these are too many rows for one pass.
        """
        if count > self._chunk:
            return None
        with self.device.active():
            work = self._ready(row_bucket(count))
            write(work.memory["x"].pointer)
            self.device.replay(work.graph)
            self.device.copy_out(work.staging[:count], work.memory["x"].pointer)
            logits = self._read_logits(work, count)
            return _finite(work.staging[:count].copy()), logits

    def _passes(self, embeds: Rows, read: Callable[[_Work, int], Rows]) -> Rows:
        parts = []
        for start in range(0, len(embeds), self._chunk):
            chunk = embeds[start : start + self._chunk]
            with self.device.active():
                work = self._ready(row_bucket(len(chunk)))
                self._run(work, chunk)
                parts.append(read(work, len(chunk)))
        return np.concatenate(parts)

    def _run(self, work: _Work, embeds: Rows) -> None:
        staged = work.staging[: len(embeds)]
        staged[:] = _unit(embeds)
        self.device.copy_in(work.memory["x"].pointer, staged)
        self.device.replay(work.graph)

    def _read_logits(self, work: _Work, count: int) -> Rows:
        """Of every class the best of its prototypes; of several states the log of their mean probabilities."""
        self._copy_logits(work, count)
        states, prototypes = len(self._read_steps), self._weights.num_prototypes
        each: Rows = _finite(work.logits[:, :count]).reshape(states, count, -1, prototypes).max(axis=3)
        logits: Rows = each[0]
        if states > 1:
            wide = each.astype(np.float64)
            total = _log_sum(wide - _log_sum(wide, axis=2), axis=0)[0]
            logits = (total - math.log(states)).astype(np.float32)
        return logits

    def _copy_logits(self, work: _Work, count: int) -> None:
        for index, state in enumerate(work.logits):
            self.device.copy_out(state[:count], work.memory[LOGITS].pointer + index * state.nbytes)
        self.device.synchronize()

    def _read_features(self, work: _Work, count: int) -> Rows:
        self.device.copy_out(work.staging[:count], self._states(work.memory, work.rows)[-1])
        self.device.synchronize()
        return _unit(work.staging[:count])

    def _states(self, memory: Mapping[str, Memory], rows: int) -> list[int]:
        """The addresses of the states read; that of step 0 is the source."""
        size = 4 * rows * self._weights.dim
        return [
            memory["x"].pointer if step == 0 else memory["states"].pointer + self._moved().index(step) * size
            for step in self._read_steps
        ]

    def _moved(self) -> tuple[int, ...]:
        return tuple(step for step in self._read_steps if step > 0)

    def _ready(self, rows: int) -> _Work:
        """Buffers and graph of a bucket, its kernels proven."""
        work = self._work.get(rows)
        if work is None:
            work = self._make_work(rows)
            row_class = self._kernels.row_class(rows)
            if self._proof is not None and row_class not in self._proven:
                self._check(work, *self._proof)
                self._proven.add(row_class)
            self._work[rows] = work
            while len(self._work) > 1 and sum(one.size for one in self._work.values()) > MAX_WORK_BYTES:
                self._work.popitem(last=False)
        self._work.move_to_end(rows)
        return work

    def _make_work(self, rows: int) -> _Work:
        device, kernels, weights = self.device, self._kernels, self._weights
        kernels.load(rows)
        dim, classes = weights.dim, len(weights.class_embeddings)
        shapes = work_buffers(rows, dim, kernels.column_tiles("enter", rows, dim), len(self._moved()))
        shapes[LOGITS] = (len(self._read_steps), rows, classes), "float32"
        memory = {name: device.allocate(max(math.prod(s) * _ITEM_BYTES[k], 1)) for name, (s, k) in shapes.items()}
        places = {name: (memory[name], _ITEM_BYTES[kind]) for name, (_, kind) in shapes.items()} | self._constants

        def address(argument: Argument) -> float:
            if not isinstance(argument, Place):
                return argument
            buffer, item_bytes = places[argument.buffer]
            return buffer.pointer + argument.offset * item_bytes

        def launches() -> None:
            flow = flow_launches(
                rows=rows,
                dim=dim,
                num_blocks=weights.num_blocks,
                step_size=weights.step_size,
                read_steps=self._moved(),
            )
            for one in flow:
                kernels.launch(one.kernel, rows, dim, {name: address(value) for name, value in one.arguments.items()})
            sizes = {"logit_scale": weights.logit_scale, "n": rows, "num_classes": classes}
            for index, state in enumerate(self._states(memory, rows)):
                out = Place(LOGITS, index * rows * classes)
                pointers = {"features": state, "classes": address(Place(_CLASSES)), LOGITS: address(out)}
                kernels.launch(LOGITS, rows, classes, {**pointers, **sizes})

        graph = device.capture(launches)
        return _Work(rows, memory, graph, device.pinned((rows, dim)), device.pinned(shapes[LOGITS][0]))

    def _check(self, work: _Work, embeds: Rows, features: Rows) -> None:
        """The rows of the proof, repeated until they fill the bucket, come out as they should."""
        repeated = np.resize(np.arange(len(embeds)), work.rows)
        source, expected = embeds[repeated], features[repeated]
        self._run(work, source)
        found = self._read_features(work, work.rows)
        self._copy_logits(work, work.rows)
        scale, classes = self._weights.logit_scale, self._weights.class_embeddings
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.linalg.norm(found - expected, axis=1)
            cosine = float((found * expected).sum(axis=1).min())
            off = float(np.abs(work.logits[-1] - np.float32(scale) * found @ classes.T).max())
        allowed = _MOST_OF_THE_WAY * np.linalg.norm(expected - source, axis=1) + _MOST_AT_REST
        remedy = "export the bundle again, or choose flow='onnx'"
        # Written so that NaN fails.
        if not ((difference <= allowed).all() and cosine >= _LEAST_COSINE):
            raise DeviceError(
                f"the compiled flow of {work.rows} rows differs from the ONNX flow by {difference.max():.3g} (cosine "
                f"{cosine:.5f}), more than 16-bit weights explain; {remedy}"
            )
        if not off <= _MOST_OF_THE_SCALE * scale:
            raise DeviceError(f"the compiled logits of {work.rows} rows are off by {off:.3g}; {remedy}")


def _unit(rows: Rows) -> Rows:
    with np.errstate(invalid="ignore", over="ignore"):  # infinite rows become NaN, which is looked for
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        unit: Rows = rows / np.maximum(length, np.float32(_UNIT_EPS))
    return unit


def _log_sum(logits: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    largest = logits.max(axis=axis, keepdims=True)
    total: np.ndarray[Any, Any] = largest + np.log(np.exp(logits - largest).sum(axis=axis, keepdims=True))
    return total


def _finite(rows: Rows) -> Rows:
    """The rows.

    Raises:
        BundleError: they hold NaN or infinite values.
    """
    if not np.isfinite(rows).all():
        raise BundleError(
            "the bundle's compiled flow gave NaN or infinite values; export it again, with --kernel-dtype bf16 if it "
            "was fp16, or choose flow='onnx'"
        )
    return rows

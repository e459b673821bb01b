"""Many rows through one graph: each thread takes its own rows.

Splitting every operator over the threads makes them meet after each of the flow's several hundred operators. Splitting
the rows makes them meet once. A single row still wants every thread on it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl.runtime.worker_pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastfsl.runtime.session import Node, Session

# Below this many rows a thread, sharing each operator is faster.
ROWS_PER_THREAD = 8


class RowParallelSession:
    """A session for few rows, and one whose operators stay on their caller's thread for many.

    Args:
        shared: a session that spreads every operator over all threads.
        single: the same graph with one thread an operator.
        num_threads: parts that many rows are cut into.
    """

    def __init__(self, shared: Session, single: Session, num_threads: int) -> None:
        self._shared = shared
        self._single = single
        self._num_threads = num_threads
        self._whole = {node.name for node in shared.get_overridable_initializers()}
        self._pool = WorkerPool(num_threads, "fastfsl-rows")

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Compute the named outputs; the first dimension of every output and input is the rows.

        Scalars, and inputs that have a value of their own (a flow's classes), are the same for every row.
        """
        rows = {name: values for name, values in input_feed.items() if name not in self._whole and np.ndim(values) > 0}
        count = min(len(values) for values in rows.values())
        if count < ROWS_PER_THREAD * self._num_threads:
            return self._shared.run(output_names, input_feed)
        bounds = [count * part // self._num_threads for part in range(self._num_threads + 1)]
        parts = [
            self._pool.submit(
                self._single.run,
                output_names,
                {**input_feed, **{name: values[start:end] for name, values in rows.items()}},
            )
            for start, end in pairwise(bounds)
        ]
        return [np.concatenate(outputs) for outputs in zip(*(part.result() for part in parts), strict=True)]

    def get_inputs(self) -> list[Node]:
        """The graph's inputs."""
        return self._shared.get_inputs()

    def get_overridable_initializers(self) -> list[Node]:
        """The graph's inputs that have a value of their own."""
        return self._shared.get_overridable_initializers()

    def get_outputs(self) -> list[Node]:
        """The graph's outputs."""
        return self._shared.get_outputs()

    def get_providers(self) -> list[str]:
        """The execution providers that really came up, best first."""
        return self._shared.get_providers()

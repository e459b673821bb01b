"""A bound on the memory that a graph may take on the processor while it computes.

What a graph makes of its inputs cannot be told beforehand, so ONNX Runtime has to stop it: each session gets an arena
of its own with a maximum, from which it takes its intermediate results and outputs (not its weights, which are as large
as the file). Where the maximum is reached the call fails, and nothing else does.

ONNX Runtime hands arenas to sessions through its environment, which is one for the process: the last one registered is
taken by every session made with ``session.use_env_allocators``. So one is registered, the session is made, and then a
plain one without a maximum takes its place. Sessions of the application that do not ask for the environment's allocator
are not touched; those that do get the plain one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fastfsl.bundle.onnx_graph import GraphFacts
from fastfsl.errors import ConfigError

VARIABLE = "FASTFSL_ARENA_BYTES"

# Any graph may take so much, and as much as its weights.
_BASE_BYTES = 64 * 2**20
# For each number of the rows that are computed at once. Measured or computed, in bytes: ViT-B/32 15, ViT-B/16 50,
# ViT-L/14 at 336 pixels 180, ConvNeXt-XXL 380, SigLIP2 at 512 pixels 260; a flow of 12 blocks 40. Several callers may
# compute at once.
_BYTES_A_VALUE = 1024
# Of features and token ids, which come in larger batches than images do, and of which no more numbers are counted: what
# a row of them takes grows with the weights.
ROWS_AT_ONCE = 256
_MOST_OF_A_VECTOR = 1024
# Of an image so many: those of 512 pixels have 0.8 million.
_MOST_OF_AN_IMAGE = 2**20
# The rest of the machine's memory, or the container's, is for weights, images and whatever else runs.
_SHARE = 0.75
_CGROUP = Path("/sys/fs/cgroup")
# The first release that can be told how much one constant may become; older ones would compute any.
_FOLDING_SINCE = (1, 27)

_lock = threading.Lock()


def _new_lock() -> None:
    global _lock  # noqa: PLW0603 - a lock that another thread held while the process forked stays locked in the child
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def arena_bytes(facts: GraphFacts, image_rows: int, cgroup: Path = _CGROUP) -> int:
    """Bytes that a graph's intermediate results may take; 0: any number.

    The environment's ``FASTFSL_ARENA_BYTES`` says otherwise, if it is set.

    Args:
        facts: of the graph.
        image_rows: images that are computed at once.
        cgroup: where the control group's files are mounted.

    Raises:
        ConfigError: the environment names no number of bytes.
    """
    said = os.environ.get(VARIABLE, "").strip()
    if said:
        if not said.isascii() or not said.isdigit() or len(said) > 18:
            raise ConfigError(f"{VARIABLE} must be a number of bytes, or 0 for no bound, got {said!r:.40}")
        return int(said)
    rows = image_rows if facts.images else max(ROWS_AT_ONCE, image_rows)
    values = min(facts.row_values, _MOST_OF_AN_IMAGE if facts.images else _MOST_OF_A_VECTOR)
    wanted = _BASE_BYTES + facts.model_bytes + rows * values * _BYTES_A_VALUE
    memory = _memory(cgroup)
    return wanted if memory is None else max(_BASE_BYTES, min(wanted, int(_SHARE * memory)))


@contextlib.contextmanager
def bounded(onnxruntime: ModuleType, options: Any, max_bytes: int) -> Iterator[None]:  # noqa: ANN401 - ships no types
    """A session made inside takes its memory from an arena of its own, of at most so many bytes.

    Args:
        onnxruntime: its module.
        options: of the session.
        max_bytes: the maximum; 0: the session is made as ONNX Runtime makes it.
    """
    if max_bytes == 0:
        yield
        return
    options.add_session_config_entry("session.use_env_allocators", "1")
    with _lock:
        _register(onnxruntime, max_bytes)
        try:
            yield
        finally:
            # The environment would keep the arena, and what it holds, after the session is gone.
            _register(onnxruntime, 0)


def limit_folding(onnxruntime: ModuleType, options: Any, facts: GraphFacts) -> dict[str, Any]:  # noqa: ANN401 - ships no types
    """Bound what ONNX Runtime makes of a graph's constants when it loads it, which no arena bounds.

    Returns:
        More arguments of the session: where an old release could not be told, it must not make anything of them.
    """
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= _FOLDING_SINCE:
        options.add_session_config_entry(
            "optimization.constant_folding_max_output_size_in_bytes", str(max(1, facts.folding_bytes))
        )
        return {}
    return {} if facts.folding_known else {"disabled_optimizers": ["ConstantFolding"]}


def _register(onnxruntime: ModuleType, max_bytes: int) -> None:
    default = -1
    config = onnxruntime.OrtArenaCfg(max_bytes, default, default, default)
    info = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(info, config)


def _memory(cgroup: Path) -> int | None:
    """Bytes of memory that this process may use: the machine's, or its control group's if that has fewer."""
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no POSIX
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            found.append(int((cgroup / name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min((one for one in found if one > 0), default=None)

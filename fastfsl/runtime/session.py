"""ONNX Runtime sessions that run where they say they run.

``onnxruntime.get_available_providers()`` lists CUDA even when its libraries are missing, and a session asked for CUDA
then silently runs on the CPU. So a session's own ``get_providers()`` is what counts here, and onnxruntime's fallback,
which would retry on the CPU and print to stdout, is switched off.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastfsl.bundle.onnx_graph import GraphFacts, check_graph_file
from fastfsl.errors import BundleError, ConfigError, DeviceError, FastFSLError, resource_error
from fastfsl.runtime.arena import VARIABLE, arena_bytes, bounded, limit_folding
from fastfsl.runtime.bucket_session import BucketSession
from fastfsl.runtime.cuda_session import CudaSession
from fastfsl.runtime.forking import keep_in_child, undisturbed, without_telemetry
from fastfsl.runtime.row_parallel import ROWS_PER_THREAD, RowParallelSession
from fastfsl.runtime.threads import available_cpus, default_threads

if TYPE_CHECKING:
    from fastfsl.runtime.cuda_driver import Device

DEVICES = ("auto", "cpu", "cuda")

# A flow of d = 1024 with 12 blocks has 110 MB, a ViT-B/32 350.
MAX_TWICE_BYTES = 128 * 2**20

# ONNX Runtime starts as many threads as it is told, even millions.
MAX_THREADS = 1024

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
# Searching the fastest convolution exhaustively costs seconds for every new shape; memory is taken as it is needed.
_CUDA_OPTIONS = {
    "device_id": "0",
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}
# The first release in which the option was seen; older ones ignore it and would spin without bound.
_SPIN_DURATION_SINCE = (1, 31)
_ADVICE = "run `fastfsl doctor` to see what is missing, or choose device='cpu'"

# Fuses a sum with the normalization that reads it. The fused operator divides by the size of one side, which may be 0
# although the graph says otherwise, and the process ends (ONNX Runtime 1.32).
_UNSAFE_FUSION = "SkipLayerNormFusion"

# What ONNX Runtime says when an arena has reached its maximum.
_ARENA_FULL = "Available memory of"

_log = logging.getLogger("fastfsl.runtime")


class Node(Protocol):
    """Name, type and shape of a graph's input or output; a symbolic dimension is a string or None."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class Session(Protocol):
    """The part of ``onnxruntime.InferenceSession`` that the runtime uses."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Compute the named outputs; several threads may call it."""
        ...

    def get_inputs(self) -> list[Node]:
        """The graph's inputs."""
        ...

    def get_overridable_initializers(self) -> list[Node]:
        """The graph's inputs that have a value of their own."""
        ...

    def get_outputs(self) -> list[Node]:
        """The graph's outputs."""
        ...

    def get_providers(self) -> list[str]:
        """The execution providers that really came up, best first."""
        ...


def create_session(
    model: bytes,
    name: str,
    *,
    device: str = "auto",
    num_threads: int | None = None,
    card: Device | None = None,
    gpu_mem_limit: int | None = None,
    in_buckets: bool = False,
    half: bool = False,
    fallbacks: list[tuple[int, str]] | None = None,
) -> Session:
    """A session on the device asked for.

    It is made from bytes, so what runs is what was hashed, and weights outside the model cannot be pulled in.

    Args:
        model: a serialised ONNX model.
        name: what messages call it.
        device: "cpu"; "cuda", which fails if the session is not on it; "auto", CUDA where it really comes up.
        num_threads: threads of one operator on the CPU; None uses all this process may use.
        card: if the session comes up on CUDA, it works on this card's stream and is a `CudaSession`.
        gpu_mem_limit: bytes that ONNX Runtime may take on the card for this graph; None: all there are.
        in_buckets: if the session comes up on CUDA without `card`, it is a `BucketSession`, by CUDA graphs if it can.
        half: the graph may compute in float16; only with device "cuda", which must have been seen to work.
        fallbacks: gets, for "auto", why the session is on the CPU, and how urgently a log should say so.

    Raises:
        ConfigError: an option is out of range, or onnxruntime is not installed.
        DeviceError: CUDA did not come up, or both onnxruntime packages are installed.
        BundleError: the model is none that a bundle may hold, or onnxruntime cannot load it.
    """
    if device not in DEVICES:
        raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    num_threads = check_threads(num_threads)
    gpu_mem_limit = check_memory_limit(gpu_mem_limit, device)
    onnxruntime = load_onnxruntime()
    facts = check_graph_file(model, name, half=half and device == "cuda")
    threads = default_threads() if num_threads is None else num_threads
    if device == "cpu":
        return _create(onnxruntime, model, name, facts, [_CPU], threads)
    try:
        return _create_on_cuda(onnxruntime, model, name, facts, threads, card, gpu_mem_limit, in_buckets=in_buckets)
    except DeviceError as error:
        if device == "cuda":
            raise DeviceError(f"device='cuda': {error}; {_ADVICE}") from error
        if fallbacks is not None:
            # Of a build for the CPU one expects nothing else; a card that goes unused is worth a word.
            built = _CUDA in onnxruntime.get_available_providers()
            fallbacks.append((logging.WARNING if built else logging.INFO, str(error)))
        return _create(onnxruntime, model, name, facts, [_CPU], threads)


def create_row_session(
    model: bytes,
    name: str,
    *,
    device: str = "auto",
    num_threads: int | None = None,
    card: Device | None = None,
    gpu_mem_limit: int | None = None,
    half: bool = False,
    small_products: bool = False,
    fallbacks: list[tuple[int, str]] | None = None,
) -> Session:
    """As `create_session`, for a graph that may get many rows.

    On CUDA it computes in buckets of rows. On the CPU each thread takes its own rows; that holds the graph's weights
    twice, so it is done for graphs up to `MAX_TWICE_BYTES`. With `small_products`, those of an int8 flow, few rows stay
    on one thread, and the weights are held once: another thread would save less than waking it for each of them costs.
    """
    num_threads = check_threads(num_threads)
    threads = available_cpus() if num_threads is None else num_threads
    shared = create_session(
        model,
        name,
        device=device,
        num_threads=1 if small_products else num_threads,
        card=card,
        gpu_mem_limit=gpu_mem_limit,
        in_buckets=True,
        half=half,
        fallbacks=fallbacks,
    )
    if threads == 1 or not on_cpu(shared):
        return shared
    if small_products:
        return RowParallelSession(shared, shared, threads)
    if len(model) > MAX_TWICE_BYTES:
        return shared
    single = _create(load_onnxruntime(), model, name, check_graph_file(model, name), [_CPU], 1)
    return RowParallelSession(shared, single, threads)


def on_cpu(session: Session) -> bool:
    """Whether a session computes on the processor alone."""
    return session.get_providers() == [_CPU]


def run_rows(session: Session, output: str, feed: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One output of a graph, a row for each row of its first input; others are the same for every row.

    Raises:
        BundleError: onnxruntime cannot compute it, or it is something else.
    """
    try:
        with undisturbed:
            result = session.run([output], feed)[0]
    except FastFSLError:
        raise
    except Exception as error:  # onnxruntime raises a type of its own for each status code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy, fault = "export it again", resource_error(error, f"compute {output}")
        if _ARENA_FULL in reason:
            remedy, fault = (
                (
                    "it needs more memory than its graph may take here: if you trust the bundle, set "
                    f"{VARIABLE} in the environment to more bytes, or to 0 for no bound"
                ),
                None,
            )
        raise fault or BundleError(f"onnxruntime cannot compute the bundle's {output} ({reason}); {remedy}") from error
    rows = len(next(iter(feed.values())))
    if not isinstance(result, np.ndarray) or result.dtype != np.float32 or result.ndim != 2 or len(result) != rows:
        shape = getattr(result, "shape", None)
        raise BundleError(f"the bundle's graphs gave {output} of shape {shape} for {rows} rows; export it again")
    return result


def run_finite(session: Session, output: str, feed: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """As `run_rows`, of finite numbers.

    Raises:
        BundleError: as there, or it holds NaN or infinite values.
    """
    result = run_rows(session, output, feed)
    if not np.isfinite(result).all():
        raise BundleError(f"the bundle's graphs gave NaN or infinite {output}; export it again")
    return result


def check_graph(path: Path, session: Session, inputs: dict[str, list[int]], outputs: dict[str, list[int]]) -> None:
    """Names and shapes, the first dimension being the batch, are those the manifest promises.

    A dimension that the graph leaves open is no contradiction.

    Raises:
        BundleError: they are not.
    """
    for kind, nodes, expected in (("input", session.get_inputs(), inputs), ("output", session.get_outputs(), outputs)):
        found = {node.name: list(node.shape) for node in nodes}
        for name, shape in expected.items():
            batch, *dims = found.get(name) or [None]  # missing, or a scalar
            wrong = len(dims) != len(shape) or any(
                isinstance(dim, int) and dim != size for dim, size in zip(dims, shape, strict=True)
            )
            if wrong or isinstance(batch, int):
                raise BundleError(
                    f"{path}: expected the {kind} {name} of shape (batch, {', '.join(map(str, shape))}) with a free "
                    f"batch, got {found}; export the bundle again"
                )


def check_count(name: str, value: Any) -> int:  # noqa: ANN401 - whatever a caller gives
    """An option that must be a whole number above 0, numpy's integers included, as a plain int.

    Raises:
        ConfigError: names the option.
    """
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:  # a float, or no number
        count = 0
    if count < 1:
        raise ConfigError(f"{name} must be a whole number above 0, got {value!r}")
    return count


def check_threads(num_threads: int | None) -> int | None:
    """The number of threads, as a plain int.

    Raises:
        ConfigError: it is no whole number above 0, or more than `MAX_THREADS`.
    """
    if num_threads is None:
        return None
    count = check_count("num_threads", num_threads)
    if count > MAX_THREADS:
        raise ConfigError(f"num_threads must be at most {MAX_THREADS}, got {count}")
    return count


def check_memory_limit(gpu_mem_limit: int | None, device: str) -> int | None:
    """The limit, as a plain int; refuses one that is no whole number of bytes, or that nothing will obey.

    Raises:
        ConfigError: says which.
    """
    if gpu_mem_limit is None:
        return None
    limit = check_count("gpu_mem_limit", gpu_mem_limit)
    if device == "cpu":
        raise ConfigError("gpu_mem_limit is for device='cuda' or 'auto'; leave it out")
    return limit


def load_onnxruntime() -> ModuleType:
    """The onnxruntime module, when exactly one distribution of it is installed.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
        DeviceError: onnxruntime and onnxruntime-gpu are both installed: they overwrite each other's files.
    """
    if len(installed_onnxruntimes()) > 1:
        raise DeviceError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'fastfsl[gpu]' or 'fastfsl[cpu]'"
        )
    without_telemetry()
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"the runtime needs onnxruntime ({error}); pip install 'fastfsl[cpu]', or 'fastfsl[gpu]' for CUDA"
        ) from error
    module: ModuleType = onnxruntime
    return module


def installed_onnxruntimes() -> dict[str, str]:
    """Installed distributions that provide the onnxruntime module, with their versions."""
    import importlib.metadata  # importing the runtime need not cost this

    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _create_on_cuda(
    onnxruntime: ModuleType,
    model: bytes,
    name: str,
    facts: GraphFacts,
    threads: int,
    card: Device | None,
    gpu_mem_limit: int | None,
    *,
    in_buckets: bool,
) -> Session:
    """A session that is on CUDA.

    Raises:
        DeviceError: there is none.
    """
    if _CUDA not in onnxruntime.get_available_providers():
        raise DeviceError(
            "the installed onnxruntime has no CUDA; pip uninstall onnxruntime, then pip install 'fastfsl[gpu]'"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed beside onnxruntime-gpu
    options = dict(_CUDA_OPTIONS)
    if gpu_mem_limit is not None:
        options["gpu_mem_limit"] = str(gpu_mem_limit)
    if card is not None:
        options["user_compute_stream"] = str(card.stream)
    refused = None
    if in_buckets and card is None:
        try:
            captured = (_CUDA, {**options, "enable_cuda_graph": "1"})
            session = _create(onnxruntime, model, name, facts, [captured, _CPU], threads)
            if _CUDA in session.get_providers():
                return BucketSession(session, onnxruntime)
        except BundleError as error:  # a graph with parts on the CPU cannot be captured
            refused = str(error)
    try:
        session = _create(onnxruntime, model, name, facts, [(_CUDA, options), _CPU], threads)
    except BundleError as error:
        # Without a usable GPU the provider may also refuse to start; on the CPU the same model tells which it was.
        raise DeviceError(str(error)) from error
    if _CUDA not in session.get_providers():
        raise DeviceError(f"{name} came up on {session.get_providers()} only: onnxruntime cannot use the GPU here")
    if card is not None:
        return CudaSession(session, card)
    if refused is None:
        return session
    _log.warning("no CUDA graphs: %s", refused)
    return BucketSession(session, onnxruntime, refused)


def _create(
    onnxruntime: ModuleType, model: bytes, name: str, facts: GraphFacts, providers: list[Any], threads: int
) -> Session:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A thread that waits for the next operator spins for 20 microseconds and then sleeps. Spinning for as long as ONNX
    # Runtime would takes the cores from whatever else runs, the other session of the same bundle included.
    brief = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= _SPIN_DURATION_SINCE
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if brief else "0")
    if brief:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    # A graph may keep weights in files beside it; of a model given as bytes onnxruntime looks for them in the working
    # directory. A bundle's graphs have none, and no file can lie below this path.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    options.log_severity_level = 4  # errors come back as exceptions; stderr stays the application's
    without = limit_folding(onnxruntime, options, facts)
    if providers == [_CPU]:
        without["disabled_optimizers"] = [*without.get("disabled_optimizers", ()), _UNSAFE_FUSION]
    # On a card gpu_mem_limit bounds the memory.
    rows = ROWS_PER_THREAD * max(threads, available_cpus())
    max_bytes = arena_bytes(facts, rows) if providers == [_CPU] else 0
    try:
        with undisturbed, bounded(onnxruntime, options, max_bytes):
            session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0, **without)
    except Exception as error:  # onnxruntime raises a type of its own for each status code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise resource_error(error, f"load {name}") or BundleError(
            f"{name}: onnxruntime cannot load the model ({reason}); export it again"
        ) from error
    # onnxruntime keeps the model's bytes for the fallback that is switched off; they would double the memory.
    session._model_bytes = None  # noqa: SLF001 - there is no public way to let go of them
    keep_in_child(session)  # its destructor waits for threads that a forked child does not have
    created: Session = session
    return created

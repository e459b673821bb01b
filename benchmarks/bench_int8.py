"""What int8 is written as: one product an operator instead of onnxruntime's own pairs, few rows on one thread.

And weights whose sums no processor cuts off, which cost no time.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from fastfsl.export import quantization
from fastfsl.export.flow_graph import flow_graph
from fastfsl.export.fusion import fuse
from fastfsl.export.quantization import calibrate, quantize
from fastfsl.export.torch_export import TRACED_BATCH, to_onnx
from fastfsl.flow import VelocityField, build_plan
from fastfsl.runtime.session import Session, create_row_session, create_session

# ViT-B/32, but for the number of blocks.
TOKENS, WIDTH, HEADS, LAYERS = 50, 768, 12, 4
DIM, BLOCKS, STEPS, ROWS = 512, 12, 10, 8
TURNS, CALLS, THREADS = 12, 6, 2
# One operator a product must be faster than pairs; one thread instead of two, which holds the weights once, not slower;
# nor weights of a limited range, than those of the whole.
AT_LEAST = {"int8_products": 1.25, "int8_flow_of_few_rows": 0.9, "int8_limited_weights": 0.97}


class _Once(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """One batch."""

    def __init__(self, feed: dict[str, Any]) -> None:
        self._feeds = iter([feed])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _open(model: bytes) -> Session:
    return create_session(model, "benchmark", device="cpu", num_threads=THREADS)


def _int8(model: onnx.ModelProto, feed: dict[str, Any]) -> bytes:
    int8, _ = quantize(model, calibrate(model, [feed], _open))
    serialized: bytes = int8.SerializeToString()
    return serialized


def _compared(sides: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Median milliseconds of each side in every turn; the first call of a turn is not counted."""
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(TURNS):
        for name, call in sides.items():
            call()
            turns[name].append(statistics.median(_milliseconds(call) for _ in range(CALLS - 1)))
    return turns


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


@pytest.fixture
def compare(benchmark, record):
    """Times two sides, keeps the result, and asserts how much faster the first is."""

    def run(name: str, what: str, sides: dict[str, Callable[[], object]]) -> None:
        turns = benchmark.pedantic(_compared, (sides,), rounds=1)
        times_faster = statistics.median(theirs / ours for ours, theirs in zip(*turns.values(), strict=True))
        ms = {side: round(statistics.median(values), 3) for side, values in turns.items()}
        benchmark.extra_info.update(ms=ms, provider="CPUExecutionProvider", threads=THREADS)
        record(name, {"what": what, "threads": THREADS, "ms": ms, "times_faster": round(times_faster, 2)})
        assert times_faster >= AT_LEAST[name]

    return run


@pytest.fixture(scope="module")
def blocks() -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A graph of ViT blocks, and one image's tokens for it."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(ResidualAttentionBlock(WIDTH, HEADS) for _ in range(LAYERS))).eval()
    model = fuse(to_onnx(blocks, {"input": torch.zeros(TRACED_BATCH, TOKENS, WIDTH)}, "output", "blocks"))
    return model, {"input": np.random.default_rng(0).normal(size=(1, TOKENS, WIDTH)).astype(np.float32)}


def bench_int8_products(compare, blocks, tmp_path: Path):
    model, feed = blocks
    onnx.save(model, tmp_path / "fp32.onnx")
    quantize_static(
        tmp_path / "fp32.onnx", tmp_path / "pairs.onnx", _Once(feed), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Attention"],
    )  # fmt: skip
    ours, theirs = _open(_int8(model, feed)), _open((tmp_path / "pairs.onnx").read_bytes())
    compare(
        "int8_products",
        f"{LAYERS} blocks of ViT-B/32 in int8, one image: as exported, and by onnxruntime's quantize_static",
        {"as exported": lambda: ours.run(None, feed), "quantize_static": lambda: theirs.run(None, feed)},
    )


def bench_int8_limited_weights(compare, blocks):
    model, feed = blocks
    ours = _open(_int8(model, feed))
    with mock.patch.object(quantization, "integer_weights", _whole_range):
        theirs = _open(_int8(model, feed))
    compare(
        "int8_limited_weights",
        f"{LAYERS} blocks of ViT-B/32 in int8, one image: as exported, and with weights in -127..127",
        {"as exported": lambda: ours.run(None, feed), "-127..127": lambda: theirs.run(None, feed)},
    )


def _whole_range(weight, _covariance):
    """Weights as integers of which some processors cut sums off."""
    steps = np.abs(weight).max(axis=0) / 127
    return np.rint(weight / steps).astype(np.int8), steps


def bench_int8_flow_of_few_rows(compare):
    torch.manual_seed(0)
    field = VelocityField(DIM, BLOCKS).eval()
    with torch.no_grad():  # zero-initialised layers would make v = 0
        for parameter in field.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 / DIM**0.5 if parameter.ndim > 1 else 0.02))
    rows = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    classes = np.eye(100, DIM, dtype=np.float32)
    feed = {"image_embeds": rows / np.linalg.norm(rows, axis=1, keepdims=True)}
    model = _int8(flow_graph(build_plan(field, STEPS, 1 / STEPS).to_arrays(), classes, 100.0), feed)
    one, two = (
        create_row_session(model, "flow", device="cpu", num_threads=THREADS, small_products=small)
        for small in (True, False)
    )
    compare(
        "int8_flow_of_few_rows",
        f"an int8 flow of {BLOCKS} blocks and {STEPS} steps, {ROWS} rows: on one thread, and on {THREADS}",
        {"one thread": lambda: one.run(None, feed), "all threads": lambda: two.run(None, feed)},
    )

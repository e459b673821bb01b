"""From decoded pixels to a class, ViT-B-32 and a flow of ten steps: the bundle's graphs against torch.

Every side has the same weights (random ones: speed does not depend on them), the same blocks and the same steps. torch
runs what research code runs: open_clip's tower and the plain adaLN module, in eager mode.
"""

import contextlib
import statistics
import time
from unittest import mock

import numpy as np
import onnx
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fastfsl.encoders import load_encoder
from fastfsl.export import torch_export
from fastfsl.export.flow_graph import flow_graph
from fastfsl.export.parity import visual_parity
from fastfsl.export.quantization import calibrate, quantize
from fastfsl.export.visual_graph import pixels_to_embedding, visual_graph
from fastfsl.flow import VelocityField, build_plan, euler, normalize
from fastfsl.runtime.flow_executor import FlowExecutor
from fastfsl.runtime.head import Head
from fastfsl.runtime.image_encoder import ImageEncoder
from fastfsl.runtime.image_reader import ImageReader
from fastfsl.runtime.session import create_row_session, create_session

DIM, BLOCKS, STEPS, THREADS, CLASSES = 512, 12, 10, 2, 100
# Turns by batch, and calls of one side in a turn. The first call of a turn finds the weights of another side in the
# caches and is not counted: a service runs one model.
ROUNDS = {1: 10, 8: 4, 32: 4}
CALLS = {1: 6, 8: 3, 32: 2}
# Speed-ups that must hold, by batch: over torch in float32, and of int8 over torch in bf16 autocast.
AT_LEAST = {("fp32", 1): 2.3, ("fp32", 32): 1.2, ("int8", 1): 7.0, ("int8", 32): 4.5}
INT8_OVER_BF16 = 1.3


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """What turns pixels (n, 224, 224, 3) into logits, by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(open_clip.create_model("ViT-B-32").state_dict(), weights)
    encoder = load_encoder("ViT-B-32", str(weights))
    field = VelocityField(DIM, BLOCKS).eval()
    with torch.no_grad():  # zero-initialised layers would make v = 0
        for parameter in field.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 / DIM**0.5 if parameter.ndim > 1 else 0.02))
    classes = normalize(torch.randn(CLASSES, DIM))
    tower = pixels_to_embedding(encoder)

    # Weights that could be trained: autocast then keeps their bf16 copies for a whole call, not for one product.
    tower.requires_grad_()

    @torch.no_grad()
    def eager(pixels):
        moved = euler(lambda x, t: field(x, t.expand(len(x))), tower(torch.from_numpy(pixels)), STEPS, 1 / STEPS)
        return (100 * normalize(moved) @ classes.T).float().numpy()

    def autocast(pixels):
        with torch.autocast("cpu", torch.bfloat16):
            return eager(pixels)

    visual = visual_graph(encoder)
    assert visual_parity(encoder, visual)["min_cosine"] > 0.99999
    flow = flow_graph(build_plan(field, STEPS, 1 / STEPS).to_arrays(), classes.numpy(), 100.0)
    with mock.patch.multiple(torch_export, TRANSLATIONS={}, plain_attention=lambda _: contextlib.nullcontext()):
        example = {"images": torch.zeros(torch_export.TRACED_BATCH, 224, 224, 3, dtype=torch.uint8)}
        plain = torch_export.to_onnx(tower, example, "image_embeds", "tower")
    images = _images(16, seed=7)
    reader = ImageReader(encoder.preprocessing)

    def session(model: onnx.ModelProto, **options):
        return create_row_session(model.SerializeToString(), "benchmark", device="cpu", num_threads=THREADS, **options)

    def bundle(visual, flow, *, small_products=False):
        tower = ImageEncoder(session(visual), reader, DIM, None, num_threads=THREADS)
        head = Head(FlowExecutor(session(flow, small_products=small_products), ""), None)
        return lambda pixels: head.image_logits(tower, pixels)

    embeds = {"image_embeds": session(visual).run(None, {"images": images})[0]}
    reduced = [
        quantize(model, calibrate(model, [feed], lambda data: create_session(data, "calibration", device="cpu")))[0]
        for model, feed in ((visual, {"images": images}), (flow, embeds))
    ]
    yield {
        "torch fp32": eager,
        "torch bf16 autocast": autocast,
        "onnxruntime, as exported": bundle(plain, flow),
        "fp32": bundle(visual, flow),
        "int8": bundle(*reduced, small_products=True),
    }
    torch.set_num_threads(threads)


def _images(count, *, seed):
    """Noise on smooth images, every one with levels of its own."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, 224)[None, :, None, None] * np.linspace(0, 1, 224)[None, None, :, None]
    smooth = rng.uniform(0, 255, (count, 1, 1, 3)) * ramp + rng.uniform(0, 60, (count, 1, 1, 3))
    return np.clip(smooth + rng.normal(0, 30, (count, 224, 224, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("batch", ROUNDS)
def bench_image_to_class(benchmark, sides, record, batch):
    pixels = _images(batch, seed=batch)
    expected = _softmax(sides["torch fp32"](pixels))
    errors = {name: float(np.abs(_softmax(side(pixels)) - expected).max()) for name, side in sides.items()}
    assert errors["fp32"] <= 1e-4
    assert errors["onnxruntime, as exported"] <= 1e-4
    assert errors["int8"] <= 0.1

    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS[batch]):  # turn by turn, so that a busy moment of the machine meets all
        for name, side in sides.items():
            side(pixels)
            for _ in range(CALLS[batch] - 1):
                start = time.perf_counter()
                side(pixels)
                times[name].append(time.perf_counter() - start)
    median = {name: 1000 * statistics.median(values) for name, values in times.items()}
    speed_up = {name: median["torch fp32"] / value for name, value in median.items()}
    over_bf16 = median["torch bf16 autocast"] / median["int8"]

    benchmark.group = f"ViT-B-32 and flow, batch {batch}"
    benchmark.extra_info.update(speed_up=speed_up, provider="CPUExecutionProvider", threads=THREADS)
    benchmark.pedantic(sides["int8"], args=(pixels,), rounds=3)
    record(
        f"image_to_class_batch_{batch}",
        {
            "what": f"decoded pixels to class: ViT-B-32 and a flow of {BLOCKS} blocks and {STEPS} steps",
            "batch": batch,
            "threads": THREADS,
            "ms": {name: round(value, 2) for name, value in median.items()},
            "speed_up_over_torch_fp32": {name: round(value, 2) for name, value in speed_up.items()},
            "int8_over_bf16_autocast": round(over_bf16, 2),
            "max_probability_error": errors,
        },
    )
    for name in ("fp32", "int8"):
        assert speed_up[name] >= AT_LEAST.get((name, batch), 1.0), name
    if batch == 32:
        assert over_bf16 >= INT8_OVER_BF16


def _softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)

"""How the golden bundles were made: `python tests/golden/make.py NEW_FOLDER [NAME...]`.

They are bundles as the first version of the format has them, and must load for ever. So the committed ones are never
made again: when the format grows, another folder is added beside them. All weights are random; what the bundles must
compute (`expected.safetensors`) comes from torch, not from the runtime.

images      a plain encoder, a flow that is read at two steps, its plan, a read-out with two kernels and a threshold
blend       an encoder that blends two towers, and a read-out alone
compiled    features alone, and a flow without blocks with an index of compiled kernels, whose binaries are stand-ins
text        an encoder with its text tower and tokenizer, a flow and a linear read-out, so that classes can be added
"""

from __future__ import annotations

import gzip
import hashlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from open_clip.transformer import VisionTransformer
from safetensors.numpy import save_file
from torch import Tensor, nn

from fastfsl import bundle
from fastfsl.encoders import Encoder, load_encoder
from fastfsl.export.flow_graph import flow_graph
from fastfsl.export.textual_graph import textual_graph
from fastfsl.export.tokenizer_file import tokenizer_file
from fastfsl.export.visual_graph import blend_record, pixels_to_embedding, visual_graph
from fastfsl.flow import VelocityField, build_plan, euler_states, normalize, read_out
from fastfsl.images import Preprocessing, open_image, preprocess
from fastfsl.manifold import BlendedCLIP, TunedTower

SIZE, WIDTH, SCALE, STEP = 32, 24, 30.0, 0.1
NAMES = ("red kite", "Köter", "狗", "none of 'these'", "🦆")
STEPS, READ_STEPS = 3, (1, 3)
COMPILED_WIDTH = 128
TEMPLATES, CONTEXT, MERGES = ("a photo of a {}.", "{}"), 12, 150
# The class that is added to the bundle `text`, and what it is described with.
ADDED, PROMPTS = "blue_jay", ("a blue jay on a branch", "it&#39;s \u00c3\u00a9")


class _CLIP(nn.Module):
    """As much of a CLIP model as image features need."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features


def _perturb(module: nn.Module) -> None:
    """No layer may keep the zeros or ones that it begins with."""
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.data += scale * torch.randn_like(parameter)


def _encoder(*, blend: bool) -> Encoder:
    layers = 6 if blend else 2  # a tuned tower shares half of its blocks
    clip = _CLIP(VisionTransformer(SIZE, 8, width=16, layers=layers, heads=2, mlp_ratio=2.0, output_dim=WIDTH)).eval()
    _perturb(clip)
    model: nn.Module = clip
    if blend:
        tower = TunedTower(clip.visual)
        _perturb(tower)
        model = BlendedCLIP(clip, tower, 0.3).eval()
    preprocessing = Preprocessing(image_size=(SIZE, SIZE), mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.25))
    return replace(
        load_encoder("tiny-clip"),
        model=model,
        preprocessing=preprocessing,
        embed_dim=WIDTH,
        normalized=not blend,
        backbone="golden",
        digest="0" * 64,
    )


def _images() -> dict[str, np.ndarray[Any, Any]]:
    """Smooth pictures of odd sizes: what two versions of Pillow make of noise is no part of the format."""
    pictures = {}
    for index, (height, width) in enumerate(((32, 32), (41, 57), (90, 33))):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / (4 + band) + index) * np.cos(y / (7 - band)) for band in range(3)]
        pictures[f"image{index}"] = (127.5 + 120 * np.stack(waves, axis=2)).astype(np.uint8)
    return pictures


def _unit(*shape: int) -> Tensor:
    return normalize(torch.randn(shape))


def _readout(flow_weight: float) -> bundle.Readout:
    def noise(*shape: int) -> np.ndarray[Any, Any]:
        return torch.randn(shape).numpy()

    kernels = tuple(
        bundle.KernelArrays(_unit(n, WIDTH).numpy(), noise(n, len(NAMES)), beta) for n, beta in ((7, 5.5), (2, 1.0))
    )
    return bundle.Readout(
        flow_weight, noise(len(NAMES), WIDTH), noise(len(NAMES)), kernels, temperature=1.5, threshold=0.25
    )


def _read(readout: bundle.Readout, embeds: Tensor, flow_logits: Tensor | None) -> Tensor:
    """The equation of a read-out, in torch."""
    x = embeds.double()
    logits = x @ torch.from_numpy(readout.linear_weight).double().T + torch.from_numpy(readout.linear_bias)
    for kernel in readout.kernels:
        affinity = torch.exp(-kernel.beta * (1 - x @ torch.from_numpy(kernel.keys).double().T))
        logits += affinity @ torch.from_numpy(kernel.values).double()
    if flow_logits is not None:
        logits += readout.flow_weight * flow_logits
    return logits / readout.temperature


def _fields(width: int, encoder: Encoder | None, **others: Any) -> dict[str, Any]:
    described = None if encoder is None else {"backbone": "golden", "pretrained": None, "digest": encoder.digest}
    return {
        "method": "auto",
        "class_names": NAMES,
        "embed_dim": width,
        "num_steps": 0,
        "step_size": None,
        "read_steps": [],
        "precision": "fp32",
        "logit_scale": SCALE,
        "preprocessing": None if encoder is None else encoder.preprocessing.to_dict(),
        "encoder": described,
        "blend": None if encoder is None else blend_record(encoder),
        "kernels": None,
        "versions": {"fastfsl": "0.1.0", "torch": str(torch.__version__)},
        "metrics": {"held_out_support": {"accuracy": 0.875, "num_folds": 4}},
        "parity": {"logits": {"max_probability_error": 1e-6}},
        "training": {"num_shots": 4, "seed": 0, "support_digests": ["1" * 64, "2" * 64]},
        "created": "2026-01-02T03:04:05+00:00",
        **others,
    }


def _flow(width: int, steps: int, blocks: int) -> tuple[VelocityField, bundle.PlanArrays]:
    field = VelocityField(width, blocks)
    _perturb(field)
    return field, build_plan(field, steps, STEP).to_arrays()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _embed(encoder: Encoder) -> Tensor:
    pixels = np.stack([preprocess(open_image(image), encoder.preprocessing) for image in _images().values()])
    embeds: Tensor = pixels_to_embedding(encoder)(torch.from_numpy(pixels))
    return embeds


def make_images(folder: Path) -> dict[str, Tensor]:
    encoder, classes, readout = _encoder(blend=False), _unit(len(NAMES), WIDTH), _readout(0.7)
    field, plan = _flow(WIDTH, STEPS, blocks=1)
    embeds = _embed(encoder)
    states = list(euler_states(field, embeds, STEPS, STEP))
    logits = _read(readout, embeds, read_out([states[step] for step in READ_STEPS], classes, SCALE))
    with bundle.staging_folder(folder) as staging:
        _write(staging / bundle.VISUAL_GRAPH, visual_graph(encoder).SerializeToString())
        graph = flow_graph(plan, classes.numpy(), SCALE, read_steps=READ_STEPS)
        _write(staging / bundle.FLOW_GRAPH, graph.SerializeToString())
        bundle.write_plan(staging / bundle.FLOW_PLAN, plan)
        bundle.write_readout(staging / bundle.READOUT, readout)
        _write(staging / "README.md", b"# A golden bundle\n")
        flow = {"num_steps": STEPS, "step_size": STEP, "read_steps": list(READ_STEPS)}
        bundle.seal_bundle(staging, _fields(WIDTH, encoder, **flow))
    return {"embeds": embeds, "transported": normalize(states[-1]), "probabilities": logits.softmax(dim=1)}


def make_blend(folder: Path) -> dict[str, Tensor]:
    encoder, readout = _encoder(blend=True), _readout(0.0)
    embeds = _embed(encoder)
    with bundle.staging_folder(folder) as staging:
        _write(staging / bundle.VISUAL_GRAPH, visual_graph(encoder).SerializeToString())
        bundle.write_readout(staging / bundle.READOUT, readout)
        bundle.seal_bundle(staging, _fields(WIDTH, encoder, method="mps+auto"))
    return {"embeds": embeds, "probabilities": _read(readout, embeds, None).softmax(dim=1)}


def make_compiled(folder: Path) -> dict[str, Tensor]:
    features, classes = torch.randn(4, COMPILED_WIDTH), _unit(len(NAMES), COMPILED_WIDTH)
    field, plan = _flow(COMPILED_WIDTH, 1, blocks=0)
    state = list(euler_states(field, normalize(features), 1, STEP))[-1]
    described = {"architectures": ["sm_90"], "dtype": "fp16"}
    with bundle.staging_folder(folder) as staging:
        _write(staging / bundle.FLOW_GRAPH, flow_graph(plan, classes.numpy(), SCALE).SerializeToString())
        weights = bundle.FlowWeights.from_plan(plan, "fp16", classes.numpy(), SCALE)
        bundle.write_flow_weights(staging / bundle.FLOW_KERNELS_WEIGHTS, weights)
        targets = {name: _target(staging, name, kind) for name, kind in (("sm_90", "cubin"), ("ptx", "ptx"))}
        versions = {"triton": "3.6.0", "ptxas": "12.8"}
        kernels = bundle.KernelSet(COMPILED_WIDTH, "fp16", versions, (32, None), targets)
        bundle.write_flow_kernels(staging / bundle.FLOW_KERNELS_INDEX, kernels)
        flow = {"method": "fma", "num_steps": 1, "step_size": STEP, "kernels": described}
        bundle.seal_bundle(staging, _fields(COMPILED_WIDTH, None, **flow))
    logits = read_out([state], classes, SCALE)
    return {"features": features, "transported": normalize(state), "probabilities": logits.softmax(dim=1)}


def _target(staging: Path, name: str, kind: Any) -> bundle.KernelTarget:
    tile, kernels = bundle.KernelTile(32, 64, 64, 4, 2), []
    for row_class in (32, None):
        for kernel in ("enter", "first", "second", "carry", "exit", bundle.LOGITS):
            arguments = bundle.kernel_arguments(kernel)
            if arguments is None:
                raise SystemExit(f"{kernel} is no kernel of a flow any more: add it to another golden folder")
            data, file = f"stand-in {kernel} {row_class}\n".encode(), f"{name}/{kernel}_{row_class or 'any'}.{kind}"
            _write(staging / bundle.FLOW_KERNELS_FOLDER / file, data)
            measured = None if kind == "ptx" else 0
            kernels.append(
                bundle.CompiledKernel(
                    kernel, row_class, file, f"{kernel}_kernel", hashlib.sha256(data).hexdigest(), 49152, 128, tile,
                    arguments, None if measured is None else 64, measured, cooperative=False,
                )
            )  # fmt: skip
    return bundle.KernelTarget(name, 90, kind, tuple(kernels))


def _text_encoder() -> Encoder:
    with gzip.open(default_bpe()) as file, tempfile.NamedTemporaryFile(suffix=".gz") as few:
        lines = file.read().decode().split("\n")[: 1 + MERGES]
        Path(few.name).write_bytes(gzip.compress("\n".join(lines).encode()))
        tokenizer = SimpleTokenizer(bpe_path=few.name, context_length=CONTEXT)
    vision = CLIPVisionCfg(layers=2, width=16, head_width=8, mlp_ratio=2.0, patch_size=8, image_size=SIZE)
    text = CLIPTextCfg(
        context_length=CONTEXT, vocab_size=tokenizer.vocab_size, width=16, heads=2, layers=2, mlp_ratio=2.0
    )
    clip = CLIP(WIDTH, vision, text).eval()
    _perturb(clip)
    return replace(_encoder(blend=False), model=clip, tokenizer=tokenizer)


def _class_text(encoder: Encoder, prompts: list[str]) -> Tensor:
    model: Any = encoder.model
    return normalize(normalize(model.encode_text(encoder.tokenizer(prompts))).mean(dim=0))


def make_text(folder: Path) -> dict[str, Tensor]:
    encoder, shift = _text_encoder(), 0.2 * torch.randn(WIDTH)
    names = [*NAMES, ADDED]
    texts = torch.stack(
        [_class_text(encoder, [template.replace("{}", name) for template in TEMPLATES]) for name in NAMES]
    )
    texts = torch.cat([texts, _class_text(encoder, list(PROMPTS))[None]])
    classes, weight = normalize(texts + shift), texts * SCALE
    field, plan = _flow(WIDTH, STEPS, blocks=1)
    readout = bundle.Readout(0.5, weight[:-1].numpy(), np.zeros(len(NAMES), np.float32), (), 1.5, 0.25)
    written, clip = tokenizer_file(encoder.tokenizer), cast("CLIP", encoder.model)
    text: dict[str, Any] = {
        "clean": written.clean,
        "strip_id": written.strip_id,
        "context_length": CONTEXT,
        "linear_scale": SCALE,
    }
    with bundle.staging_folder(folder) as staging:
        _write(staging / bundle.VISUAL_GRAPH, visual_graph(encoder).SerializeToString())
        _write(staging / bundle.FLOW_GRAPH, flow_graph(plan, classes[:-1].numpy(), SCALE).SerializeToString())
        bundle.write_readout(staging / bundle.READOUT, readout)
        _write(staging / bundle.TEXT_GRAPH, textual_graph(encoder).SerializeToString())
        _write(staging / bundle.TOKENIZER, written.data)
        bundle.write_class_places(
            staging / bundle.TEXT_CLASSES, bundle.ClassPlaces(classes[:-1].numpy(), shift.numpy())
        )
        text |= {"vocab_size": clip.vocab_size, "templates": list(TEMPLATES)}
        flow = {"num_steps": STEPS, "step_size": STEP, "text": text}
        bundle.seal_bundle(staging, _fields(WIDTH, encoder, **flow))
    embeds = _embed(encoder)
    state = list(euler_states(field, embeds, STEPS, STEP))[-1]
    found = {"embeds": embeds, "transported": normalize(state)}
    for key, count in (("probabilities", len(NAMES)), ("added", len(names))):
        wide = replace(readout, linear_weight=weight[:count].numpy(), linear_bias=np.zeros(count, np.float32))
        found[key] = _read(wide, embeds, read_out([state], classes[:count], SCALE)).softmax(dim=1)
    return found


MAKERS = {"images": make_images, "blend": make_blend, "compiled": make_compiled, "text": make_text}


def main(folder: Path, *names: str) -> None:
    torch.manual_seed(0)
    expected: dict[str, np.ndarray[Any, Any]] = dict(_images())
    with torch.no_grad():
        for name in names or MAKERS:
            found = MAKERS[name](folder / name)
            expected |= {f"{name}.{key}": np.ascontiguousarray(value.float()) for key, value in found.items()}
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

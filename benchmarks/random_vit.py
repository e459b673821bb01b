"""A bundle of an open_clip model with random weights: as fast as one with trained weights, and nothing to download."""

from pathlib import Path

import numpy as np
import onnx
import open_clip
import torch

from benchmarks.photographs import draw
from fastfsl import bundle
from fastfsl.encoders import Encoder
from fastfsl.export.quantization import calibrate, quantize
from fastfsl.export.visual_graph import visual_graph
from fastfsl.images import Preprocessing
from fastfsl.runtime.session import create_session

CLASSES = 10


def random_encoder(name: str = "ViT-B-32") -> Encoder:
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(name, force_image_size=224)
    model.eval().requires_grad_(False)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return Encoder(
        model=model,
        tokenizer=open_clip.get_tokenizer(name),
        preprocessing=Preprocessing(image_size=(224, 224), mean=mean, std=std),
        transform=transform,
        backbone=name,
        pretrained=None,
        digest="0" * 64,
        embed_dim=model.visual.output_dim,
        logit_scale=100.0,
        device=torch.device("cpu"),
    )


def write_bundle(target: Path, encoder: Encoder, precision: str = "int8") -> Path:
    """A bundle of the encoder and a linear head."""
    head = np.random.default_rng(0).normal(size=(CLASSES, encoder.embed_dim)).astype(np.float32)
    manifest = {
        "method": "linear",
        "class_names": [f"class {index}" for index in range(CLASSES)],
        "embed_dim": encoder.embed_dim,
        "num_steps": 0,
        "step_size": None,
        "precision": precision,
        "logit_scale": encoder.logit_scale,
        "preprocessing": encoder.preprocessing.to_dict(),
        "encoder": {"backbone": encoder.backbone, "pretrained": None, "digest": encoder.digest},
        "versions": {},
        "metrics": {},
        "parity": {},
        "training": {},
    }
    with bundle.staging_folder(target) as staging:
        graph = staging / bundle.VISUAL_GRAPH
        graph.parent.mkdir()
        graph.write_bytes((_int8(encoder) if precision == "int8" else visual_graph(encoder)).SerializeToString())
        bundle.write_readout(staging / bundle.READOUT, bundle.Readout(0.0, head, np.zeros(CLASSES, np.float32)))
        bundle.seal_bundle(staging, manifest)
    return target


def _int8(encoder: Encoder) -> onnx.ModelProto:
    """The image tower in int8, its ranges from a few drawn pictures."""
    rng = np.random.default_rng(1)
    height, width = encoder.preprocessing.image_size
    pictures = np.stack([np.asarray(draw(rng, width, height)) for _ in range(16)])
    model = visual_graph(encoder)
    ranges = calibrate(model, [{"images": pictures}], lambda data: create_session(data, "calibration", device="cpu"))
    return quantize(model, ranges)[0]

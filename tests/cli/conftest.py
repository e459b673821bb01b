"""Bundles to run commands on, and a way to run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from fastfsl import bundle
from fastfsl.bundle import PlanArrays
from fastfsl.cli import app
from fastfsl.export.flow_graph import flow_graph
from fastfsl.images import Preprocessing

NAMES, SIZE, WIDTH = ("ant", "bee", "cow"), 8, 5


@pytest.fixture(scope="session")
def run_fastfsl() -> Callable[..., Any]:
    """Runs a command; the result holds exit_code, stdout, stderr and, with --json, document."""

    def run(*arguments: object) -> Any:
        result: Any = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if "--json" in arguments and result.exit_code == 0:
            result.document = json.loads(result.stdout)
        return result

    return run


@pytest.fixture
def fastfsl(run_fastfsl: Callable[..., Any]) -> Callable[..., Any]:
    """The same under the program's own name."""
    return run_fastfsl


def _visual() -> bytes:
    projection = np.random.default_rng(1).normal(size=(SIZE * SIZE * 3, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "projection"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["image_embeds"], axis=-1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(projection, "projection")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _plan(num_steps: int, num_blocks: int = 1) -> PlanArrays:
    rng = np.random.default_rng(2)

    def noise(*shape: int) -> np.ndarray:
        return (0.1 * rng.normal(size=shape)).astype(np.float32)

    d, b = WIDTH, num_blocks
    return PlanArrays(
        0.1, noise(d, d), noise(d), noise(b, d, d), noise(b, d), noise(b, d, d), noise(b, d), noise(d, d), noise(d),
        noise(d, d), noise(d), noise(num_steps, b, 3, d), noise(num_steps, 2, d),
    )  # fmt: skip


@pytest.fixture(scope="session")
def write_bundle() -> Callable[..., Path]:
    """Writes a bundle of random weights, with a flow if there is no read-out; options replace the manifest's fields."""

    def write(
        target: Path, *, with_encoder: bool = True, readout: bundle.Readout | None = None, **fields: object
    ) -> Path:
        preprocessing = Preprocessing(image_size=(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        manifest = {
            "method": "fma",
            "class_names": NAMES,
            "embed_dim": WIDTH,
            "num_steps": 2 if readout is None else 0,
            "step_size": 0.1 if readout is None else None,
            "precision": "fp32",
            "logit_scale": 30.0,
            "preprocessing": preprocessing.to_dict() if with_encoder else None,
            "encoder": {"backbone": "tiny", "pretrained": None, "digest": "0" * 64} if with_encoder else None,
            "versions": {"torch": "2.15.0"},
            "metrics": {"held_out_support": {"accuracy": 0.875, "num_folds": 4}},
            "parity": {"flow": {"max_abs_error": 1e-6}},
            "training": {"num_shots": 16, "seed": 0, "support_digests": ["1" * 64] * 48},
            **fields,
        }
        classes = np.eye(WIDTH, dtype=np.float32)[: len(NAMES)]
        with bundle.staging_folder(target) as staging:
            if readout is not None:
                bundle.write_readout(staging / bundle.READOUT, readout)
            else:
                bundle.write_plan(staging / bundle.FLOW_PLAN, _plan(2))
                (staging / bundle.FLOW_GRAPH).write_bytes(flow_graph(_plan(2), classes, 30.0).SerializeToString())
            if with_encoder:
                (staging / "visual").mkdir()
                (staging / "visual" / "model.onnx").write_bytes(_visual())
            bundle.seal_bundle(staging, manifest)
        return target

    return write


@pytest.fixture(scope="session")
def image_bundle(write_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an encoder; not to be altered."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "images")


@pytest.fixture(scope="session")
def make_readout() -> Callable[..., bundle.Readout]:
    """A read-out of random weights without a flow: linear part, two kernels."""

    def make(**scalars: Any) -> bundle.Readout:
        rng = np.random.default_rng(4)

        def noise(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        kernels = tuple(
            bundle.KernelArrays(noise(n, WIDTH), noise(n, len(NAMES)), beta) for n, beta in ((7, 5.5), (2, 1))
        )
        return bundle.Readout(0.0, noise(len(NAMES), WIDTH), noise(len(NAMES)), kernels, **scalars)

    return make


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: 2.png, 10.jpg, nested/3.webp, and three files that are not to be found."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "nested").mkdir()
    (folder / ".cache").mkdir()
    rng = np.random.default_rng(0)
    for name in ("2.png", "10.jpg", "nested/3.webp", ".hidden.png", ".cache/4.png"):
        Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder

"""Small bundles made with onnx.helper, and what they must compute, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fastfsl import bundle
from fastfsl.images import Preprocessing, open_image, preprocess
from fastfsl.runtime import Classifier

CLASS_NAMES = ("apple", "bear", "cat", "dog")
SIZE, WIDTH, SCALE = (8, 10), 6, 20.0
PREPROCESSING = Preprocessing(image_size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def _model(nodes, inputs, outputs, **initializers) -> Any:
    def values(described):
        return [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in described]

    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in initializers.items()]
    graph = helper.make_graph(nodes, "tiny", values(inputs), values(outputs), tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def visual_model(projection: np.ndarray, size=SIZE, batch="batch") -> Any:
    """uint8 images -> flatten -> MatMul -> L2-normalise."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "projection"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["image_embeds"], axis=-1, p=2),
    ]
    return _model(
        nodes,
        [("images", TensorProto.UINT8, [batch, *size, 3])],
        [("image_embeds", TensorProto.FLOAT, [batch, projection.shape[1]])],
        projection=projection,
    )


def blend_model(tuned: np.ndarray, frozen: np.ndarray, alpha=0.3, *, normalized=False) -> Any:
    """uint8 images -> flatten -> two projections, each L2-normalised -> their blend by an overridable weight."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "tuned"], ["tuned_projected"]),
        helper.make_node("MatMul", ["flat", "frozen"], ["frozen_projected"]),
        helper.make_node("LpNormalization", ["tuned_projected"], ["tuned_unit"], axis=-1, p=2),
        helper.make_node("LpNormalization", ["frozen_projected"], ["frozen_unit"], axis=-1, p=2),
        helper.make_node("Sub", ["tuned_unit", "frozen_unit"], ["difference"]),
        helper.make_node("Mul", ["difference", "alpha"], ["weighed"]),
        helper.make_node("Add", ["frozen_unit", "weighed"], ["blend"]),
        helper.make_node("LpNormalization", ["blend"], ["image_embeds"], axis=-1, p=2)
        if normalized
        else helper.make_node("Identity", ["blend"], ["image_embeds"]),
    ]
    return _model(
        nodes,
        [("images", TensorProto.UINT8, ["batch", *SIZE, 3]), ("alpha", TensorProto.FLOAT, [])],
        [("image_embeds", TensorProto.FLOAT, ["batch", WIDTH])],
        tuned=tuned,
        frozen=frozen,
        alpha=np.float32(alpha),
    )


def flow_model(class_embeddings: np.ndarray, rotation: np.ndarray, scale=SCALE) -> Any:
    """Embeddings -> normalise -> rotate -> cosine with classes that a caller may override."""
    width = rotation.shape[0]
    nodes = [
        helper.make_node("LpNormalization", ["image_embeds"], ["unit"], axis=-1, p=2),
        helper.make_node("MatMul", ["unit", "rotation"], ["features"]),
        helper.make_node("Transpose", ["class_embeddings"], ["columns"]),
        helper.make_node("MatMul", ["features", "columns"], ["cosines"]),
        helper.make_node("Mul", ["cosines", "scale"], ["logits"]),
    ]
    return _model(
        nodes,
        [("image_embeds", TensorProto.FLOAT, ["batch", width]), ("class_embeddings", TensorProto.FLOAT, ["C", width])],
        [("features", TensorProto.FLOAT, ["batch", width]), ("logits", TensorProto.FLOAT, ["batch", "C"])],
        class_embeddings=class_embeddings,
        rotation=rotation,
        scale=np.float32(scale),
    )


def _unit(rows: np.ndarray) -> Any:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Reference:
    """The same computation in numpy, float64."""

    projection: np.ndarray
    rotation: np.ndarray
    class_embeddings: np.ndarray

    def embed(self, images) -> Any:
        pixels = np.stack([preprocess(open_image(image), PREPROCESSING) for image in images])
        return _unit(pixels.reshape(len(pixels), -1).astype(np.float64) @ self.projection)

    def transport(self, features) -> Any:
        return _unit(np.asarray(features, np.float64)) @ self.rotation

    def probabilities(self, features) -> Any:
        exponentials = np.exp(SCALE * self.transport(features) @ self.class_embeddings.T)
        return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.fixture(scope="session")
def reference() -> Reference:
    rng = np.random.default_rng(7)
    return Reference(
        projection=rng.normal(size=(SIZE[0] * SIZE[1] * 3, WIDTH)).astype(np.float32),
        rotation=np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32),
        class_embeddings=_unit(rng.normal(size=(len(CLASS_NAMES), WIDTH))).astype(np.float32),
    )


@pytest.fixture(scope="session")
def write(reference) -> Callable[..., Path]:
    """Writes a bundle; ``visual`` and ``flow`` replace the graphs' bytes, other options the manifest's fields.

    There is no read-out unless one is given; ``add`` may write more files into the folder.
    """

    def write_bundle(
        target: Path,
        *,
        visual=None,
        flow=None,
        readout=None,
        with_encoder=True,
        with_flow=True,
        add: Callable[[Path], None] | None = None,
        **fields,
    ) -> Path:
        if with_encoder and visual is None:
            visual = visual_model(reference.projection).SerializeToString()
        if with_flow and flow is None:
            flow = flow_model(reference.class_embeddings, reference.rotation).SerializeToString()
        manifest = {
            "method": "fma",
            "class_names": CLASS_NAMES,
            "embed_dim": WIDTH,
            "num_steps": 3 if with_flow else 0,
            "step_size": 0.1 if with_flow else None,
            "precision": "fp32",
            "logit_scale": SCALE,
            "preprocessing": PREPROCESSING.to_dict() if with_encoder else None,
            "encoder": {"backbone": "tiny", "pretrained": None, "digest": "0" * 64} if with_encoder else None,
            "versions": {},
            "metrics": {},
            "parity": {},
            "training": {},
        }
        with bundle.staging_folder(target) as staging:
            for name, data in (("visual/model.onnx", visual), ("flow/model.onnx", flow), ("README.md", b"# tiny")):
                if data is not None:
                    (staging / name).parent.mkdir(exist_ok=True)
                    (staging / name).write_bytes(data)
            if readout is not None:
                bundle.write_readout(staging / bundle.READOUT, readout)
            if add is not None:
                add(staging)
            bundle.seal_bundle(staging, {**manifest, **fields})
        return target

    return write_bundle


@pytest.fixture(scope="session")
def bundle_dir(write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an image encoder; not to be altered."""
    return write(tmp_path_factory.mktemp("bundles") / "images")


@pytest.fixture(scope="session")
def classifier(bundle_dir) -> Classifier:
    return Classifier.load(bundle_dir, device="cpu", num_threads=1, max_batch=4)


@pytest.fixture(scope="session")
def feature_classifier(write, tmp_path_factory) -> Classifier:
    """Of a bundle that was trained on features."""
    path = write(tmp_path_factory.mktemp("bundles") / "features", with_encoder=False)
    return Classifier.load(path, device="cpu", num_threads=1, max_batch=4)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> list[Path]:
    """Nine images of different sizes: two full batches of four, and one left over."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    paths = []
    for index in range(9):
        paths.append(folder / f"{index}.png")
        pixels = rng.integers(0, 256, (10 + index, 30 - index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def make_visual():
    """``visual_model``, for graphs that are not what the manifest says."""
    return visual_model


@pytest.fixture(scope="session")
def make_flow():
    """``flow_model``, likewise."""
    return flow_model


@pytest.fixture(scope="session")
def make_blend():
    """``blend_model``."""
    return blend_model


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    """What the bundles' encoder wants done to an image."""
    return PREPROCESSING

"""Bundles whose flow or manifest a stranger wrote: a golden one with something exchanged, and hashes that fit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fastfsl import bundle

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
WIDTH, CLASSES = 24, 5

node = helper.make_node


def flow(nodes: Sequence[NodeProto] = (), /, **constants: Any) -> bytes:
    """A flow that is none, with more nodes; the sum of what they call `made` goes into the logits, times 0.

    `image_embeds`, (n, 24) float32, and `zero`, a float32 scalar that depends on it, may be read.
    """
    weights = np.ones((WIDTH, CLASSES), np.float32)
    tensors = {"weights": weights, "nothing": np.float32(0), **constants}
    ending = [node("Identity", ["plain"], ["logits"])]
    if nodes:
        ending = [
            node("Cast", ["made"], ["made_float"], to=TensorProto.FLOAT),
            node("ReduceMax", ["made_float"], ["greatest"], keepdims=0),
            node("Mul", ["greatest", "nothing"], ["added"]),
            node("Add", ["plain", "added"], ["logits"]),
        ]
    every = [
        node("ReduceSum", ["image_embeds"], ["total"], keepdims=0),
        node("Mul", ["total", "nothing"], ["zero"]),
        node("LpNormalization", ["image_embeds"], ["features"], axis=-1, p=2),
        node("MatMul", ["features", "weights"], ["plain"]),
        *nodes,
        *ending,
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("image_embeds", WIDTH), ("features", WIDTH), ("logits", CLASSES))
    ]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = helper.make_graph(every, "forged", values[:1], values[1:], initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def forged(target: Path, base: str = "images", *, without: Sequence[str] = (), files: Any = None, **lies: Any) -> Path:
    """A golden bundle with other files, fewer files, or another manifest."""
    shutil.copytree(GOLDEN / base, target)
    manifest = json.loads((target / bundle.MANIFEST_NAME).read_text(encoding="utf-8"))
    for name in without:
        (target / name).unlink()
        del manifest["files"][name]
    for name, data in (files or {}).items():
        (target / name).write_bytes(data)
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (target / bundle.MANIFEST_NAME).write_text(json.dumps({**manifest, **lies}), encoding="utf-8")
    return target

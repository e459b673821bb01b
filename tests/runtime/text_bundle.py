"""The text part of small bundles: a tower whose embedding is the mean of its tokens' rows, over five words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fastfsl.bundle import TEXT_CLASSES, TEXT_GRAPH, TOKENIZER, ClassPlaces, write_class_places

WORDS = ("[pad]", "red", "kite", "photo", "?")
LENGTH, VOCABULARY = 4, len(WORDS)
TEMPLATES = ("a photo {}", "{}")
TEXT: dict[str, Any] = {
    "context_length": LENGTH,
    "vocab_size": VOCABULARY,
    "clean": "lower",
    "strip_id": None,
    "templates": list(TEMPLATES),
    "linear_scale": 0,
}


def tokenizer_json(**changes: Any) -> bytes:
    """A tokenizer of whole words."""
    padding = {"strategy": {"Fixed": LENGTH}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    file: dict[str, Any] = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": LENGTH, "strategy": "LongestFirst", "stride": 0},
        "padding": {**padding, "pad_type_id": 0, "pad_token": "[pad]"},
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "?"},
    }
    return json.dumps({**file, **changes}).encode()


def table(dim: int) -> np.ndarray:
    """The row of each word, (VOCABULARY, dim)."""
    return np.random.default_rng(13).normal(size=(VOCABULARY, dim)).astype(np.float32)


def tower(dim: int) -> bytes:
    """token_ids -> rows -> mean -> L2-normalise."""
    nodes = [
        helper.make_node("Gather", ["table", "token_ids"], ["rows"]),
        helper.make_node("ReduceMean", ["rows", "axis"], ["mean"], keepdims=0),
        helper.make_node("LpNormalization", ["mean"], ["text_embeds"], axis=-1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info("token_ids", TensorProto.INT64, ["batch", LENGTH])],
        [helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, ["batch", dim])],
        [numpy_helper.from_array(table(dim), "table"), numpy_helper.from_array(np.array([1]), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def embedding(dim: int, *prompts: str) -> np.ndarray:
    """What the text part makes of prompts, which hold the tower's own words alone."""
    rows = []
    for prompt in prompts:
        ids = [WORDS.index(word) if word in WORDS else 4 for word in prompt.lower().split()][:LENGTH]
        rows.append(unit(table(dim)[ids + [0] * (LENGTH - len(ids))].mean(axis=0)))
    return unit(np.mean(rows, axis=0))


def unit(rows: np.ndarray) -> Any:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def with_text(
    write: Callable[..., Path],
    dim: int,
    classes: np.ndarray | None,
    shift: np.ndarray | None = None,
    *,
    tokenizer: bytes | None = None,
    **changes: Any,
) -> Callable[..., Path]:
    """`write`, for bundles that read texts.

    Args:
        write: the fixture.
        dim: of the embeddings.
        classes: where the flow's classes lie, (C K, d); None: there is no flow.
        shift: the target shift; None: zeros.
        tokenizer: another file.
        **changes: to the manifest's `text`.
    """

    def write_bundle(target: Path, *, add: Callable[[Path], None] | None = None, **fields: Any) -> Path:
        def add_all(staging: Path) -> None:
            if add is not None:
                add(staging)
            (staging / TEXT_GRAPH).parent.mkdir()
            (staging / TEXT_GRAPH).write_bytes(tower(dim))
            (staging / TOKENIZER).write_bytes(tokenizer_json() if tokenizer is None else tokenizer)
            if classes is not None:
                zeros = np.zeros(dim, np.float32)
                write_class_places(staging / TEXT_CLASSES, ClassPlaces(classes, zeros if shift is None else shift))

        return write(target, add=add_all, **{"text": {**TEXT, **changes}, **fields})

    return write_bundle

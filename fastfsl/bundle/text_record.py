"""What a manifest says of a bundle that reads texts, so that classes can be added to it by name."""

from __future__ import annotations

import os
from typing import Any

from fastfsl.bundle.tokenizer_file import MAX_TOKENIZER_BYTES
from fastfsl.bundle.untrusted import AGAIN, is_positive
from fastfsl.errors import BundleError

# The text tower, its tokenizer and, beside a flow, where its classes lie.
TEXT_GRAPH = "textual/model.onnx"
TOKENIZER = "textual/tokenizer.json"
TEXT_CLASSES = "textual/classes.safetensors"
TEXT_CLEANING = ("lower", "whitespace", "canonicalize")

# The longest context in open_clip is 77 ids, its largest vocabulary 901 629; ImageNet has 80 short templates.
MAX_CONTEXT, MAX_VOCABULARY, MAX_TEMPLATES, MAX_TEMPLATE = 4096, 2**21, 4096, 1024

_KEYS = {"context_length", "vocab_size", "clean", "strip_id", "templates", "linear_scale"}


def is_text(value: object) -> bool:
    """Whether a manifest's ``text`` is null, or says all that reading texts takes."""
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != _KEYS:
        return False
    strip_id, templates = value["strip_id"], value["templates"]
    return (
        _is_count(value["context_length"], MAX_CONTEXT)
        and _is_count(value["vocab_size"], MAX_VOCABULARY)
        and isinstance(value["clean"], str)
        and value["clean"] in TEXT_CLEANING
        and (strip_id is None or strip_id == 0 or _is_count(strip_id, MAX_VOCABULARY))
        and isinstance(templates, list)
        and 0 < len(templates) <= MAX_TEMPLATES
        and all(isinstance(one, str) and len(one) <= MAX_TEMPLATE and one.count("{}") == 1 for one in templates)
        and (is_positive(value["linear_scale"]) or _is_zero(value["linear_scale"]))
    )


def check_text_files(values: dict[str, Any], path: str | os.PathLike[str], *, with_flow: bool) -> None:
    """Refuse a manifest whose ``text``, encoder and listed files do not go together."""
    found = {name for name in values["files"] if name.startswith("textual/")}
    expected: set[str] = set()
    if values["text"] is not None:
        expected = {TEXT_GRAPH, TOKENIZER} | ({TEXT_CLASSES} if with_flow else set())
        if values["encoder"] is None:
            raise BundleError(f"{path}: 'text' goes with an encoder, and 'encoder' is null; {AGAIN}")
    size = values["files"].get(TOKENIZER, {"size": 0})["size"]
    if size > MAX_TOKENIZER_BYTES:
        raise BundleError(f"{path}: {TOKENIZER} has {size} bytes, more than the {MAX_TOKENIZER_BYTES} allowed; {AGAIN}")
    if found != expected:
        raise BundleError(
            f"{path}: 'text' and the flow ask for {sorted(expected)} in textual/, got {sorted(found)}; {AGAIN}"
        )


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_zero(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0

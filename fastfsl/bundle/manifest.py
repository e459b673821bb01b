"""The manifest: what a bundle holds and how it was made, every value checked by hand."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

from fastfsl.bundle.links import resolve
from fastfsl.bundle.paths import MANIFEST_NAME, check_paths
from fastfsl.bundle.text_record import check_text_files, is_text
from fastfsl.bundle.untrusted import AGAIN, MAX_FILE_BYTES, NEWER, is_fraction, is_positive, read_regular, strict_json
from fastfsl.errors import BundleError, ConfigError

FORMAT_VERSION = 1
PRECISIONS = ("fp32", "fp16", "int8")

# Where the parts of a bundle lie. There is always a flow, a read-out or both; a plan only beside a flow.
VISUAL_GRAPH = "visual/model.onnx"
FLOW_GRAPH = "flow/model.onnx"
FLOW_PLAN = "flow/plan.safetensors"
READOUT = "heads/readout.safetensors"
# Compiled kernels lie beside a flow, if at all: an index, what they compute with, and a folder for each target.
FLOW_KERNELS_FOLDER = "flow/kernels"
FLOW_KERNELS_INDEX = f"{FLOW_KERNELS_FOLDER}/kernels.json"
FLOW_KERNELS_WEIGHTS = f"{FLOW_KERNELS_FOLDER}/weights.safetensors"
KERNEL_DTYPES = ("fp16", "bf16")

# What may be left out, and is null then.
_OPTIONAL = ("blend", "kernels", "text", "int8")

_ARCHITECTURE = re.compile(r"sm_\d{2,3}", re.ASCII)

# Kernels for sixteen architectures are a thousand files.
MAX_FILES = 4096

# Thousands of class names and support digests fit in a few MiB.
MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and how it was made.

    Args:
        format_version: ``FORMAT_VERSION``.
        method: name of the training method, e.g. "fma".
        class_names: one label per class, in the order of the logits.
        embed_dim: width d of the image embeddings.
        num_steps: M, Euler steps of the flow; 0 leaves the features alone, and where there is no flow.
        step_size: Euler step h; None where there is no flow.
        read_steps: ascending steps whose class probabilities the flow's logits average, the last one M; empty where
            they are those of step M alone, and where there is no flow. May be left out.
        precision: "fp32"; "int8", which runs on CPUs; or "fp16", which runs on CUDA.
        logit_scale: the encoder's factor from cosine to logit, which the flow's logits use.
        preprocessing: ``images.Preprocessing.to_dict()``; None for a bundle trained on features.
        encoder: {"backbone": str, "pretrained": str or None, "digest": sha256}; None likewise.
        files: relative path -> {"sha256": hex, "size": bytes} of every file but the manifest. The model card
            is not listed, or its entry, of an older version, does not count.
        versions: package -> version it was made with.
        metrics: e.g. {"held_out_support": {"accuracy": 0.91, "num_folds": 4}}.
        parity: largest differences between torch and the exported graphs.
        training: shots, seed, digests of the support images, and the like.
        created: ISO 8601 time.
        blend: {"alpha": float, "normalized": bool} where the encoder blends the unit embeddings of a tuned and of a
            frozen image tower, alpha * tuned + (1 - alpha) * frozen: the weight that its training ended with, and
            whether the blend is L2-normalised (otherwise its length, at most 1, belongs to the logits). None for any
            other encoder. May be left out.
        kernels: {"architectures": ["sm_80", ...], "dtype": "fp16" or "bf16"} where the flow comes compiled for graphics
            cards as well; the architectures are those with machine code. None otherwise. May be left out.
        text: {"context_length": int, "vocab_size": int, "clean": one of ``TEXT_CLEANING``, "strip_id": int or None,
            "templates": [str, ...], "linear_scale": float} where classes can be added by name: token ids of one text,
            and how many there are; what is done to a text first; an id that becomes 0 in the end; what a name is put
            into ("{}" marks the place); the factor on a class text that makes its row of the read-out's linear part, 0
            where that part is empty. None otherwise. May be left out.
        int8: {"max_pair_sum": int} of a bundle in int8: the largest sum of two int8 weights of one sign in adjacent
            rows, which the graphs are held to; up to ``int8_weights.MAX_PAIR_SUM`` no processor cuts a sum off. None
            for any other bundle, and for those of versions that did not limit it. May be left out.
    """

    format_version: int
    method: str
    class_names: tuple[str, ...]
    embed_dim: int
    num_steps: int
    step_size: float | None
    precision: str
    logit_scale: float
    preprocessing: dict[str, Any] | None
    encoder: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]
    metrics: dict[str, Any]
    parity: dict[str, Any]
    training: dict[str, Any]
    created: str
    read_steps: tuple[int, ...] = ()
    blend: dict[str, Any] | None = None
    kernels: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    int8: dict[str, Any] | None = None

    def to_json(self) -> bytes:
        """The manifest as the bytes of ``manifest.json``."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, path: str | os.PathLike[str] = MANIFEST_NAME) -> Manifest:
        """Parse and check a manifest.

        Args:
            data: bytes of the file.
            path: what messages call it.

        Raises:
            BundleError: anything is missing, unknown, of another type or out of range.
        """
        values = {"read_steps": [], **dict.fromkeys(_OPTIONAL), **strict_json(data, path)}
        version = values.get("format_version")
        if not _is_int(version) or version < 1:
            raise BundleError(f"{path}: 'format_version' must be {FORMAT_VERSION}, got {_short(version)}; {AGAIN}")
        if version > FORMAT_VERSION:
            raise BundleError(f"{path}: format version {version}, this fastfsl reads {FORMAT_VERSION}; {NEWER}")
        for key in _CHECKS:
            if key not in values:
                raise BundleError(f"{path}: the key {key!r} is missing; {AGAIN}")
        for key, value in values.items():
            if key not in _CHECKS:
                raise BundleError(f"{path}: unknown key {_short(key)}; {NEWER}")
            expected, holds = _CHECKS[key]
            if not holds(value):
                raise BundleError(f"{path}: {key!r} must be {expected}, got {_short(value)}; {AGAIN}")
        check_paths(values["files"], path)
        _check_parts(values, path)
        values["class_names"] = tuple(values["class_names"])
        values["read_steps"] = tuple(values["read_steps"])
        values["step_size"] = None if values["step_size"] is None else float(values["step_size"])
        values["logit_scale"] = float(values["logit_scale"])
        if values["blend"] is not None:
            values["blend"]["alpha"] = float(values["blend"]["alpha"])
        return cls(**values)


def read_manifest(bundle_dir: str | os.PathLike[str], expected_digest: str | None = None) -> Manifest:
    """Read and check the manifest of a bundle. The other files are not looked at: see ``check_bundle``.

    Args:
        bundle_dir: the bundle's folder.
        expected_digest: what ``bundle_digest`` must be; None: anything. See ``read_pinned``.

    Raises:
        BundleError: there is no bundle, it is another one, or its manifest is damaged or of an unknown version.
        ConfigError: the expected digest is no sha256.
    """
    return read_pinned(bundle_dir, expected_digest)[0]


def read_pinned(bundle_dir: str | os.PathLike[str], expected_digest: str | None = None) -> tuple[Manifest, str]:
    """The manifest of a bundle, and the bundle's digest: the sha256 of the very bytes that were parsed.

    The hashes inside a manifest tell damage, not forgery: who alters a file can alter its hash. A digest that was
    kept somewhere else (in the code that loads the bundle, or in a deployment's settings) tells both. It is compared
    before anything is parsed.

    Args:
        bundle_dir: the bundle's folder.
        expected_digest: 64 hexadecimal digits; None: any bundle will do.

    Raises:
        BundleError: as for ``read_manifest``.
        ConfigError: the expected digest is no sha256.
    """
    expected = None if expected_digest is None else _digest(expected_digest)
    path, data = Path(bundle_dir) / MANIFEST_NAME, _manifest_bytes(bundle_dir)
    found = hashlib.sha256(data).hexdigest()
    if expected is not None and found != expected:
        raise BundleError(
            f"{bundle_dir}: expected the bundle of digest {expected}, got {found}; it is another bundle or was "
            "altered: do not use it unless you know why"
        )
    return Manifest.from_json(data, path), found


def bundle_digest(bundle_dir: str | os.PathLike[str]) -> str:
    """The sha256, in hex, of ``manifest.json``: it names the bundle, since the manifest holds every file's hash.

    The model card, README.md, is no part of it.
    """
    return hashlib.sha256(_manifest_bytes(bundle_dir)).hexdigest()


def _check_parts(values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse values that contradict each other about the parts of the bundle."""
    files = values["files"]
    if len({values["encoder"] is not None, values["preprocessing"] is not None, VISUAL_GRAPH in files}) > 1:
        raise BundleError(f"{path}: 'encoder', 'preprocessing' and {VISUAL_GRAPH} come together or not at all; {AGAIN}")
    if values["blend"] is not None and values["encoder"] is None:
        raise BundleError(f"{path}: a 'blend' is an encoder's, and 'encoder' is null; {AGAIN}")
    if values["int8"] is not None and values["precision"] != "int8":
        raise BundleError(f"{path}: 'int8' is about a bundle in int8, not in {values['precision']}; {AGAIN}")
    if FLOW_GRAPH not in files and READOUT not in files:
        raise BundleError(f"{path}: 'files' must list {FLOW_GRAPH}, {READOUT} or both; {AGAIN}")
    flow = (values["num_steps"], values["step_size"], values["read_steps"])
    if FLOW_GRAPH in files:
        if values["step_size"] is None or values["read_steps"][-1:] not in ([], [values["num_steps"]]):
            raise BundleError(
                f"{path}: a flow has a 'step_size', and 'read_steps' that end with 'num_steps', got {_short(flow)}; "
                f"{AGAIN}"
            )
    elif FLOW_PLAN in files or flow != (0, None, []):
        raise BundleError(
            f"{path}: without {FLOW_GRAPH} 'num_steps' is 0, 'step_size' null, 'read_steps' empty, and there is no "
            f"{FLOW_PLAN}, got {_short(flow)}; {AGAIN}"
        )
    _check_kernels(values, path)
    check_text_files(values, path, with_flow=FLOW_GRAPH in files)


def _check_kernels(values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    found = {name for name in values["files"] if name.startswith(f"{FLOW_KERNELS_FOLDER}/")}
    if values["kernels"] is None:
        if found:
            raise BundleError(f"{path}: 'kernels' is null, but 'files' lists {min(found)}; {AGAIN}")
    elif not {FLOW_KERNELS_INDEX, FLOW_KERNELS_WEIGHTS} <= found or FLOW_GRAPH not in values["files"]:
        raise BundleError(
            f"{path}: with 'kernels', 'files' must list {FLOW_GRAPH}, {FLOW_KERNELS_INDEX} and {FLOW_KERNELS_WEIGHTS}; "
            f"{AGAIN}"
        )


def _manifest_bytes(bundle_dir: str | os.PathLike[str]) -> bytes:
    folder = Path(bundle_dir)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder; make one with `fastfsl export`")
    if not os.path.lexists(folder / MANIFEST_NAME):
        raise BundleError(f"{folder}: no {MANIFEST_NAME} in it, so it is no bundle; make one with `fastfsl export`")
    return read_regular(resolve(folder, MANIFEST_NAME), MAX_MANIFEST_BYTES)


def _digest(value: object) -> str:
    digest = value.lower() if isinstance(value, str) else value
    if not isinstance(digest, str) or not _is_sha256(digest):
        raise ConfigError(
            f"expected_digest must be the 64 hexadecimal digits that `fastfsl inspect BUNDLE --digest` prints, got "
            f"{_short(value)}"
        )
    return digest


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_ascending(value: object) -> bool:
    return (
        isinstance(value, list) and all(map(_is_int, value)) and value == sorted({step for step in value if step >= 0})
    )


def _is_encoder(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == {"backbone", "pretrained", "digest"}
        and _is_name(value["backbone"])
        and (value["pretrained"] is None or _is_name(value["pretrained"]))
        and _is_sha256(value["digest"])
    )


def _is_blend(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == {"alpha", "normalized"}
        and is_fraction(value["alpha"])
        and isinstance(value["normalized"], bool)
    )


def _is_kernels(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == {"architectures", "dtype"}
        and isinstance(value["architectures"], list)
        and 0 < len(value["architectures"]) <= 16
        and all(isinstance(name, str) and _ARCHITECTURE.fullmatch(name) for name in value["architectures"])
        and isinstance(value["dtype"], str)
        and value["dtype"] in KERNEL_DTYPES
    )


def _is_int8(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == {"max_pair_sum"}
        and _is_int(value["max_pair_sum"])
        and 0 <= value["max_pair_sum"] <= 2 * 128
    )


def _is_file_entry(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"sha256", "size"}
        and _is_sha256(value["sha256"])
        and _is_int(value["size"])
        and 0 <= value["size"] <= MAX_FILE_BYTES
    )


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value) is not None
    except ValueError:
        return False


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format_version": ("a whole number", _is_int),
    "method": ("a name", _is_name),
    "class_names": (
        "a list of names, each of them once",
        lambda v: isinstance(v, list) and len(v) > 0 and all(map(_is_name, v)) and len(set(v)) == len(v),
    ),
    "embed_dim": ("a whole number from 1 to 65536", lambda v: _is_int(v) and 1 <= v <= 65536),
    "num_steps": ("a whole number from 0 to 1000", lambda v: _is_int(v) and 0 <= v <= 1000),
    "step_size": ("a number above 0 or null", lambda v: v is None or is_positive(v)),
    "read_steps": ("a list of ascending whole numbers", _is_ascending),
    "precision": (f"one of {', '.join(PRECISIONS)}", lambda v: isinstance(v, str) and v in PRECISIONS),
    "logit_scale": ("a number above 0", is_positive),
    "preprocessing": ("an object or null", lambda v: v is None or _is_object(v)),
    "encoder": ("null, or an object with backbone, pretrained and a sha256 digest", _is_encoder),
    "blend": ("null, or an object with an alpha from 0 to 1 and normalized, true or false", _is_blend),
    "kernels": ("null, or an object with architectures and a dtype, fp16 or bf16", _is_kernels),
    "text": ("null, or an object that says how texts are read", is_text),
    "int8": ("null, or an object with a max_pair_sum from 0 to 256", _is_int8),
    "files": (
        f"an object of up to {MAX_FILES} {{sha256, size}}, none larger than {MAX_FILE_BYTES} bytes",
        lambda v: _is_object(v) and len(v) <= MAX_FILES and all(map(_is_file_entry, v.values())),
    ),
    "versions": ("an object of names", lambda v: _is_object(v) and all(map(_is_name, v.values()))),
    "metrics": ("an object", _is_object),
    "parity": ("an object", _is_object),
    "training": ("an object", _is_object),
    "created": ("an ISO 8601 time", _is_time),
}

"""The bundle on disk: manifest, checks, flow plan, atomic writer. Standard library, numpy and safetensors only.

A bundle is a folder; ``manifest.json`` lists the sha256 and size of every other file in it. It is treated as coming
from a stranger: sizes are bounded before anything is parsed, no listed path can leave the folder, every value is
checked by hand, and nothing is ever unpickled. Whatever is wrong with it is a ``BundleError`` that names the file and
the remedy. It is written into a sibling folder and renamed, so it is never half there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from fastfsl.errors import BundleError, ConfigError, DataError, ShapeError
from fastfsl.files import check_output, staged_directory, staged_file

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PLAN_FORMAT = "fastfsl-flow-plan"
PRECISIONS = ("fp32",)

# Thousands of class names and support digests fit in a few MiB; a plan's header holds twelve short entries.
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_PLAN_HEADER_BYTES = 64 * 2**10
MAX_PLAN_BYTES = 4 * 2**30
MAX_JSON_DEPTH = 32

_CHUNK = 2**20
_AGAIN = "the bundle is damaged: export it again"
_NEWER = "it was made by a newer fastfsl: upgrade fastfsl, or export it again with this version"


# --------------------------------------------------------------------------------------------------- the flow plan


@dataclass(frozen=True, eq=False)
class PlanArrays:
    """A flow plan: shared weights and per-step tables, all float32. Linear layers are (out, in): y = x W^T + b.

    Args:
        step_size: Euler step h, above 0.
        input_weight: W_in, (d, d).
        input_bias: b_in, (d,).
        first_weight: first linear of each block, (B, d, d).
        first_bias: (B, d).
        second_weight: second linear of each block, (B, d, d).
        second_bias: (B, d).
        output_weight: W_out, (d, d).
        output_bias: b_out, (d,).
        carry_weight: W_in W_out, (d, d).
        carry_bias: W_in b_out, (d,).
        block_table: LayerNorm scale a, shift c and gate of each step and block, (M, B, 3, d).
        final_table: a and c of the final layer at each step, (M, 2, d).

    M = 0 (the features stay where they are) and B = 0 are legal.

    Raises:
        ShapeError: an array has another dtype or shape.
        DataError: a value is not finite, or ``step_size`` is not above 0.
    """

    step_size: float
    input_weight: np.ndarray[Any, Any]
    input_bias: np.ndarray[Any, Any]
    first_weight: np.ndarray[Any, Any]
    first_bias: np.ndarray[Any, Any]
    second_weight: np.ndarray[Any, Any]
    second_bias: np.ndarray[Any, Any]
    output_weight: np.ndarray[Any, Any]
    output_bias: np.ndarray[Any, Any]
    carry_weight: np.ndarray[Any, Any]
    carry_bias: np.ndarray[Any, Any]
    block_table: np.ndarray[Any, Any]
    final_table: np.ndarray[Any, Any]

    def __post_init__(self) -> None:
        if not _is_positive(self.step_size):
            raise DataError(f"step_size must be a finite number above 0, got {self.step_size!r}")
        arrays = self.arrays()
        for name, array in arrays.items():
            if array.dtype != np.float32:
                raise ShapeError(f"{name} must be a float32 array, got {array.dtype}")
        if self.input_weight.ndim != 2 or self.block_table.ndim != 4 or self.dim < 1:
            raise ShapeError(
                f"expected input_weight (d, d) and block_table (M, B, 3, d), got {self.input_weight.shape} and "
                f"{self.block_table.shape}"
            )
        d, blocks, steps = self.dim, self.num_blocks, self.num_steps
        expected = {
            "input_weight": (d, d),
            "input_bias": (d,),
            "first_weight": (blocks, d, d),
            "first_bias": (blocks, d),
            "second_weight": (blocks, d, d),
            "second_bias": (blocks, d),
            "output_weight": (d, d),
            "output_bias": (d,),
            "carry_weight": (d, d),
            "carry_bias": (d,),
            "block_table": (steps, blocks, 3, d),
            "final_table": (steps, 2, d),
        }
        for name, array in arrays.items():
            if array.shape != expected[name]:
                raise ShapeError(f"{name} must have shape {expected[name]}, got {array.shape}")
            if not np.isfinite(array).all():
                raise DataError(f"{name} holds NaN or infinite values")

    @property
    def num_steps(self) -> int:
        """M, the number of Euler steps."""
        return int(self.block_table.shape[0])

    @property
    def num_blocks(self) -> int:
        """B, the number of residual blocks."""
        return int(self.block_table.shape[1])

    @property
    def dim(self) -> int:
        """d, the width of the features."""
        return int(self.input_weight.shape[0])

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every array under its name, in the order of the fields."""
        return {name: getattr(self, name) for name in _PLAN_ARRAYS}


_PLAN_ARRAYS = tuple(field.name for field in fields(PlanArrays) if field.name != "step_size")


def read_plan(path: str | os.PathLike[str]) -> PlanArrays:
    """Read a plan written by ``write_plan``.

    Raises:
        BundleError: the file is missing, damaged, not a plan, or of an unknown version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    data = _read_regular(path, MAX_PLAN_BYTES)
    header = _safetensors_header(data, path)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != PLAN_FORMAT:
        raise BundleError(f"{path}: not a fastfsl flow plan; {_AGAIN}")
    if metadata.get("version") != "1":
        raise BundleError(f"{path}: flow plan of version {metadata.get('version')!r}, expected '1'; {_NEWER}")
    if sorted(header) != sorted(_PLAN_ARRAYS):
        raise BundleError(f"{path}: expected the arrays {', '.join(_PLAN_ARRAYS)}, got {sorted(header)}; {_AGAIN}")
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") != "F32":
            raise BundleError(f"{path}: {name} must be float32 (F32); {_AGAIN}")
    try:
        return PlanArrays(step_size=float(metadata.get("step_size", "")), **load(data))
    except (ShapeError, DataError, SafetensorError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: {error}; {_AGAIN}") from error


def write_plan(path: str | os.PathLike[str], plan: PlanArrays) -> None:
    """Write a plan as safetensors, atomically; equal plans give equal bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(array) for name, array in plan.arrays().items()})
    length = struct.unpack("<Q", data[:8])[0]
    # safetensors writes its metadata in random order; putting it in here keeps the bytes, and so the hash, the same.
    metadata = {"format": PLAN_FORMAT, "version": "1", "step_size": repr(float(plan.step_size))}
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8 : 8 + length])}, separators=(",", ":"))
    header += " " * (-len(header) % 8)
    with staged_file(Path(path)) as partial:
        partial.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data[8 + length :])


def _safetensors_header(data: bytes, path: Path) -> dict[str, Any]:
    """The header of a safetensors file, its length bounded before it is parsed."""
    if len(data) < 8:
        raise BundleError(f"{path}: expected a safetensors file, got {len(data)} bytes; {_AGAIN}")
    length = struct.unpack("<Q", data[:8])[0]
    if length > min(MAX_PLAN_HEADER_BYTES, len(data) - 8):
        raise BundleError(f"{path}: the header claims {length} bytes, more than a plan has or may have; {_AGAIN}")
    return _strict_json(data[8 : 8 + length], path)


# ---------------------------------------------------------------------------------------------------- the manifest


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and how it was made.

    Args:
        format_version: ``FORMAT_VERSION``.
        method: name of the training method, e.g. "fma".
        class_names: one label per class, in the order of the logits.
        embed_dim: width d of the image embeddings.
        num_steps: M, Euler steps of the flow; 0 leaves the features alone.
        step_size: Euler step h.
        precision: "fp32".
        logit_scale: factor from cosine to logit.
        preprocessing: ``images.Preprocessing.to_dict()``; None for a bundle trained on features.
        encoder: {"backbone": str, "pretrained": str or None, "digest": sha256}; None likewise.
        files: relative path -> {"sha256": hex, "size": bytes} of every file but the manifest.
        versions: package -> version it was made with.
        metrics: e.g. {"held_out_support": {"accuracy": 0.91, "num_folds": 4}}.
        parity: largest differences between torch and the exported graphs.
        training: shots, seed, digests of the support images, and the like.
        created: ISO 8601 time.
    """

    format_version: int
    method: str
    class_names: tuple[str, ...]
    embed_dim: int
    num_steps: int
    step_size: float
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
        values = _strict_json(data, path)
        version = values.get("format_version")
        if not _is_int(version) or version < 1:
            raise BundleError(f"{path}: 'format_version' must be {FORMAT_VERSION}, got {version!r}; {_AGAIN}")
        if version > FORMAT_VERSION:
            raise BundleError(f"{path}: format version {version}, this fastfsl reads {FORMAT_VERSION}; {_NEWER}")
        for key in _CHECKS:
            if key not in values:
                raise BundleError(f"{path}: the key {key!r} is missing; {_AGAIN}")
        for key, value in values.items():
            if key not in _CHECKS:
                raise BundleError(f"{path}: unknown key {key!r}; {_NEWER}")
            expected, holds = _CHECKS[key]
            if not holds(value):
                raise BundleError(f"{path}: {key!r} must be {expected}, got {_short(value)}; {_AGAIN}")
        for name in values["files"]:
            _check_relative_path(name, path)
        parts = {
            values["encoder"] is not None,
            values["preprocessing"] is not None,
            "visual/model.onnx" in values["files"],
        }
        if len(parts) > 1:
            raise BundleError(
                f"{path}: 'encoder', 'preprocessing' and visual/model.onnx come together or not at all; {_AGAIN}"
            )
        values["class_names"] = tuple(values["class_names"])
        values["step_size"] = float(values["step_size"])
        values["logit_scale"] = float(values["logit_scale"])
        return cls(**values)


def read_manifest(bundle_dir: str | os.PathLike[str]) -> Manifest:
    """Read and check the manifest of a bundle. The other files are not looked at: see ``check_bundle``.

    Raises:
        BundleError: there is no bundle, or its manifest is damaged or of an unknown version.
    """
    return Manifest.from_json(_manifest_bytes(bundle_dir), Path(bundle_dir) / MANIFEST_NAME)


def bundle_digest(bundle_dir: str | os.PathLike[str]) -> str:
    """The sha256, in hex, of ``manifest.json``: it names the bundle, since the manifest holds every file's hash."""
    return hashlib.sha256(_manifest_bytes(bundle_dir)).hexdigest()


def check_bundle(bundle_dir: str | os.PathLike[str], manifest: Manifest | None = None) -> Manifest:
    """Check the manifest, and that every file it lists lies in the bundle with the recorded size and sha256.

    Returns:
        The manifest.

    Raises:
        BundleError: names the first file that is missing, truncated, altered or outside the bundle.
    """
    manifest = read_manifest(bundle_dir) if manifest is None else manifest
    for name in manifest.files:
        check_file(bundle_dir, manifest, name)
    return manifest


def check_file(bundle_dir: str | os.PathLike[str], manifest: Manifest, name: str) -> None:
    """Check one listed file's place, size and sha256 without holding it in memory.

    Raises:
        BundleError: as ``check_bundle``.
    """
    path, size, sha256 = _locate(Path(bundle_dir), manifest, name)
    try:
        found_size, found = _hash_file(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
    _compare(path, (size, sha256), (found_size, found))


def read_file(bundle_dir: str | os.PathLike[str], manifest: Manifest, name: str) -> bytes:
    """The contents of one listed file, checked: what is returned is what was hashed, even if the disk changes.

    Raises:
        BundleError: as ``check_bundle``; or the manifest does not list the file.
    """
    path, size, sha256 = _locate(Path(bundle_dir), manifest, name)
    data = _read_regular(path, size, expected_size=size)
    _compare(path, (size, sha256), (len(data), hashlib.sha256(data).hexdigest()))
    return data


# ------------------------------------------------------------------------------------------------------- the writer


@contextlib.contextmanager
def staging_folder(directory: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A hidden, empty sibling of ``directory`` to prepare a bundle in; removed at the end unless it was moved.

    Enter it before the long work: an output that exists or cannot be written is refused here.

    Raises:
        ConfigError: see ``write_bundle``.
    """
    target = Path(os.path.normpath(Path(directory).absolute()))
    check_output(target, marker=MANIFEST_NAME, force=force)
    staging = target.with_name(f".{target.name}.staging-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}; choose another output") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_bundle(
    directory: str | os.PathLike[str], manifest_fields: Mapping[str, Any], staging: Path, *, force: bool = False
) -> Manifest:
    """Hash the staged files, write the manifest last, and move everything onto ``directory`` in one rename.

    Args:
        directory: where the bundle goes.
        manifest_fields: the fields of ``Manifest`` but ``format_version`` and ``files``; ``created`` may be left out.
        staging: folder with the bundle's other files, on the same file system (``staging_folder`` makes one). It is
            moved away.
        force: replace a bundle (or an empty folder) that is there. Anything else is never deleted.

    Raises:
        ConfigError: the output exists, or cannot be written.
        BundleError: the fields do not make a valid manifest, or a staged file is not a regular file.
    """
    values = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **manifest_fields,
        "format_version": FORMAT_VERSION,
        "files": _hash_folder(staging),
    }
    try:
        encoded = json.dumps(values, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest's fields must be finite JSON values: {error}") from error
    manifest = Manifest.from_json(encoded)
    with staged_directory(Path(directory), marker=MANIFEST_NAME, force=force) as complete:
        try:
            (staging / MANIFEST_NAME).write_bytes(manifest.to_json())
            complete.rmdir()
            staging.rename(complete)
        except OSError as error:
            raise ConfigError(f"cannot write {directory}: {error.strerror or error}; choose another output") from error
    return manifest


def _hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise BundleError(f"{path}: only regular files and folders can be part of a bundle")
        if path.is_file() and path != folder / MANIFEST_NAME:
            size, sha256 = _hash_file(path)
            entries[path.relative_to(folder).as_posix()] = {"sha256": sha256, "size": size}
    return entries


# ------------------------------------------------------------------------------------------------- files and JSON


def _manifest_bytes(bundle_dir: str | os.PathLike[str]) -> bytes:
    folder = Path(bundle_dir)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder; make one with `fastfsl export`")
    if not os.path.lexists(folder / MANIFEST_NAME):
        raise BundleError(f"{folder}: no {MANIFEST_NAME} in it, so it is no bundle; make one with `fastfsl export`")
    return _read_regular(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES)


def _locate(bundle_dir: Path, manifest: Manifest, name: str) -> tuple[Path, int, str]:
    """Path, size and sha256 of a listed file. No part of the path below the bundle may be a link."""
    if name not in manifest.files:
        raise BundleError(f"{bundle_dir}: the manifest lists no {name}; {_AGAIN}")
    _check_relative_path(name, bundle_dir / MANIFEST_NAME)
    path = bundle_dir
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{path}: a symbolic link, which could leave the bundle; copy the file itself (cp -rL)")
    entry = manifest.files[name]
    return path, entry["size"], entry["sha256"]


def _compare(path: Path, expected: tuple[int, str], found: tuple[int, str]) -> None:
    if found[0] != expected[0]:
        raise BundleError(f"{path}: truncated or altered: expected {expected[0]} bytes, got {found[0]}; {_AGAIN}")
    if found[1] != expected[1]:
        raise BundleError(f"{path}: altered: expected sha256 {expected[1]}, got {found[1]}; {_AGAIN}")


def _read_regular(path: Path, max_bytes: int, expected_size: int | None = None) -> bytes:
    """The bytes of a regular file that is no link and not larger than allowed."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: expected a regular file, not a folder, link or device; {_AGAIN}")
        if expected_size is not None and status.st_size != expected_size:
            _compare(path, (expected_size, ""), (status.st_size, ""))
        if status.st_size > max_bytes:
            raise BundleError(f"{path}: {status.st_size} bytes, more than the {max_bytes} allowed; {_AGAIN}")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: the file is missing; {_AGAIN}") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error}); {_AGAIN}") from error


def _hash_file(path: Path) -> tuple[int, str]:
    if not path.exists():
        raise BundleError(f"{path}: the file is missing; {_AGAIN}")
    if not path.is_file():
        raise BundleError(f"{path}: expected a regular file; {_AGAIN}")
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _check_relative_path(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse whatever could mean a file outside the bundle, on any operating system."""
    parts = name.split("/")
    harmless = name.isprintable() and not any(sign in name for sign in '\\:*?"<>|') and len(name) <= 255
    if not harmless or any(part in ("", ".", "..") for part in parts) or name == MANIFEST_NAME:
        raise BundleError(f"{path}: the listed file {name!r} is no path inside the bundle; do not trust this bundle")


def _strict_json(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN, infinities, lone surrogates or deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key appears twice")
        return values

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not a number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
        _check_json(value, MAX_JSON_DEPTH)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path}: expected a JSON object; {_AGAIN}")
    return value


def _check_json(value: object, depth: int) -> None:
    if depth < 0:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_json(key, depth)
            _check_json(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, depth - 1)
    elif isinstance(value, str):
        value.encode("utf-8")  # raises on a lone surrogate
    elif isinstance(value, int | float) and not abs(value) < 2**63:
        raise ValueError("a number is too large")


# -------------------------------------------------------------------------------- what each manifest value must be


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_encoder(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == {"backbone", "pretrained", "digest"}
        and _is_name(value["backbone"])
        and (value["pretrained"] is None or _is_name(value["pretrained"]))
        and _is_sha256(value["digest"])
    )


def _is_file_entry(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"sha256", "size"}
        and _is_sha256(value["sha256"])
        and _is_int(value["size"])
        and value["size"] >= 0
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
    "class_names": ("a list of names", lambda v: isinstance(v, list) and len(v) > 0 and all(map(_is_name, v))),
    "embed_dim": ("a whole number from 1 to 65536", lambda v: _is_int(v) and 1 <= v <= 65536),
    "num_steps": ("a whole number from 0 to 1000", lambda v: _is_int(v) and 0 <= v <= 1000),
    "step_size": ("a number above 0", _is_positive),
    "precision": (f"one of {', '.join(PRECISIONS)}", lambda v: isinstance(v, str) and v in PRECISIONS),
    "logit_scale": ("a number above 0", _is_positive),
    "preprocessing": ("an object or null", lambda v: v is None or _is_object(v)),
    "encoder": ("null, or an object with backbone, pretrained and a sha256 digest", _is_encoder),
    "files": (
        "an object of {sha256, size} with flow/model.onnx",
        lambda v: _is_object(v) and "flow/model.onnx" in v and all(map(_is_file_entry, v.values())),
    ),
    "versions": ("an object of names", lambda v: _is_object(v) and all(map(_is_name, v.values()))),
    "metrics": ("an object", _is_object),
    "parity": ("an object", _is_object),
    "training": ("an object", _is_object),
    "created": ("an ISO 8601 time", _is_time),
}

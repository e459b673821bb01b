"""Whether this processor cuts off sums of an int8 bundle's products, and what is done about it.

It is asked, not looked up: /proc/cpuinfo is Linux's alone, and what counts is which instructions ONNX Runtime takes.
"""

from __future__ import annotations

import base64
import functools
import os
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl.bundle import Int8Products, check_int8_record, int8_products
from fastfsl.errors import DeviceError
from fastfsl.runtime.session import create_session
from fastfsl.runtime.unsigned_weights import with_unsigned_weights

if TYPE_CHECKING:
    from fastfsl.bundle import Manifest

# y = a W and z = b V for bytes a (n, 8) and b (n, 13), the 64 columns of W and V being 127 and -127 in turn. ONNX
# Runtime takes four rows of weights at once: 8 is a multiple of four, 13 leaves an odd row over. Made once with
# onnx.helper (two MatMulIntegerToFloat nodes, opset 18, IR version 10) and serialised, so that it can be asked where
# the onnx package is not installed; a test makes it anew and compares.
PROBE_MODEL = zlib.decompress(
    base64.b64decode(
        "eNrj4LL6xcflwsWYyMWZGF+empmeUVLMxVqcnJiTCqRKUguKhRgrlUR8E0t8S3M880pS01OLQvLdcvITS6x4k/Nz9XIzk4vyi/PT"
        "SkCmJHFxJuEypYooU4RYMvNKLLT4BRidIPq9WBgYGuy1+pg4HMBiIMO8GphAgiMZa01h4eAABgmzEyLevBpY6htH4UiGWlfYOHgh"
        "yQKeEb0OsI0GzCgcheTDKBFgDSnEz8XLwSTEycUsxJjHxcTBARJNQhflTQKKVoJFGRGiDiDRKgxRJxYuBgEhJ0Eu1EpQgBEAocgj"
        "zg=="
    )
)
_HEIGHTS, _WIDTH, _WEIGHT, _BYTE = {"a": 8, "b": 13}, 64, 127, 255
# One row and several are computed by different code.
_ROWS = (1, 8)

_REMEDY = (
    "export its run again with this version, whose weights give the same on every processor, or with --precision fp32"
)


class Int8Sums:
    """What of a bundle's int8 products, graph by graph, and how they are computed.

    Args:
        path: the bundle's folder.
        manifest: its manifest.
        widen: where this processor would cut off sums, compute with unsigned weights, which is slower and exact.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Manifest, *, widen: bool) -> None:
        self._path, self._manifest, self._widen = path, manifest, widen
        self._found: list[Int8Products | None] = []
        self._widened = False

    def computable(self, model: bytes, name: str, *, signed: bool = False) -> bytes:
        """Note a graph, and give what computes the same here without a sum being cut off: mostly itself.

        Args:
            model: a serialised ONNX model.
            name: what messages call it.
            signed: some products take their rows as int8, which ONNX Runtime does not multiply by unsigned weights.

        Raises:
            BundleError: the bytes are no message.
            DeviceError: this processor would cut off sums, and nothing is to be done about it, or may be.
        """
        found = int8_products(model, name)
        self._found.append(found)
        if found is None or found.any_processor or not sums_saturate():
            return model
        if found.max_pair_sum is not None and not signed and not self._widen:
            raise DeviceError(
                f"{name}: this int8 bundle is from an older fastfsl, and this processor would cut sums of its products "
                f"off at 16 bits, and answer wrongly; {_REMEDY}, or load it with wide_int8=True (--wide-int8), which "
                "answers rightly in about 1.3 times the time"
            )
        try:
            if found.max_pair_sum is None:
                raise ValueError("its weights are not among those that fastfsl writes")
            if signed:
                raise ValueError("it multiplies rows of int8, and fastfsl writes uint8")
            unsigned = with_unsigned_weights(model)
            after = int8_products(unsigned, name)
            if after is None or not after.any_processor:
                raise ValueError("it has products that fastfsl does not write")
        except ValueError as error:
            raise DeviceError(
                f"{name}: this processor cuts sums of int8 products off at 16 bits, and this graph cannot be computed "
                f"in another way ({error}); {_REMEDY}"
            ) from error
        self._widened = True
        return unsigned

    def check_record(self) -> None:
        """Hold the graphs that were noted against the manifest.

        Raises:
            BundleError: it says of them what is not so.
        """
        check_int8_record(self._path, self._manifest, Int8Products.together(self._found))

    def describe(self) -> dict[str, Any] | None:
        """What `Int8Products.describe` says of all graphs, and whether they are computed with unsigned weights."""
        together = Int8Products.together(self._found)
        return None if together is None else {**together.describe(), "widened": self._widened}


@functools.cache
def sums_saturate() -> bool:
    """Whether ONNX Runtime, on this processor, cuts off sums of two products of bytes and int8 weights.

    Raises:
        BundleError: ONNX Runtime cannot compute products of bytes at all.
    """
    session = create_session(PROBE_MODEL, "the int8 probe", device="cpu", num_threads=1)
    signs = np.where(np.arange(_WIDTH) % 2, -1, 1)
    for rows in _ROWS:
        feed = {name: np.full((rows, height), _BYTE, np.uint8) for name, height in _HEIGHTS.items()}
        for height, found in zip(_HEIGHTS.values(), session.run(None, feed), strict=True):
            if not np.array_equal(found, np.tile(_BYTE * _WEIGHT * height * signs, (rows, 1))):
                return True
    return False

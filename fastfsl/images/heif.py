"""HEIC and HEIF, the format of most phones: read by pillow-heif where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

from fastfsl.errors import DataError
from fastfsl.images.pillow import load_optional

# Endings that phones and cameras give such files.
HEIF_ENDINGS = (".heic", ".heif", ".hif", ".heics", ".heifs")

ADVICE = "pip install 'fastfsl[heic]' to read HEIC"

# Brands of the ISO base media format: HEVC images and sequences, and the containers that may hold either those or AV1.
_HEVC_BRANDS = frozenset((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"))
_AV1_BRANDS = frozenset((b"avif", b"avis"))
_ANY_BRANDS = frozenset((b"mif1", b"msf1"))


def heif_installed() -> bool:
    """Whether pillow-heif is there; it is not imported."""
    return find_spec("pillow_heif") is not None


def avif_readable() -> bool:
    """Whether this build of Pillow reads AVIF; Pillow itself is not imported."""
    return find_spec("PIL") is not None and find_spec("PIL._avif") is not None


def is_heif(data: bytes) -> bool:
    """Whether the bytes begin as a HEIF file of HEVC images; AVIF, its sibling, is Pillow's own."""
    if data[4:8] != b"ftyp":
        return False
    major, length = data[8:12], min(int.from_bytes(data[:4], "big"), 512)
    brands = {data[start : start + 4] for start in range(16, length, 4)}
    return major in _HEVC_BRANDS or (major in _ANY_BRANDS and not (brands & _AV1_BRANDS))


def load_heif(name: str) -> None:
    """Have Pillow read HEIF.

    Args:
        name: of the image, for messages.

    Raises:
        DataError: pillow-heif is not installed, or does not work here.
        ResourceError: the machine has no file handles or memory left to import it.
    """
    module = load_optional("pillow_heif")
    if module is None:
        raise DataError(f"{name}: a HEIC image; {ADVICE}, or save it as JPEG")
    module.register_heif_opener()

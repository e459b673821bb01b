"""From one source to an encoder's pixels: exactly as open_clip makes them, or faster and nearly so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fastfsl.errors import DataError
from fastfsl.images.opening import load_pixels, open_header, open_image, orientation, plain_mode, source_name, turn
from fastfsl.images.preprocessing import Preprocessing, Resized, center_crop_or_pad, preprocess, resized

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from PIL import Image

    from fastfsl.images.opening import ImageSource

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves this many times the pixels, along each edge, of
# what it is resized to. On mosaics of photographs, left 1, 1.25, 1.5 and 1.75 times, the embeddings of a ViT-B-32 keep
# a cosine of at least 0.9994, 0.9998, 0.9999 and 0.99996 with the exact ones.
MARGIN = 1.5

# A large reduction averages whole pixels first, down to this many times the size (Pillow's ``reducing_gap``).
_REDUCING_GAP = 2.0

# What Pillow calls a JPEG file; MPO is one of several pictures, of which the first is read.
_JPEG = ("JPEG", "MPO")

# EXIF orientations under which what is stored as a row is seen as a column.
_ON_ITS_SIDE = (5, 6, 7, 8)


def exact_pixels(source: ImageSource, preprocessing: Preprocessing) -> Pixels:
    """``preprocess`` of ``open_image``, with the source named in the errors of both."""
    image = open_image(source)
    try:
        return preprocess(image, preprocessing)
    except DataError as error:
        raise DataError(f"{source_name(source)}: {error}") from error


def fast_pixels(source: ImageSource, preprocessing: Preprocessing) -> Pixels:
    """What ``exact_pixels`` gives, a few grey values off but sooner; errors are the same.

    JPEG files and bytes are decoded at a fraction of their size where ``MARGIN`` allows it: the inverse DCT then takes
    a corner of each block. Of every source only what the crop keeps is resized, before EXIF turns it.
    """
    import numpy as np

    name = source_name(source)
    image, encoded = open_header(source, name)
    extent: tuple[float, float]
    if encoded and image.format in _JPEG:
        turned = orientation(image)
        layout = _layout(image.size, turned, preprocessing, name)
        extent = _draft(image, layout, turned)
        load_pixels(image, name)
    else:
        turned = orientation(load_pixels(image, name) if encoded else image)
        extent = image.size
        layout = _layout(image.size, turned, preprocessing, name)
    image = _resized_center(plain_mode(image, name), extent, layout, turned, preprocessing.image_size)
    image = center_crop_or_pad(turn(image, turned), preprocessing.image_size, layout.fill)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


def _layout(size: tuple[int, int], turned: int, preprocessing: Preprocessing, name: str) -> Resized:
    """What a picture of ``size`` (width, height) is resized to once it is upright."""
    columns, rows = size[::-1] if turned in _ON_ITS_SIDE else size
    try:
        return resized(rows, columns, preprocessing)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _draft(image: Image.Image, layout: Resized, turned: int) -> tuple[float, float]:
    """Have a JPEG decoded smaller where that leaves enough of it.

    Returns:
        Width and height that the picture will fill, in pixels; the last column and row may be filled in part.
    """
    width, height = image.size
    to_height, to_width = (layout.width, layout.height) if turned in _ON_ITS_SIDE else (layout.height, layout.width)
    allowed = min(width / to_width, height / to_height) / MARGIN
    scale = next((scale for scale in (8, 4, 2) if scale <= allowed), 1)
    drafted = image.draft(None, (width // scale, height // scale)) if scale > 1 else None
    return image.size if drafted is None else drafted[1][2:]


def _resized_center(
    image: Image.Image, extent: tuple[float, float], layout: Resized, turned: int, target: tuple[int, int]
) -> Image.Image:
    """The part of the resized image that a crop to ``target`` (height, width) keeps, as it is stored.

    Args:
        image: decoded, not turned yet.
        extent: width and height that the picture fills.
        layout: the resize of the whole, upright.
        turned: EXIF orientation.
        target: size of the crop, upright.
    """
    rows, columns = _kept(layout.height, target[0]), _kept(layout.width, target[1])
    across, down = (rows, columns) if turned in _ON_ITS_SIDE else (columns, rows)
    left, right, width = across.of(extent[0], mirrored=turned in (2, 3, 7, 8))
    top, bottom, height = down.of(extent[1], mirrored=turned in (3, 4, 6, 7))
    return image.resize((width, height), layout.resample, (left, top, right, bottom), _REDUCING_GAP)


class _Kept(NamedTuple):
    """Of an edge resized to ``length`` pixels, the ``width`` from ``start`` on."""

    length: int
    start: int
    width: int

    def of(self, extent: float, *, mirrored: bool) -> tuple[float, float, int]:
        """Where they begin and end in an edge of ``extent`` pixels, which may run backwards, and how many they are."""
        start = self.length - self.start - self.width if mirrored else self.start
        pixel = extent / self.length
        return start * pixel, min((start + self.width) * pixel, extent), self.width


def _kept(length: int, target: int) -> _Kept:
    return _Kept(length, round((length - target) / 2.0), target) if length > target else _Kept(length, 0, length)


# By the name that users choose.
PREPROCESS: Mapping[str, Callable[[ImageSource, Preprocessing], Pixels]] = {"exact": exact_pixels, "fast": fast_pixels}

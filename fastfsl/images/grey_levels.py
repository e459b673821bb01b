"""Grey pictures of more than 8 bits, as 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastfsl.images.pillow import pillow

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Bits that cameras, scanners and microscopes count in. A file keeps any of them in 16 and does not say of how many.
_DEPTHS = (8, 10, 12, 14, 16)

_STRIP_PIXELS = 2**20


def eight_bits(image: Image.Image) -> Image.Image:
    """The picture in mode L: the 8 highest of the bits that its largest value needs, rounded up to a usual depth.

    So 0..4095 from a camera of 12 bits fills 0..255, and 0..65535 gives its high byte. Values outside 0..65535 are
    clipped.
    """
    import numpy as np

    largest = max(int(strip.max()) for _, strip in _strips(image))
    shift = next(depth for depth in _DEPTHS if largest < 2**depth) - 8
    values = np.empty((image.height, image.width), np.uint8)
    for top, strip in _strips(image):
        values[top : top + len(strip)] = strip >> shift
    grey: Image.Image = pillow().fromarray(values)
    return grey


def _strips(image: Image.Image) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.int64]]]]:
    """Rows of the picture, some at a time, each with the first's number: copies of all would take several times it."""
    import numpy as np

    step = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, step):
        strip = np.asarray(image.crop((0, top, image.width, min(top + step, image.height))))
        yield top, strip.astype(np.int64).clip(0, 65535)

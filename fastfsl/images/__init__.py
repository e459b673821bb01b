"""From a file, bytes, PIL image or array to the pixels an encoder sees, bit for bit as open_clip makes them.

Training and the runtime both come through here, so the two cannot drift. Two steps, which ``exact_pixels`` joins:

``open_image``
    decodes one source into a PIL image in mode L, LA, RGB or RGBA.
``preprocess``
    resizes, crops and converts it into a uint8 array ``(height, width, 3)``: open_clip 3.3's evaluation transform up
    to, not including, its ``ToTensor`` and ``Normalize`` (the exported encoder divides by 255 and normalises itself).

open_clip converts to RGB *after* it has resized, so the mode an image is opened in shows in the pixels: Pillow resizes
palette and 1-bit images by nearest neighbour and clips 16-bit ones to white. ``open_image`` therefore settles the mode:

========================================  =====================================================================
what the source holds                     what ``open_image`` returns
========================================  =====================================================================
RGB, L (grey), RGBA, LA                   the same mode; transparency is dropped after the resize, as in open_clip
palette                                   RGB; RGBA when it has transparency
1-bit                                     L, 0 or 255
16-bit grey (PNG, TIFF, PGM; I;16, I)     L, the high byte of each value (values outside 0..65535 are clipped)
grey of 8, 10, 12 or 14 bits stored so    L, scaled from the smallest of these ranges that holds its largest value
HEIC, HEIF                                RGB or RGBA, upright, where pillow-heif is installed; else DataError
CMYK, YCbCr, HSV, RGBX                    RGB, by Pillow's conversion
32-bit float (F), LAB                     DataError: it has no agreed range, or Pillow cannot convert it
animated (GIF, WebP, APNG), multi-page    the first frame
EXIF orientation 1-8                      turned upright; a PIL image as well, unless the tag was removed from it
more than ``MAX_PIXELS`` pixels           DataError, before anything is decoded; WebP, JPEG 2000, AVIF: half as many,
                                          HEIC and CMYK: three quarters
a file of more than 256 MiB               DataError, before it is read
zero pixels, truncated, not an image      DataError that names the source
no memory or file handles, a failing disk ResourceError: it says nothing about the image
========================================  =====================================================================

``fast_pixels`` has the same outcomes in less time, a few grey values off: it decodes JPEGs at a fraction of their size.
``PREPROCESS`` has the two by name.
"""

from typing import TYPE_CHECKING

from fastfsl.images.heif import HEIF_ENDINGS, avif_readable, heif_installed
from fastfsl.images.limits import MAX_FILE_BYTES, MAX_PIXELS
from fastfsl.images.locations import advice_on_missing, is_address, with_slashes
from fastfsl.images.opening import FORMATS, open_image, source_name
from fastfsl.images.prepared import PREPROCESS, exact_pixels, fast_pixels
from fastfsl.images.preprocessing import RESIZE_MODES, Preprocessing, preprocess

if TYPE_CHECKING:
    from fastfsl.images.opening import ImageSource as ImageSource  # of types alone, so not in `__all__`

__all__ = [
    "FORMATS",
    "HEIF_ENDINGS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "PREPROCESS",
    "RESIZE_MODES",
    "Preprocessing",
    "advice_on_missing",
    "avif_readable",
    "exact_pixels",
    "fast_pixels",
    "heif_installed",
    "is_address",
    "open_image",
    "preprocess",
    "source_name",
    "with_slashes",
]

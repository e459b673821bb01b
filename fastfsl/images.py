"""From a file, bytes, PIL image or array to the pixels an encoder sees, bit for bit as open_clip makes them.

Training and the runtime both come through here, so the two cannot drift. Two steps:

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
CMYK, YCbCr, HSV, RGBX                    RGB, by Pillow's conversion
32-bit float (F), LAB                     DataError: it has no agreed range, or Pillow cannot convert it
animated (GIF, WebP, APNG), multi-page    the first frame
EXIF orientation 1-8                      turned upright in files and bytes; a PIL image is taken as it stands
more than ``MAX_PIXELS`` pixels           DataError, before anything is decoded
zero pixels, truncated, not an image      DataError that names the source
========================================  =====================================================================
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastfsl.errors import ConfigError, DataError, ShapeError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray[Any, Any]

# Pillow's own error limit at its default settings (twice the 89.5 Mpx at which it warns): 537 MB of RGB.
MAX_PIXELS = 178_956_970

# What is tried on a file, whatever its extension. Left out on purpose: formats that run another program (EPS runs
# Ghostscript) and those nobody photographs in.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

RESIZE_MODES = ("shortest", "longest", "squash")

_EXIF_ORIENTATION = 0x0112
# The modes that open_clip's transform and ``preprocess`` treat alike, and the only ones ``open_image`` returns.
_PLAIN_MODES = ("L", "LA", "RGB", "RGBA")
_CONVERSIONS = {
    "1": "L",
    "P": "RGB",
    "PA": "RGBA",
    "RGBa": "RGBA",
    "La": "LA",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "HSV": "RGB",
    "RGBX": "RGB",
}
_PREPROCESSING_KEYS = ("image_size", "mean", "std", "interpolation", "resize_mode", "fill_color")


@dataclass(frozen=True)
class Preprocessing:
    """How an encoder wants its images.

    Args:
        image_size: (height, width) in pixels; one int means a square and is stored as a pair.
        mean: per-channel mean that the encoder subtracts, on the scale 0..1.
        std: per-channel standard deviation that the encoder divides by, on the scale 0..1.
        interpolation: "bicubic" or "bilinear" ("random", which open_clip evaluates as bicubic, is stored as that).
        resize_mode: "shortest" (resize the short edge, crop the centre), "longest" (resize the long edge, pad) or
            "squash" (resize both edges, ignoring the aspect ratio).
        fill_color: grey value 0..255 of the padding in "longest".

    Raises:
        DataError: a value is out of range; the message names the key.
    """

    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _size(self.image_size))
        object.__setattr__(self, "mean", _three_numbers("mean", self.mean))
        object.__setattr__(self, "std", _three_numbers("std", self.std))
        if min(self.std) <= 0:
            raise _bad_key("std", "three numbers above 0", self.std)
        if self.interpolation not in ("bicubic", "bilinear", "random"):
            raise _bad_key("interpolation", "'bicubic' or 'bilinear'", self.interpolation)
        if self.interpolation == "random":
            object.__setattr__(self, "interpolation", "bicubic")
        if self.resize_mode not in RESIZE_MODES:
            raise _bad_key("resize_mode", f"one of {', '.join(RESIZE_MODES)}", self.resize_mode)
        if not _is_int(self.fill_color) or not 0 <= self.fill_color <= 255:
            raise _bad_key("fill_color", "a whole number from 0 to 255", self.fill_color)

    @property
    def height(self) -> int:
        """Rows of the prepared image, in pixels."""
        return self.image_size[0]

    @property
    def width(self) -> int:
        """Columns of the prepared image, in pixels."""
        return self.image_size[1]

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON types, for a manifest."""
        return {
            "image_size": list(self.image_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            "fill_color": self.fill_color,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of ``to_dict``.

        Raises:
            DataError: a key is missing, unknown or out of range; the message names it.
        """
        if not isinstance(values, Mapping):
            raise DataError(f"preprocessing must be a mapping with the keys {_PREPROCESSING_KEYS}, got {values!r}")
        for key in _PREPROCESSING_KEYS:
            if key not in values:
                raise DataError(f"preprocessing has no {key!r}; it needs the keys {_PREPROCESSING_KEYS}")
        for key in values:
            if key not in _PREPROCESSING_KEYS:
                raise DataError(f"preprocessing has the unknown key {key!r}; it knows {_PREPROCESSING_KEYS}")
        return cls(**values)


def source_name(source: object) -> str:
    """How messages call an image source: its path, or what kind of object it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes | bytearray):
        return f"image bytes ({len(source)} bytes)"
    shape = getattr(source, "shape", None)
    if shape is not None:
        return f"array of shape {tuple(shape)}"
    size = getattr(source, "size", None)
    if isinstance(size, tuple) and len(size) == 2:
        return f"PIL image ({size[0]}x{size[1]} {getattr(source, 'mode', '')})"
    return f"object of type {type(source).__name__}"


def open_image(source: ImageSource) -> Image.Image:
    """Decode one image completely, upright and in a mode that open_clip's transform treats well.

    Args:
        source: path of an image file; the bytes of one; a PIL image; or a uint8 array of shape (H, W), (H, W, 1),
            (H, W, 3: RGB) or (H, W, 4: RGBA). The content decides the format, never the file name.

    Returns:
        A PIL image in mode L, LA, RGB or RGBA (the module's table says which). It may be the image passed in.

    Raises:
        DataError: the source is missing, not an image, truncated, empty or larger than MAX_PIXELS; it is named.
        ShapeError: an array of another shape or dtype.
        ConfigError: Pillow is not installed.
    """
    image_module = _pillow()
    name = source_name(source)
    if isinstance(source, str | os.PathLike):
        return _plain_mode(_decode(_read(Path(source)), name), name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _plain_mode(_decode(bytes(source), name), name)
    if isinstance(source, image_module.Image):
        if 0 in source.size:
            raise DataError(f"{name}: the image has no pixels")
        return _plain_mode(source, name)
    if hasattr(source, "__array_interface__"):
        return _from_array(source, name)
    raise DataError(f"{name}: expected a path, image bytes, a PIL image or a uint8 array (H, W, 3)")


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Resize, crop or pad, and convert to RGB: open_clip 3.3's evaluation transform before ``ToTensor``.

    Where open_clip fails (an edge of "longest" that rounds to zero pixels) the edge is one pixel.

    Args:
        image: what ``open_image`` returned.
        preprocessing: size and modes; ``mean`` and ``std`` are not applied here.

    Returns:
        uint8 array of shape (height, width, 3), C-contiguous.

    Raises:
        DataError: the image is so long and thin that its resized form would have more than MAX_PIXELS pixels.

    Source: open_clip 3.3 ``transform.image_transform(is_train=False)`` and the size arithmetic of torchvision's
    ``Resize`` and ``CenterCrop``.
    """
    import numpy as np

    image_module = _pillow()
    bicubic = image_module.Resampling.BICUBIC
    resample = bicubic if preprocessing.interpolation == "bicubic" else image_module.Resampling.BILINEAR
    target = preprocessing.image_size
    height, width = image.height, image.width

    fill = 0
    if preprocessing.resize_mode == "squash":
        size = target
    elif preprocessing.resize_mode == "longest":
        size = _size_keeping_ratio((height, width), target, max)
        fill = preprocessing.fill_color
    elif target[0] == target[1]:
        size = _size_of_short_edge((height, width), target[0])
    else:
        size = _size_keeping_ratio((height, width), target, min)
        resample = bicubic  # open_clip leaves the interpolation out here, whatever was configured

    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"an image of {width}x{height} pixels is too long and thin: resized to {size[1]}x{size[0]} it would pass "
            f"the limit of {MAX_PIXELS} pixels; crop it first"
        )
    if size != (height, width):
        image = image.resize((size[1], size[0]), resample)
    image = _center_crop_or_pad(image, target, fill)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _size_of_short_edge(size: tuple[int, int], target: int) -> tuple[int, int]:
    """As torchvision's ``Resize(int)``: the short edge becomes ``target``, the long one is rounded down."""
    height, width = size
    if width <= height:
        return int(target * height / width), target
    return target, int(target * width / height)


def _size_keeping_ratio(
    size: tuple[int, int], target: tuple[int, int], choose: Callable[[float, float], float]
) -> tuple[int, int]:
    """One ratio for both edges, rounded half to even; ``choose`` picks the larger or the smaller reduction."""
    ratio = choose(size[0] / target[0], size[1] / target[1])
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _center_crop_or_pad(image: Image.Image, target: tuple[int, int], fill: int) -> Image.Image:
    """The central ``target`` (height, width) of the image, padded first where it is smaller."""
    short_height, short_width = max(0, target[0] - image.height), max(0, target[1] - image.width)
    if short_height or short_width:
        # An odd missing pixel goes to the bottom or right. The fill covers every band, the transparency included.
        bands = len(image.getbands())
        canvas_size = (image.width + short_width, image.height + short_height)
        canvas = _pillow().new(image.mode, canvas_size, fill if bands == 1 else (fill,) * bands)
        canvas.paste(image, (short_width // 2, short_height // 2))
        image = canvas
    if image.size == (target[1], target[0]):
        return image
    top, left = round((image.height - target[0]) / 2.0), round((image.width - target[1]) / 2.0)
    return image.crop((left, top, left + target[1], top + target[0]))


def _read(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or device would block or never end."""
    try:
        if path.is_dir():
            raise DataError(f"{path}: expected an image file, this is a folder")
        if not path.exists():
            raise DataError(f"{path}: no such image file")
        if not path.is_file():
            raise DataError(f"{path}: expected an image file, this is not a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path; DataError is one too and passes through
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path!s}: the file cannot be read ({error})") from error


def _decode(data: bytes, name: str) -> Image.Image:
    """The first frame of an encoded image, fully decoded and turned upright."""
    image_module = _pillow()
    if not data:
        raise DataError(f"{name}: the file is empty; expected an image")
    image_module.init()
    formats = tuple(format_ for format_ in FORMATS if format_ in image_module.OPEN)
    try:
        image = image_module.open(io.BytesIO(data), formats=formats)
    except image_module.UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image, or damaged; fastfsl reads {', '.join(formats)}") from error
    except image_module.DecompressionBombError as error:
        raise DataError(f"{name}: more than {MAX_PIXELS} pixels; make it smaller ({error})") from error
    except Exception as error:  # on hostile bytes Pillow's readers raise a dozen types, and plain ones
        raise DataError(f"{name}: the image cannot be decoded ({type(error).__name__}: {error})") from error
    width, height = image.size
    # Pillow's own limit can be switched off by the program around us; this one cannot.
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width}x{height} is more than {MAX_PIXELS} pixels; make it smaller")
    if width * height == 0:
        raise DataError(f"{name}: the image has no pixels")
    try:
        image.load()
    except Exception as error:  # as above
        raise DataError(
            f"{name}: the image is truncated or damaged ({type(error).__name__}: {error}); replace the file"
        ) from error
    return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """Undo the EXIF orientation. An EXIF block that cannot be parsed does not cost the picture."""
    transpose = _pillow().Transpose
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - Pillow's EXIF parser raises many types on damaged blocks
        return image
    operations = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }
    operation = operations.get(orientation) if _is_int(orientation) else None
    return image if operation is None else image.transpose(operation)


def _plain_mode(image: Image.Image, name: str) -> Image.Image:
    """The image in mode L, LA, RGB or RGBA, by the table of this module."""
    if image.mode in _PLAIN_MODES:
        if image.mode in ("L", "RGB") and "transparency" in image.info:
            # A colour key: Pillow would carry it through the conversion to RGB, where it means nothing.
            image = image.copy()
            del image.info["transparency"]
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _high_byte(image)
    target = _CONVERSIONS.get(image.mode)
    if target is None:
        raise DataError(f"{name}: images of mode {image.mode} have no agreed range; save it as 8-bit RGB or grey")
    if image.mode == "P" and "transparency" in image.info:
        target = "RGBA"
    try:
        return image.convert(target)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: mode {image.mode} cannot be converted to {target} ({error})") from error


def _high_byte(image: Image.Image) -> Image.Image:
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    grey: Image.Image = _pillow().fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    return grey


def _from_array(source: object, name: str) -> Image.Image:
    import numpy as np

    array = np.asarray(source)
    if array.dtype != np.uint8:
        raise ShapeError(f"{name}: expected dtype uint8 with values 0..255, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ShapeError(f"{name}: expected (H, W), (H, W, 3) or (H, W, 4): one image, channels last")
    if array.size == 0:
        raise DataError(f"{name}: the image has no pixels")
    image: Image.Image = _pillow().fromarray(np.ascontiguousarray(array))
    return image


def _pillow() -> ModuleType:
    """PIL.Image, imported on first use so that importing the runtime stays cheap."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("images need Pillow: pip install 'fastfsl[cpu]' or 'fastfsl[gpu]'") from error
    return Image


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(value: object) -> tuple[int, int]:
    pair = (value, value) if _is_int(value) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(_is_int(v) and 1 <= v <= 8192 for v in pair):
        raise _bad_key("image_size", "one whole number or (height, width), from 1 to 8192", value)
    return pair[0], pair[1]


def _three_numbers(key: str, value: object) -> tuple[float, float, float]:
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise _bad_key(key, "three numbers", value)
    if not all((_is_int(v) or isinstance(v, float)) and abs(v) <= 1e6 for v in value):  # refuses NaN as well
        raise _bad_key(key, "three finite numbers", value)
    return float(value[0]), float(value[1]), float(value[2])


def _bad_key(key: str, expected: str, got: object) -> DataError:
    return DataError(f"preprocessing {key!r} must be {expected}, got {got!r}")

"""open_clip's evaluation transform up to ``ToTensor``, in Pillow and numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fastfsl.errors import DataError
from fastfsl.images.limits import MAX_PIXELS
from fastfsl.images.pillow import pillow

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

RESIZE_MODES = ("shortest", "longest", "squash")

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

    height, width, resample, fill = resized(image.height, image.width, preprocessing)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), resample)
    image = center_crop_or_pad(image, preprocessing.image_size, fill)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


class Resized(NamedTuple):
    """What an image is resized to before its centre is cut out.

    Args:
        height: rows, in pixels.
        width: columns, in pixels.
        resample: Pillow's filter.
        fill: grey value 0..255 of the padding, where the image is smaller than the encoder's.
    """

    height: int
    width: int
    resample: int
    fill: int


def resized(height: int, width: int, preprocessing: Preprocessing) -> Resized:
    """Size and filter of the resize of an image of ``height`` x ``width`` pixels.

    Raises:
        DataError: it would have more than MAX_PIXELS pixels.
    """
    resampling = pillow().Resampling
    resample = resampling.BICUBIC if preprocessing.interpolation == "bicubic" else resampling.BILINEAR
    target = preprocessing.image_size
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
        resample = resampling.BICUBIC  # open_clip leaves the interpolation out here, whatever was configured

    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"an image of {width}x{height} pixels is too long and thin: resized to {size[1]}x{size[0]} it would pass "
            f"the limit of {MAX_PIXELS} pixels; crop it first"
        )
    return Resized(*size, resample, fill)


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


def center_crop_or_pad(image: Image.Image, target: tuple[int, int], fill: int) -> Image.Image:
    """The central ``target`` (height, width) of the image, padded first where it is smaller."""
    short_height, short_width = max(0, target[0] - image.height), max(0, target[1] - image.width)
    if short_height or short_width:
        # An odd missing pixel goes to the bottom or right. The fill covers every band, the transparency included.
        bands = len(image.getbands())
        canvas_size = (image.width + short_width, image.height + short_height)
        canvas = pillow().new(image.mode, canvas_size, fill if bands == 1 else (fill,) * bands)
        canvas.paste(image, (short_width // 2, short_height // 2))
        image = canvas
    if image.size == (target[1], target[0]):
        return image
    top, left = round((image.height - target[0]) / 2.0), round((image.width - target[1]) / 2.0)
    return image.crop((left, top, left + target[1], top + target[0]))


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

"""From a file, bytes, PIL image or array to a PIL image, upright and in one of four modes."""

from __future__ import annotations

import os
import stat
import warnings
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from fastfsl.errors import DataError, ResourceError, ShapeError, memory_error, resource_error
from fastfsl.images.file_objects import read_object
from fastfsl.images.grey_levels import eight_bits
from fastfsl.images.heif import is_heif, load_heif
from fastfsl.images.limits import MAX_FILE_BYTES, MAX_PIXELS
from fastfsl.images.locations import advice_on_missing, is_address
from fastfsl.images.pillow import load_formats, pillow

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    class FileObject(Protocol):
        """An open binary file, `io.BytesIO`, or whatever else has bytes to read."""

        def read(self, size: int = ..., /) -> bytes:
            """At most so many bytes; none at the end."""

    ImageSource = (
        str | os.PathLike[str] | bytes | bytearray | memoryview | FileObject | Image.Image | np.ndarray[Any, Any]
    )

# Decoders that hold a picture several times over, at up to 16 bytes a pixel.
_GREEDY_FORMATS = ("WEBP", "JPEG2000", "AVIF")

# What is tried on a file, whatever its extension. Left out on purpose: formats that run another program (EPS runs
# Ghostscript) and those nobody photographs in.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

# A pipe or device put in a file's place after it was looked at must not block.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)

_EXIF_ORIENTATION = 0x0112
# Where a picture's info may hold its orientation.
_EXIF_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type xmp")
# The most that a picture takes while it is decoded, and what the rest of the process may be about to take.
_BYTES_PER_PIXEL, _SPARE_BYTES = 16, 64 * 2**20
# A PIL image that was opened but not decoded yet is decoded in place, and may be handed over twice.
_decoding_in_place = Lock()
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


def _new_lock() -> None:
    """Another thread's lock stays locked in a child that is forked."""
    global _decoding_in_place  # noqa: PLW0603 - one for the process
    _decoding_in_place = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


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
        source: path of an image file; the bytes of one; a file open for reading bytes, such as `io.BytesIO`, which is
            read whole and put back where it stood; a PIL image; or a uint8 array of shape (H, W), (H, W, 1), (H, W, 3:
            RGB) or (H, W, 4: RGBA). The content decides the format, never the file name.

    Returns:
        A PIL image in mode L, LA, RGB or RGBA: the table of ``fastfsl.images`` says which. It may be the image that was
            passed in.

    Raises:
        DataError: the source is missing, not an image, truncated, empty, a file of more than MAX_FILE_BYTES or larger
            than MAX_PIXELS; it is named.
        ShapeError: an array of another shape or dtype.
        ResourceError: the machine has no memory or file handles left, or its storage fails; the image may be good.
        ConfigError: Pillow is not installed.
    """
    name = source_name(source)
    try:
        image, encoded = open_header(source, name)
        return plain_mode(upright(load_pixels(image, name) if encoded else image), name)
    except MemoryError as error:  # while it is turned or converted
        raise memory_error(f"read the image {name}") from error


def open_header(source: ImageSource, name: str) -> tuple[Image.Image, bool]:
    """An image whose format and size are known and allowed, and whether its pixels are still encoded.

    Errors as for ``open_image``.
    """
    image_module = pillow()
    # Before any file is open: Pillow passes over a format whose module cannot be imported for want of a file handle.
    load_formats()
    if isinstance(source, str | os.PathLike):
        if is_address(name) and not os.path.lexists(name):  # a Path would make one slash of two
            raise DataError(f"{name}: no such image file{advice_on_missing(name)}")
        return _identify(_read(Path(source)), name), True
    if isinstance(source, bytes | bytearray | memoryview):
        return _identify(bytes(source), name), True
    if isinstance(source, image_module.Image):
        _check_size(source, name)
        with _decoding_in_place:
            image = load_pixels(source, name)
            _warn_of_derived(image, name)
        return image, False
    if hasattr(source, "__array_interface__"):
        return _from_array(source, name), False
    if hasattr(source, "read"):
        return _identify(read_object(source, name), name), True
    raise DataError(f"{name}: expected a path, image bytes, a file object, a PIL image or a uint8 array (H, W, 3)")


def _warn_of_derived(image: Image.Image, name: str) -> None:
    """Say that an image is turned which its user may have turned already: Pillow leaves the tag on all but its own."""
    if hasattr(image, "tile"):  # opened from a file, and as it is there
        return
    turned = orientation(image)
    if turned != 1:
        warnings.warn(
            f"{name}: it carries EXIF orientation {turned} and is turned upright; if that was done before, use "
            "PIL.ImageOps.exif_transpose, which removes the tag",
            stacklevel=2,
        )


def _read(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or device would block or never end."""
    try:
        _check_regular(path, path.stat().st_mode)
        with os.fdopen(os.open(path, _FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            _check_regular(path, status.st_mode)
            size = status.st_size
            if size > MAX_FILE_BYTES:
                raise DataError(
                    f"{path}: expected an image file of at most {MAX_FILE_BYTES} bytes, got {size}; save it smaller or "
                    "compressed"
                )
            return file.read(size)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: no such image file{advice_on_missing(str(path))}") from error
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a NUL in the path; DataError is one too
        if isinstance(error, DataError):
            raise
        raise _machine_fault(error, path) or DataError(f"{path!s}: the file cannot be read ({error})") from error


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: expected an image file, this is a folder")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: expected an image file, this is not a regular file")


def _machine_fault(error: BaseException, name: object) -> ResourceError | None:
    return resource_error(error, f"read the image {name}")


def _identify(data: bytes, name: str) -> Image.Image:
    """The first frame of an encoded image, its size allowed, its pixels not decoded."""
    image_module = pillow()
    if not data:
        raise DataError(f"{name}: the file is empty; expected an image")
    formats = tuple(format_ for format_ in FORMATS if format_ in image_module.OPEN)
    heif = is_heif(data)
    if heif:
        load_heif(name)
    try:
        image: Image.Image = image_module.open(BytesIO(data), formats=("HEIF",) if heif else formats)
    except image_module.UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image, or damaged; fastfsl reads {', '.join(formats)}") from error
    except image_module.DecompressionBombError as error:
        raise DataError(f"{name}: more than {MAX_PIXELS} pixels; resize it to fewer ({error})") from error
    except Exception as error:  # on hostile bytes Pillow's readers raise a dozen types, and plain ones
        raise _machine_fault(error, name) or DataError(
            f"{name}: the image cannot be decoded ({type(error).__name__}: {error})"
        ) from error
    _check_size(image, name)
    return image


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    # Pillow's own limit can be switched off by the program around us; this one cannot.
    most = MAX_PIXELS
    if image.format in _GREEDY_FORMATS:
        most = MAX_PIXELS // 2
    # 12 bytes a pixel: a CMYK picture of a progressive JPEG, or as it was, turned, and in RGB; a HEIC with its planes.
    elif image.mode == "CMYK" or image.format == "HEIF":
        most = MAX_PIXELS * 3 // 4
    if width * height > most:
        raise _too_large(name, width, height, most)
    if width * height == 0:
        raise DataError(f"{name}: the image has no pixels")


def _too_large(name: str, width: int, height: int, most: int) -> DataError:
    return DataError(f"{name}: {width}x{height} is more than {most} pixels, got {width * height}; resize it to fewer")


def load_pixels(image: Image.Image, name: str) -> Image.Image:
    """The same image, its pixels decoded.

    Raises:
        DataError: they are truncated or damaged; the source is named.
        ResourceError: there is no memory for them.
    """
    try:
        image.load()
    except Exception as error:  # on hostile bytes Pillow's decoders raise a dozen types as well
        if isinstance(error, OSError) and "out of memory" in str(error) and _is_memory_short(image):
            raise memory_error(f"read the image {name}") from error
        raise _machine_fault(error, name) or DataError(
            f"{name}: the image is truncated or damaged ({type(error).__name__}: {error}); replace the file"
        ) from error
    return image


def _is_memory_short(image: Image.Image) -> bool:
    """Whether there is no room for a picture of this size.

    Pillow's decoders also say "out of memory" of a file whose inner sizes are absurd, and that is the file's fault.
    """
    try:
        bytearray(_BYTES_PER_PIXEL * image.width * image.height + _SPARE_BYTES)
    except MemoryError:
        return True
    return False


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. An EXIF block that cannot be parsed does not cost the picture: 1, as without one."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - Pillow's EXIF parser raises many types on damaged blocks
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation undone."""
    return turn(image, orientation(image))


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """The image as a camera that wrote this EXIF orientation, 1 to 8, saw it."""
    transpose = pillow().Transpose
    operations = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }
    operation = operations.get(orientation)
    if operation is None:
        return image
    turned = image.transpose(operation)
    for key in _EXIF_KEYS:  # Pillow keeps them, and whoever is given the picture would turn it again
        turned.info.pop(key, None)
    return turned


def plain_mode(image: Image.Image, name: str) -> Image.Image:
    """The image in mode L, LA, RGB or RGBA, by the table of ``fastfsl.images``."""
    if image.mode in _PLAIN_MODES:
        if image.mode in ("L", "RGB") and "transparency" in image.info:
            # A colour key: Pillow would carry it through the conversion to RGB, where it means nothing.
            image = image.copy()
            del image.info["transparency"]
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return eight_bits(image)
    target = _CONVERSIONS.get(image.mode)
    if target is None:
        raise DataError(f"{name}: images of mode {image.mode} have no agreed range; save it as 8-bit RGB or grey")
    if image.mode == "P" and "transparency" in image.info:
        target = "RGBA"
    try:
        return image.convert(target)
    except (OSError, ValueError) as error:
        raise _machine_fault(error, name) or DataError(
            f"{name}: mode {image.mode} cannot be converted to {target} ({error})"
        ) from error


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
    height, width = array.shape[:2]
    if width * height > MAX_PIXELS:
        raise _too_large(name, width, height, MAX_PIXELS)
    image: Image.Image = pillow().fromarray(np.ascontiguousarray(array))
    return image

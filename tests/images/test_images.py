"""Opening images, and the exact agreement of ``preprocess`` with open_clip's own transform."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image, ImageOps

from fastfsl import images
from fastfsl.errors import DataError, FastFSLError, ShapeError
from fastfsl.images import Preprocessing, open_image, preprocess, source_name

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def _spec(image_size=32, **changes) -> Preprocessing:
    return Preprocessing(image_size=image_size, mean=MEAN, std=STD, **changes)


def _noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    array = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(array[:, :, band]) for band in range(bands)])


def _open_clip_pixels(image: Image.Image, spec: Preprocessing) -> np.ndarray:
    """open_clip's transform without its last two steps, ToTensor and Normalize."""
    transform = image_transform(
        spec.image_size,
        is_train=False,
        mean=spec.mean,
        std=spec.std,
        resize_mode=spec.resize_mode,
        interpolation=spec.interpolation,
        fill_color=spec.fill_color,
    )
    for step in transform.transforms[:-2]:
        image = step(image)
    return np.asarray(image)


def _encoded(image: Image.Image, format_: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


# Edges of 1 (aspect ratios up to 300), the target itself and its neighbours, and the sizes of photographs scaled down.
_edges = st.one_of(st.integers(1, 300), st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 225, 400]))


@settings(max_examples=150, deadline=None)
@given(
    width=_edges,
    height=_edges,
    mode=st.sampled_from(["RGB", "L", "RGBA", "LA"]),
    target=st.sampled_from([(32, 32), (1, 1), (33, 33), (24, 40), (41, 17)]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    fill_color=st.sampled_from([0, 127]),
)
@example(1, 1, "RGB", (32, 32), "bicubic", "shortest", 0)
@example(32, 32, "RGBA", (32, 32), "bicubic", "shortest", 0)
@example(300, 1, "RGB", (32, 32), "bicubic", "shortest", 0)
@example(33, 64, "RGB", (24, 40), "bilinear", "shortest", 0)
@example(7, 32, "LA", (32, 32), "bicubic", "longest", 127)
def test_preprocess_equals_open_clip(width, height, mode, target, interpolation, resize_mode, fill_color):
    spec = _spec(target, interpolation=interpolation, resize_mode=resize_mode, fill_color=fill_color)
    image = _noise(width, height, mode, seed=width * 1000 + height)
    try:
        expected = _open_clip_pixels(image, spec)
    except ValueError:  # open_clip cannot resize to zero pixels; the documented outcome here is one pixel
        assert resize_mode == "longest"
        assert preprocess(image, spec).shape == (*target, 3)
        return
    pixels = preprocess(open_image(image), spec)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("size", [(400, 533), (533, 400), (1023, 767)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_photo_sizes_at_224_equal_open_clip(size, resize_mode, tmp_path):
    path = tmp_path / "photo.jpg"
    _noise(*size).save(path, quality=90)
    spec = _spec(224, resize_mode=resize_mode)
    with Image.open(path) as image:
        expected = _open_clip_pixels(image, spec)
    np.testing.assert_array_equal(preprocess(open_image(path), spec), expected)


def test_long_thin_images_are_refused_before_they_are_resized():
    with pytest.raises(DataError, match="too long and thin"):
        preprocess(Image.new("L", (1, 60_000)), _spec(224))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_to_files(orientation, format_):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    data = _encoded(upright, format_, exif=exif)
    with Image.open(io.BytesIO(data)) as raw:
        expected = ImageOps.exif_transpose(raw)
        np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(expected))
    assert open_image(data).size == ((32, 48) if orientation >= 5 else (48, 32))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_a_damaged_exif_block_does_not_cost_the_picture():
    data = _encoded(_noise(9, 5), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff")
    assert open_image(data).size == (9, 5)


def _palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    if transparent:
        image.info["transparency"] = 0
    return image


def _sixteen_bit() -> Image.Image:
    return Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16))


def _with_color_key() -> Image.Image:
    image = Image.new("L", (2, 1), 7)
    image.info["transparency"] = 7
    return image


@pytest.mark.parametrize(
    ("image", "mode", "pixels"),
    [
        (_palette(False), "RGB", [[[255, 0, 0], [0, 0, 255]]]),
        (_palette(True), "RGBA", [[[255, 0, 0, 0], [0, 0, 255, 255]]]),
        (Image.fromarray(np.array([[True, False]])), "L", [[255, 0]]),
        (_sixteen_bit(), "L", [[0, 0, 1, 255]]),
        (Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16)).convert("I"), "L", [[0, 1, 255]]),
        (Image.new("LA", (1, 1), (9, 3)), "LA", [[[9, 3]]]),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 4)), "RGBA", [[[1, 2, 3, 4]]]),
        (_with_color_key(), "L", [[7, 7]]),
    ],
    ids=["palette", "palette-transparent", "1-bit", "16-bit", "32-bit-int", "LA", "RGBA", "color-key"],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_every_mode_has_one_outcome(image, mode, pixels, as_file):
    # PNG has no 32-bit integers; its writer takes the palette's transparency from the options, not from the image.
    options = {"transparency": 0} if mode == "RGBA" and image.mode == "P" else {}
    source = _encoded(image, "TIFF" if image.mode == "I" else "PNG", **options)
    opened = open_image(source if as_file else image)
    assert opened.mode == mode
    assert opened.mode != "L" or "transparency" not in opened.info
    np.testing.assert_array_equal(np.asarray(opened), np.array(pixels))
    assert preprocess(opened, _spec(8)).shape == (8, 8, 3)


def test_cmyk_jpeg_becomes_the_rgb_that_pillow_makes_of_it():
    data = _encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    opened = open_image(data)
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened).astype(int) - [255, 0, 0]).max() < 12


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for format_ in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format_ == "WEBP" else {}
        opened = open_image(_encoded(frames[0], format_, save_all=True, append_images=frames[1:], **options))
        assert opened.convert("RGB").getpixel((4, 4)) == (255, 0, 0), format_


def test_the_content_decides_the_format_not_the_extension(tmp_path):
    path = tmp_path / "really-a-png.jpg"
    path.write_bytes(_encoded(_noise(5, 4), "PNG"))
    np.testing.assert_array_equal(np.asarray(open_image(str(path))), np.asarray(_noise(5, 4)))


def _png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _truncated_jpeg() -> bytes:
    data = _encoded(_noise(64, 64), "JPEG")
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"plainly not an image", "not an image"),
        (b"\xff\xd8\xff", "not an image|decoded|truncated"),
        (_truncated_jpeg(), "truncated"),
        (_encoded(_noise(64, 64), "PNG")[:-2000], "truncated"),
        (_png_claiming(20_000, 20_000), "more than 89478485 pixels"),
        (_png_claiming(0, 5), "no pixels|not an image|decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
        (_encoded(Image.new("F", (2, 2)), "TIFF"), "mode F"),
        (_encoded(Image.new("LAB", (2, 2)), "TIFF"), "mode LAB"),
    ],
    ids=["empty", "text", "stub", "truncated-jpeg", "truncated-png", "bomb", "zero-pixels", "eps", "float", "lab"],
)
def test_hostile_files_raise_data_errors_that_name_them(data, message, tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match=f"image bytes \\({len(data)} bytes\\)"):
        open_image(data)


def test_the_pixel_limit_holds_when_pillows_is_switched_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match="more than 89478485 pixels"):
        open_image(_png_claiming(20_000, 20_000))


def test_what_is_too_large_is_told_the_limit_its_size_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("fastfsl.images.opening.MAX_PIXELS", 100)
    for source in (_encoded(_noise(11, 10), "PNG"), _noise(11, 10), np.zeros((10, 11, 3), np.uint8)):
        with pytest.raises(DataError, match="11x10 is more than 100 pixels, got 110; resize it to fewer"):
            open_image(source)
    for shape in ((10, 10), (100, 1, 3), (1, 100, 4)):
        assert open_image(np.zeros(shape, np.uint8)).size == shape[1::-1]


def test_files_of_any_size_are_not_read(monkeypatch, tmp_path):
    """A picture may be followed by anything, and a sparse file takes no room on a disk."""
    path = tmp_path / "long.png"
    path.write_bytes(_encoded(_noise(11, 10), "PNG"))
    with path.open("ab") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(DataError, match="at most 268435456 bytes, got 268435457; save it smaller") as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    os.truncate(path, 5000)
    monkeypatch.setattr("fastfsl.images.opening.MAX_FILE_BYTES", 5000)
    assert open_image(path).size == (11, 10)
    monkeypatch.setattr("fastfsl.images.opening.MAX_FILE_BYTES", 4999)
    with pytest.raises(DataError, match="at most 4999 bytes"):
        open_image(path)


@pytest.mark.parametrize(("format_", "most"), [("WEBP", 50), ("JPEG2000", 50), ("PNG", 100)])
def test_decoders_that_take_more_memory_get_smaller_pictures(monkeypatch, format_, most):
    monkeypatch.setattr("fastfsl.images.opening.MAX_PIXELS", 100)
    assert open_image(_encoded(_noise(most // 10, 10), format_)).size == (most // 10, 10)
    with pytest.raises(DataError, match=f"is more than {most} pixels"):
        open_image(_encoded(_noise(most // 10 + 1, 10), format_))


def test_pictures_for_print_may_be_three_quarters_as_large(monkeypatch):
    monkeypatch.setattr("fastfsl.images.opening.MAX_PIXELS", 100)
    picture = _noise(75, 1).convert("CMYK")
    assert open_image(_encoded(picture, "JPEG")).size == (75, 1)
    for format_ in ("JPEG", "TIFF"):
        with pytest.raises(DataError, match="is more than 75 pixels"):
            open_image(_encoded(picture.resize((76, 1)), format_))


def test_a_deep_grey_picture_is_read_in_strips(monkeypatch):
    """Numpy's copies of a whole one would take several times its memory."""
    values = np.arange(7 * 5, dtype=np.uint16).reshape(7, 5) * 1800
    monkeypatch.setattr("fastfsl.images.grey_levels._STRIP_PIXELS", 11)
    np.testing.assert_array_equal(np.asarray(open_image(_encoded(Image.fromarray(values), "PNG"))), values >> 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_between_pillows_warning_and_the_limit_an_image_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert open_image(_encoded(_noise(9, 9), "PNG")).size == (9, 9)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about some kinds of damage and reads on
@settings(max_examples=200, deadline=None)
@given(
    format_=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=12),
    keep=st.integers(1, 100),
)
def test_damaged_files_raise_only_data_errors(format_, edits, keep):
    data = bytearray(_encoded(_noise(16, 12), format_))
    for position, value in edits:
        data[position % len(data)] = value
    try:
        pixels = preprocess(open_image(bytes(data[: len(data) * keep // 100])), _spec(8))
    except DataError:
        return
    assert pixels.shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.png", "no such image"),
        (lambda folder: folder, "folder"),
        (lambda folder: Path("/dev/null"), "not a regular file"),
        (lambda folder: "nul\0byte.png", "no such image|cannot be read"),
    ],
    ids=["missing", "folder", "device", "nul"],
)
def test_paths_that_are_no_files(make, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_image(make(tmp_path))


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3), (5, 4, 4)])
def test_arrays_become_the_image_they_hold(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(open_image(array)).reshape(shape), array)
    np.testing.assert_array_equal(np.asarray(open_image(array[:, ::-1])).reshape(shape), array[:, ::-1])


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (np.zeros((4, 4, 3), np.float32), ShapeError),
        (np.zeros((3, 4, 4), np.uint8)[None], ShapeError),
        (np.zeros((4, 4, 2), np.uint8), ShapeError),
        (np.zeros((0, 4, 3), np.uint8), DataError),
        (np.zeros((), np.uint8), ShapeError),
        (Image.new("RGB", (0, 3)), DataError),
        (None, DataError),
        (7, DataError),
    ],
    ids=["float", "batch", "two-channels", "no-rows", "scalar", "pil-empty", "none", "int"],
)
def test_objects_that_are_no_images(source, error):
    with pytest.raises(error) as caught:
        open_image(source)
    assert source_name(source) in str(caught.value)


def test_preprocessing_round_trips_and_normalises_its_values():
    spec = _spec(32, interpolation="random", resize_mode="longest", fill_color=3)
    assert spec.image_size == (spec.height, spec.width) == (32, 32)
    assert spec.interpolation == "bicubic"
    assert Preprocessing.from_dict(spec.to_dict()) == spec
    assert _spec([24, 40]).image_size == (24, 40)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 0),
        ("image_size", True),
        ("image_size", (32,)),
        ("image_size", "32"),
        ("image_size", 32.0),
        ("image_size", 10**9),
        ("mean", (0.1, 0.2)),
        ("mean", (0.1, 0.2, float("nan"))),
        ("mean", (0.1, 0.2, 10**400)),
        ("std", (0.1, 0.0, 0.2)),
        ("std", 0.5),
        ("interpolation", "nearest"),
        ("interpolation", ["bicubic"]),
        ("resize_mode", "crop"),
        ("fill_color", 256),
        ("fill_color", 0.5),
    ],
)
def test_preprocessing_errors_name_the_key(key, value):
    values = {**_spec().to_dict(), key: value}
    with pytest.raises(DataError, match=key):
        Preprocessing.from_dict(values)


def test_preprocessing_keys_are_exact():
    values = _spec().to_dict()
    with pytest.raises(DataError, match="'mean'"):
        Preprocessing.from_dict({key: value for key, value in values.items() if key != "mean"})
    with pytest.raises(DataError, match="'gamma'"):
        Preprocessing.from_dict({**values, "gamma": 1})
    with pytest.raises(DataError, match="mapping"):
        Preprocessing.from_dict([1])  # type: ignore[arg-type]  # a manifest can hold anything here


def test_missing_pillow_names_the_extra(monkeypatch):
    import builtins

    real_import = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name == "PIL":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(FastFSLError, match=r"fastfsl\[cpu\]"):
        images.open_image(b"x")


def test_every_public_name_of_the_package_is_there():
    names: dict[str, object] = {}
    exec("from fastfsl.images import *", names)  # as someone types it
    assert "open_image" in names

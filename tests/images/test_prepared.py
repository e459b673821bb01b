"""`fast_pixels` has the outcomes of `exact_pixels`, decodes no more than it needs and is a few grey values off."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from fastfsl.errors import DataError, ShapeError
from fastfsl.images import Preprocessing, exact_pixels, fast_pixels, open_image, preprocess
from fastfsl.images.prepared import MARGIN
from fastfsl.images.preprocessing import resized

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def _spec(image_size=32, **changes) -> Preprocessing:
    return Preprocessing(image_size=image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **changes)


def _picture(width: int, height: int) -> Image.Image:
    """Smooth, so that a smaller decoding loses nothing, and unlike its mirror images and shifts."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    bands = np.stack([x, y, (x * y) ** 2], axis=-1)
    return Image.fromarray((20 + 215 * bands).astype(np.uint8))


def _encoded(image: Image.Image, format_: str = "JPEG", turned: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turned
    buffer = io.BytesIO()
    image.save(buffer, format_, exif=exif, **({"quality": 95} if format_ == "JPEG" else {"lossless": True}), **options)
    return buffer.getvalue()


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@settings(max_examples=120, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    turned=st.integers(1, 8),
    format_=st.sampled_from(FORMATS),
    target=st.sampled_from([(32, 32), (24, 40), (16, 16), (33, 17)]),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
)
@example(97, 99, 6, "JPEG", (32, 32), "shortest")
@example(99, 197, 7, "JPEG", (33, 17), "longest")
@example(257, 101, 8, "JPEG", (24, 40), "shortest")
@example(100, 300, 3, "PNG", (33, 17), "squash")
def test_fast_is_a_few_grey_values_off(width, height, turned, format_, target, resize_mode):
    data = _encoded(_picture(width, height), format_, turned)
    spec = _spec(target, resize_mode=resize_mode, fill_color=127 if resize_mode == "longest" else 0)
    exact, fast = exact_pixels(data, spec), fast_pixels(data, spec)
    np.testing.assert_array_equal(exact, preprocess(open_image(data), spec))
    assert fast.dtype == np.uint8
    assert fast.shape == exact.shape
    assert fast.flags.c_contiguous
    # One pixel of a 32-pixel picture is 6.7 grey values: a crop beside its place, or a turn too many, shows.
    assert _difference(exact, fast) <= 1.5


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    turned=st.integers(1, 8),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
)
@example(96, 96, 1, "shortest")
@example(95, 96, 1, "shortest")
@example(97, 600, 6, "longest")
def test_a_jpeg_is_decoded_as_small_as_the_margin_allows(width, height, turned, resize_mode):
    decoded = []
    load = JpegImagePlugin.JpegImageFile.load_prepare

    def watched(image):
        decoded.append(image.size)
        load(image)

    spec = _spec((32, 32), resize_mode=resize_mode)
    data = _encoded(Image.new("RGB", (width, height)), turned=turned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JpegImagePlugin.JpegImageFile, "load_prepare", watched)
        fast_pixels(data, spec)
    to = resized(*((width, height) if turned >= 5 else (height, width)), spec)
    to_width, to_height = (to.height, to.width) if turned >= 5 else (to.width, to.height)
    scale = max((s for s in (2, 4, 8) if s * MARGIN <= min(width / to_width, height / to_height)), default=1)
    assert set(decoded) == {(-(-width // scale), -(-height // scale))}


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_every_kind_of_jpeg_has_the_same_outcome(mode, options):
    data = _encoded(_picture(301, 203).convert(mode), **options)
    assert _difference(exact_pixels(data, _spec()), fast_pixels(data, _spec())) <= 1.5


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_every_mode_has_the_same_outcome(mode):
    picture = _picture(201, 103)
    image = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) << 8) if mode == "I;16" else None
    buffer = io.BytesIO()
    (image or picture.convert(mode)).save(buffer, "PNG")
    assert _difference(exact_pixels(buffer.getvalue(), _spec()), fast_pixels(buffer.getvalue(), _spec())) <= 1.5


def test_of_several_pictures_in_a_file_the_first_is_read():
    pictures = [_picture(300, 200), Image.new("RGB", (300, 200), "blue")]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "MPO", save_all=True, append_images=pictures[1:])
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        assert image.format == "MPO"
    assert _difference(exact_pixels(buffer.getvalue(), _spec()), fast_pixels(buffer.getvalue(), _spec())) <= 1.5


def test_a_truncated_jpeg_fails_where_it_fails_when_decoded_whole():
    for progressive in (False, True):
        data = _encoded(_picture(160, 128), progressive=progressive)
        outcomes: list[list[str]] = []
        for prepare in (exact_pixels, fast_pixels):
            outcomes.append([])
            for end in range(1, len(data), 97):
                try:
                    prepare(data[:end], _spec())
                except DataError as error:
                    outcomes[-1].append(str(error))
                else:
                    outcomes[-1].append("read")
        assert [words.split(":")[:2] for words in outcomes[0]] == [words.split(":")[:2] for words in outcomes[1]]
        assert all("truncated" in words.lower() or "not an image" in words for words in outcomes[0][:-1])


def test_the_size_that_is_allowed_is_that_of_the_file(monkeypatch):
    data = _encoded(_picture(300, 200))
    monkeypatch.setattr("fastfsl.images.opening.MAX_PIXELS", 59_999)
    for source in (data, Image.open(io.BytesIO(data))):
        for prepare in (exact_pixels, fast_pixels):
            with pytest.raises(DataError, match="300x200 is more than 59999 pixels"):
                prepare(source, _spec())


def test_a_pil_image_of_the_caller_is_not_decoded_smaller():
    with Image.open(io.BytesIO(_encoded(_picture(300, 200)))) as image:
        fast_pixels(image, _spec())
        assert image.size == (300, 200)
        assert np.asarray(image).shape == (200, 300, 3)


@pytest.mark.parametrize("prepare", [exact_pixels, fast_pixels])
def test_errors_name_the_source(prepare, tmp_path):
    path = tmp_path / "thread.png"
    Image.new("L", (1, 3_000_000)).save(path)
    with pytest.raises(DataError, match=r"thread\.png: .* too long and thin"):
        prepare(path, _spec(224))
    with pytest.raises(DataError, match=r"missing\.jpg: no such image"):
        prepare(tmp_path / "missing.jpg", _spec())
    with pytest.raises(ShapeError, match="float64"):
        prepare(np.ones((3, 3)), _spec())


@pytest.mark.parametrize("prepare", [exact_pixels, fast_pixels])
def test_a_pil_image_that_is_not_decoded_yet_may_be_bad_or_handed_over_twice(prepare):
    data = _encoded(_picture(900, 700))
    truncated = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(DataError, match=r"PIL image \(900x700 RGB\): the image is truncated"):
        prepare(truncated, _spec())
    expected = prepare(Image.fromarray(np.asarray(Image.open(io.BytesIO(data)))), _spec())
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            image = Image.open(io.BytesIO(data))
            for pixels in pool.map(lambda source: prepare(source, _spec()), [image] * 4):
                np.testing.assert_array_equal(pixels, expected)

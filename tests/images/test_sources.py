"""Images as people bring them: from phones, cameras, open files, and by addresses that are none."""

from __future__ import annotations

import importlib
import io
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastfsl.errors import DataError
from fastfsl.images import Preprocessing, exact_pixels, fast_pixels, heif_installed, open_image

SPEC = Preprocessing(image_size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
needs_heif = pytest.mark.skipif(not heif_installed(), reason="pillow-heif is not installed")


def _picture() -> Image.Image:
    """White, 48 x 32, red where its upper left corner is."""
    image = Image.new("RGB", (48, 32), "white")
    image.paste((255, 0, 0), (0, 0, 16, 16))
    return image


def _encoded(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def _tagged(orientation: int, format_: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _encoded(_picture(), format_, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("prepare", [exact_pixels, fast_pixels])
def test_a_pil_image_from_a_file_is_turned_as_the_file_is(orientation, format_, prepare):
    data = _tagged(orientation, format_)
    with Image.open(io.BytesIO(data)) as image:
        before = image.size
        pixels = prepare(image, SPEC)
        assert image.size == before, "the caller's image is left as it is"
        difference = np.abs(pixels.astype(int) - prepare(data, SPEC)).max()
    # Of a JPEG as a file fast_pixels decodes less, which is a few grey values off.
    assert difference <= (0 if prepare is exact_pixels else 30)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_pil_image_that_was_turned_already_is_not_turned_again(in_place):
    with Image.open(io.BytesIO(_tagged(6))) as image:
        turned = ImageOps.exif_transpose(image, in_place=in_place) or image
        assert open_image(turned).size == turned.size == (32, 48)
        assert open_image(open_image(turned)).size == (32, 48)
    assert open_image(open_image(_tagged(6))).size == (32, 48)


def test_a_pil_image_derived_from_a_tagged_one_is_turned_with_a_warning():
    with Image.open(io.BytesIO(_tagged(6))) as image:
        derived = image.convert("RGB")
    with pytest.warns(UserWarning, match=r"EXIF orientation 6 and is turned upright.*exif_transpose"):
        assert open_image(derived).size == (32, 48)
    assert open_image(_picture()).size == (48, 32)


@pytest.mark.parametrize(
    ("largest", "shift"),
    [(65535, 8), (40_000, 8), (16_383, 6), (4095, 4), (2100, 4), (1023, 2), (255, 0), (1, 0)],
)
@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_grey_values_of_a_camera_are_scaled_from_the_range_found(largest, shift, format_, tmp_path):
    values = np.linspace(0, largest, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    path = tmp_path / "grey"
    Image.fromarray(values).save(path, format_)
    for source in (path, Image.fromarray(values)):
        opened = open_image(source)
        assert opened.mode == "L"
        np.testing.assert_array_equal(np.asarray(opened), values >> shift)


def test_strips_of_one_picture_share_one_scale(monkeypatch):
    monkeypatch.setattr("fastfsl.images.grey_levels._STRIP_PIXELS", 8)
    values = np.array([[10] * 8, [4095] * 8, [100] * 8], np.uint16)
    assert np.asarray(open_image(Image.fromarray(values)))[:, 0].tolist() == [0, 255, 6]


@pytest.fixture
def heic(tmp_path):
    """Writes a HEIC file as a phone would."""
    pillow_heif = pytest.importorskip("pillow_heif")

    def write(image: Image.Image, name: str = "IMG_0001.HEIC", **options) -> Path:
        pillow_heif.from_pillow(image).save(tmp_path / name, **options)
        return tmp_path / name

    return write


@needs_heif
def test_heic_of_a_phone_is_read_upright(heic):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = heic(_picture(), exif=exif.tobytes(), quality=95)
    sources = (path, path.read_bytes(), io.BytesIO(path.read_bytes()))
    for source in sources:
        opened = open_image(source)
        assert (opened.size, opened.mode) == ((32, 48), "RGB")
        corner = np.asarray(opened)[4, -5].astype(int)
        assert np.abs(corner - [255, 0, 0]).max() < 40, "the red corner went to the upper right"
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(open_image(image)), np.asarray(open_image(path)))
    np.testing.assert_allclose(exact_pixels(path, SPEC), fast_pixels(path, SPEC), atol=30)


@needs_heif
def test_the_content_makes_a_heic_not_the_ending(heic):
    path = heic(_picture(), "really-a-heic.jpg")
    assert open_image(path).size == (48, 32)


@needs_heif
def test_a_heic_too_large_is_refused_before_it_is_decoded(heic, monkeypatch):
    path = heic(_picture())
    monkeypatch.setattr("fastfsl.images.opening.MAX_PIXELS", 48 * 32 - 1)
    monkeypatch.setattr("pillow_heif.HeifImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"IMG_0001\.HEIC: .*more than"):
        open_image(path)


@needs_heif
def test_a_broken_heic_is_a_data_error(heic):
    data = heic(_picture()).read_bytes()
    for cut in (12, 40, len(data) // 2, len(data) - 20):
        with pytest.raises(DataError):
            open_image(data[:cut])


def test_a_heic_without_pillow_heif_names_the_extra(tmp_path, monkeypatch):
    def absent(name: str):
        if name == "pillow_heif":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importlib.import_module(name)

    monkeypatch.setattr("fastfsl.images.pillow.import_module", absent)
    path = tmp_path / "photo.heic"
    for brand in (b"heic", b"mif1"):
        path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(64))
        with pytest.raises(DataError, match=r"photo\.heic: a HEIC image; pip install 'fastfsl\[heic\]'"):
            open_image(path)


def test_reading_a_jpeg_imports_no_heif(monkeypatch):
    monkeypatch.setattr("fastfsl.images.opening.load_heif", lambda _: pytest.fail("imported"))
    assert open_image(_encoded(_picture(), "JPEG")).size == (48, 32)


class _Reader:
    """Bytes a few at a time, from something that cannot seek."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(min(size, 7))


def _opened(kind: str, data: bytes, folder: Path):
    (folder / "image.bin").write_bytes(data)
    if kind == "BytesIO":
        return io.BytesIO(data)
    if kind == "file":
        return (folder / "image.bin").open("rb")
    if kind == "unbuffered":
        return (folder / "image.bin").open("rb", buffering=0)
    if kind == "spooled":
        file = tempfile.SpooledTemporaryFile(max_size=10)  # noqa: SIM115  # the test closes it
        file.write(data)
        return file
    if kind == "zip":
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            archive.writestr("image.bin", data)
        return zipfile.ZipFile(folder / "images.zip").open("image.bin")
    return _Reader(data)


@pytest.mark.parametrize("kind", ["BytesIO", "file", "unbuffered", "spooled", "zip", "stream"])
def test_open_files_are_images(kind, tmp_path):
    data = _encoded(_picture())
    source = _opened(kind, data, tmp_path)
    try:
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(_picture()))
        if kind != "stream":
            source.seek(0, io.SEEK_END)  # where writing leaves it
            assert open_image(source).size == (48, 32)
            assert source.tell() == len(data)
    finally:
        if kind != "stream":
            source.close()


def test_one_open_file_may_be_read_by_many_threads(tmp_path):
    with _opened("file", _encoded(_picture()), tmp_path) as file:
        sizes = []
        threads = [threading.Thread(target=lambda: sizes.append(open_image(file).size)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert sizes == [(48, 32)] * 16


def test_open_files_that_are_no_images_are_named(tmp_path, monkeypatch):
    closed = io.BytesIO(b"x")
    closed.close()
    (tmp_path / "a.txt").write_text("text")

    class Upload:
        async def read(self, size: int = -1) -> bytes:
            return b""

    with (tmp_path / "a.txt").open() as text:
        cases: list[tuple[Any, str]] = [
            (closed, "cannot be read"),
            (text, "mode 'rb'"),
            (Upload(), "await"),
            (io.BytesIO(), "the file is empty"),
            (io.BytesIO(b"noise" * 9), "not an image"),
        ]
        for source, words in cases:
            with pytest.raises(DataError, match=words):
                open_image(source)
    monkeypatch.setattr("fastfsl.images.file_objects.MAX_FILE_BYTES", 20)
    for source in (io.BytesIO(bytes(21)), _Reader(bytes(21))):
        with pytest.raises(DataError, match="at most 20 bytes"):
            open_image(source)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("https://example.org/a.jpg", "nothing is fetched from the network: download it first"),
        ("s3://bucket/a.jpg", "download it first"),
        ("gs://bucket/a.jpg", "download it first"),
        (Path("s3://bucket/a.jpg"), "download it first"),
        ("file:" + "///tmp/a.jpg", "give the path itself"),
        ("data:image/png;base64,iVBORw0KGgo=", "data URL"),
        ("images\\cat\\1.jpg", "as Windows writes it"),
        ("C:\\photos\\1.jpg", "as Windows writes it"),
        ("C:/photos/1.jpg", "as Windows writes it"),
    ],
)
def test_addresses_and_paths_of_windows_get_a_clear_answer(path, words):
    with pytest.raises(DataError, match=words) as caught:
        open_image(path)
    assert str(path) in str(caught.value)


def test_a_plainly_missing_file_gets_no_such_advice():
    with pytest.raises(DataError, match=r"^nowhere/1\.jpg: no such image file$"):
        open_image("nowhere/1.jpg")


def test_nothing_is_fetched(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
    with pytest.raises(DataError):
        open_image("http://127.0.0.1:1/a.jpg")

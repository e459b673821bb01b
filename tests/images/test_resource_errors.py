"""A fault of the machine is no verdict on an image."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastfsl.errors import DataError, FastFSLError, ResourceError, resource_error
from fastfsl.images import Preprocessing, exact_pixels, fast_pixels, open_image, opening

PREPROCESSING = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
READERS: dict[str, Callable[[Path], object]] = {
    "open": open_image,
    "exact": lambda path: exact_pixels(path, PREPROCESSING),
    "fast": lambda path: fast_pixels(path, PREPROCESSING),
}

MACHINE = ("EMFILE", "ENFILE", "EIO", "ENOMEM", "ESTALE", "ETIMEDOUT", "ENODEV", "ENOTCONN", "EREMOTEIO", "EHOSTDOWN")
FILE = ("ENOENT", "EACCES", "EPERM", "ELOOP", "ENAMETOOLONG", "EISDIR")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


def _failing(name):
    number = getattr(errno, name)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("call", "name"), [*(("open", name) for name in MACHINE), ("fdopen", "EMFILE"), ("stat", "EIO")]
)
def test_what_is_not_the_image_s_fault_is_a_resource_error(photo, monkeypatch, reader, call, name):
    READERS[reader](photo)
    monkeypatch.setattr(os, call, _failing(name))
    with pytest.raises(ResourceError, match=r"cannot read the image .*photo\.png: .*; .*, then run it again"):
        READERS[reader](photo)


def test_a_disk_that_fails_while_it_is_read_is_a_resource_error(photo, monkeypatch):
    class Failing:
        def __init__(self, descriptor, mode):
            self._descriptor = descriptor

        def __enter__(self):
            return self

        def __exit__(self, *_):
            os.close(self._descriptor)

        def fileno(self):
            return self._descriptor

        read = staticmethod(_failing("EIO"))

    monkeypatch.setattr(os, "fdopen", Failing)
    with pytest.raises(ResourceError, match="input/output error; check the disk"):
        open_image(photo)


@pytest.mark.parametrize("name", FILE)
def test_what_is_said_of_one_file_stays_its_fault(photo, monkeypatch, name):
    open_image(photo)
    monkeypatch.setattr(os, "open", _failing(name))
    with pytest.raises(DataError, match=r"photo\.png"):
        open_image(photo)


def test_a_pipe_put_in_the_file_s_place_does_not_block(photo, monkeypatch):
    opened = os.open

    def exchange(path, *arguments):
        photo.unlink()
        os.mkfifo(photo)
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises(DataError, match="not a regular file"):
        open_image(photo)


@pytest.mark.parametrize(
    ("reader", "where"),
    [
        *((reader, where) for reader in READERS for where in ((Image, "open"), (ImageFile.ImageFile, "load"))),
        ("open", (Image.Image, "convert")),
    ],
)
def test_a_memory_error_of_the_decoder_is_said_as_what_it_is(photo, monkeypatch, reader, where):
    palette = photo.with_name("palette.png")
    Image.open(photo).convert("P").save(palette)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(*where, fail)
    with pytest.raises(ResourceError, match=r"palette\.png: out of memory; free memory"):
        READERS[reader](palette)


def test_pillow_s_own_out_of_memory_is_weighed(photo, monkeypatch):
    """Its decoders also say it of a file whose inner sizes are absurd."""

    def fail(self):
        raise OSError("out of memory when reading image file")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(DataError):
        open_image(photo)
    monkeypatch.setattr(opening, "_is_memory_short", lambda image: True)
    with pytest.raises(ResourceError, match="out of memory"):
        open_image(photo)


_STARVED = """
import io, re, resource, sys
from PIL import Image
from fastfsl.errors import ResourceError
from fastfsl.images import open_image
data = io.BytesIO()
Image.new("RGB", (7000, 7000)).save(data, "PNG", compress_level=1)
open_image(data.getvalue())
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 40 * 2**20,) * 2)
try:
    open_image(data.getvalue())
except ResourceError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_picture_that_does_not_fit_into_memory_is_no_damaged_file():
    found = subprocess.run([sys.executable, "-c", _STARVED], capture_output=True, text=True, timeout=60, check=False)
    assert "out of memory; free memory" in found.stdout, found.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "can't start new thread; lower the number of threads"),
        (OSError("Too many open files (os error 24)"), "raise the limit of open files"),
        (OSError("image file is truncated (5 bytes not processed)"), None),
        (OSError(errno.ENOENT, "No such file"), None),
        (ValueError("(os error 24)"), None),
        (RuntimeError("anything else"), None),
    ],
)
def test_which_errors_are_the_machine_s(error, expected):
    found = resource_error(error, "do it")
    assert found is None if expected is None else expected in str(found)


def test_a_resource_error_is_no_data_error():
    assert not issubclass(ResourceError, DataError)
    assert issubclass(ResourceError, FastFSLError)

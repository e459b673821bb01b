"""A digest kept elsewhere, the paths a manifest may list, and files that are not what they seem."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from fastfsl import bundle
from fastfsl.bundle import Manifest
from fastfsl.bundle.untrusted import hash_regular, read_regular
from fastfsl.errors import BundleError, ConfigError
from fastfsl.runtime import Classifier

GOLDEN = Path(__file__).parents[1] / "golden" / "v1" / "blend"
DIGEST = hashlib.sha256((GOLDEN / "manifest.json").read_bytes()).hexdigest()
OTHER = "0" * 64


def _manifest(files) -> bytes:
    values = json.loads((GOLDEN / "manifest.json").read_bytes())
    values["files"] |= files
    return json.dumps(values).encode()


# ------------------------------------------------------------------------------------------------------------ digest


@pytest.mark.parametrize("digest", [DIGEST, DIGEST.upper(), None])
def test_the_expected_bundle_is_loaded(digest):
    manifest, found = bundle.read_pinned(GOLDEN, digest)
    assert found == DIGEST == bundle.bundle_digest(GOLDEN)
    assert bundle.read_manifest(GOLDEN, digest) == manifest
    classifier = Classifier.load(GOLDEN, device="cpu", num_threads=1, expected_digest=digest)
    assert classifier.describe()["digest"] == DIGEST


@pytest.mark.parametrize("data", [(GOLDEN / "manifest.json").read_bytes(), b"{not even JSON"])
def test_another_bundle_is_refused_before_it_is_parsed(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError, match="another bundle") as caught:
        Classifier.load(tmp_path, expected_digest=OTHER)
    assert OTHER in str(caught.value)
    assert hashlib.sha256(data).hexdigest() in str(caught.value)


@pytest.mark.parametrize("digest", ["", DIGEST[:-1], DIGEST + "0", "g" * 64, f"sha256:{DIGEST}", 7])
def test_what_is_no_digest_is_not_taken_for_one(digest):
    with pytest.raises(ConfigError, match=r"64 hexadecimal digits .* --digest"):
        Classifier.load(GOLDEN, expected_digest=digest)


def test_the_manifest_that_is_hashed_is_the_one_parsed(monkeypatch):
    """It is read once: exchanging the file between the two steps changes nothing."""
    read = []

    def once(path, *limits):
        read.append(path)
        return read_regular(path, *limits)

    monkeypatch.setattr("fastfsl.bundle.manifest.read_regular", once)
    Classifier.load(GOLDEN, device="cpu", num_threads=1, expected_digest=DIGEST)
    assert read == [GOLDEN / "manifest.json"]


# ------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "name",
    [
        "CON",
        "flow/nul.txt",
        "com1",
        "flow./x",
        "x.",
        "x ",
        " x",
        ".hidden",
        "flow/.git",
        "fl\u043ew/model.onnx",  # a Cyrillic o
        "flow\u2044model.onnx",  # a sign that looks like a slash
        "cafe\u0301",
        "~/x",
        "$HOME",
        "-rf",
        "x\x1b[2J",
    ],
)
def test_names_that_are_not_the_same_everywhere_are_refused(name):
    with pytest.raises(BundleError, match="no path inside the bundle"):
        Manifest.from_json(_manifest({name: {"sha256": OTHER, "size": 1}}))


@pytest.mark.parametrize("name", ["Visual/model.onnx", "visual/MODEL.onnx", "Manifest.json"])
def test_names_that_differ_in_capitals_alone_are_refused(name):
    with pytest.raises(BundleError, match="capitals"):
        Manifest.from_json(_manifest({name: {"sha256": OTHER, "size": 1}}))


@pytest.mark.parametrize("name", ["visual", "visual/model.onnx/x", "manifest.json/x", "MANIFEST.JSON/x"])
def test_a_file_below_a_file_is_refused(name):
    with pytest.raises(BundleError, match="lies below another one"):
        Manifest.from_json(_manifest({name: {"sha256": OTHER, "size": 1}}))


@pytest.mark.parametrize("size", [2 * 2**30 + 1, 10 * 2**30, -1, True, 1.0])
def test_sizes_are_bounded(size):
    with pytest.raises(BundleError, match="none larger than"):
        Manifest.from_json(_manifest({"big": {"sha256": OTHER, "size": size}}))


def test_the_number_of_files_is_bounded():
    many = {f"f{index}": {"sha256": OTHER, "size": 1} for index in range(5000)}
    with pytest.raises(BundleError, match="up to 4096"):
        Manifest.from_json(_manifest(many))


def test_messages_stay_short():
    """A bundle does not get to fill a log."""
    changes: list[dict[str, Any]] = [{"k" * 10**6: 1}, {"format_version": "x" * 10**6}, {"files": {"." * 10**6: {}}}]
    for change in changes:
        values = {**json.loads((GOLDEN / "manifest.json").read_bytes()), **change}
        with pytest.raises(BundleError) as caught:
            Manifest.from_json(json.dumps(values).encode())
        assert len(str(caught.value)) < 500


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("read", [read_regular, hash_regular])
def test_only_regular_files_are_opened(tmp_path, read):
    path = tmp_path / "file"
    for make in (
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(GOLDEN / "manifest.json"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path),
    ):
        make()
        with pytest.raises(BundleError, match="expected a regular file"):
            read(path, 100)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises(BundleError, match="expected a regular file"):
            read(path, 100)
    with pytest.raises(BundleError, match="expected a regular file"):
        read(Path("/dev/null"), 100)


@pytest.mark.parametrize("read", [read_regular, hash_regular])
def test_a_file_of_another_size_is_not_read(tmp_path, read, monkeypatch):
    """Ten gigabytes that take no room on the disk would take minutes to hash."""
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 10 * 2**30)
    monkeypatch.setattr("os.fdopen", lambda descriptor, mode: _Unreadable(descriptor))
    with pytest.raises(BundleError, match="truncated or altered: expected 5 bytes"):
        read(path, 2**40, 5)
    with pytest.raises(BundleError, match="more than the 1000 allowed"):
        read(path, 1000)


class _Unreadable:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._descriptor)

    def read(self, _):
        raise AssertionError("it was read")


def test_what_the_manifest_does_not_list_is_told_and_never_loaded(tmp_path):
    for file in [path for path in GOLDEN.rglob("*") if path.is_file()]:
        target = tmp_path / file.relative_to(GOLDEN)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    manifest = bundle.check_bundle(tmp_path)
    assert bundle.unlisted_files(tmp_path, manifest) == []
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "model.onnx").write_bytes(b"would be a flow")
    (tmp_path / "linked").symlink_to("/etc")
    assert bundle.unlisted_files(tmp_path, manifest) == ["flow/model.onnx", "linked"]
    assert Classifier.load(tmp_path, device="cpu", num_threads=1).describe()["flow"] is None

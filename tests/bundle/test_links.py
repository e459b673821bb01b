"""Bundles whose files are links: a hub's cache, a mounted volume; and the model card, which may be edited."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastfsl import bundle
from fastfsl.errors import BundleError
from fastfsl.runtime import Classifier

GOLDEN = Path(__file__).parents[1] / "golden" / "v1" / "images"
DIGEST = bundle.bundle_digest(GOLDEN)


def _copy(target: Path) -> Path:
    shutil.copytree(GOLDEN, target)
    return target


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _hub_cache(folder: Path, below: str = "") -> Path:
    """As huggingface_hub lays a downloaded repository out; returns the snapshot."""
    snapshot = folder / "models--someone--birds" / "snapshots" / ("0" * 40)
    blobs = folder / "models--someone--birds" / "blobs"
    blobs.mkdir(parents=True)
    for file in _files(GOLDEN):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = snapshot / below / file.relative_to(GOLDEN)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot / below


def _volume(folder: Path) -> Path:
    """As the kubelet mounts a ConfigMap or Secret."""
    data = folder / "..2026_12_01_05_00_00.123456789"
    shutil.copytree(GOLDEN, data)
    (folder / "..data").symlink_to(data.name)
    for entry in data.iterdir():
        (folder / entry.name).symlink_to(Path("..data") / entry.name)
    return folder


def _linked_folder(folder: Path) -> Path:
    _copy(folder / "..2026" / "bundle")
    (folder / "..data").symlink_to("..2026")
    (folder / "bundle").symlink_to("..data/bundle")
    return folder / "bundle"


def _annex(folder: Path) -> Path:
    path = _copy(folder / "bundle")
    for number, file in enumerate(_files(path)):
        kept = path / ".git" / "annex" / "objects" / str(number)
        kept.parent.mkdir(parents=True, exist_ok=True)
        file.rename(kept)
        file.symlink_to(os.path.relpath(kept, file.parent))
    return path


LAYOUTS = {
    "hub-cache": _hub_cache,
    "folder-in-a-hub-cache": lambda folder: _hub_cache(folder, "deploy/v1"),
    "kubernetes": _volume,
    "folder-in-a-volume": _linked_folder,
    "annex": _annex,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bundle_of_links_of_a_hub_cache_or_a_mounted_volume_loads(layout, tmp_path):
    path = LAYOUTS[layout](tmp_path)
    assert bundle.bundle_digest(path) == DIGEST
    manifest = bundle.check_bundle(path)
    assert bundle.unlisted_files(path, manifest) in ([], [".git"])
    noise = np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = Classifier.load(GOLDEN, device="cpu", num_threads=1).predict(noise)
    assert Classifier.load(path, device="cpu", num_threads=1, expected_digest=DIGEST).predict(noise) == expected


@pytest.mark.parametrize("layout", ["hub-cache", "kubernetes", "annex"])
def test_what_a_link_leads_to_is_proved_by_its_hash(layout, tmp_path):
    path = LAYOUTS[layout](tmp_path)
    target = (path / "visual" / "model.onnx").resolve()
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    with pytest.raises(BundleError, match=r"visual/model\.onnx: altered"):
        bundle.check_bundle(path)
    with pytest.raises(BundleError, match=r"visual/model\.onnx: altered"):
        Classifier.load(path, device="cpu", num_threads=1)


def _elsewhere(link: Path) -> None:
    outside = link.parents[4] / "outside.onnx"
    shutil.copyfile(GOLDEN / "visual" / "model.onnx", outside)
    link.symlink_to(outside)


def _another_repository(link: Path) -> None:
    blob = link.parents[4] / "models--other--one" / "blobs" / "b"
    blob.parent.mkdir(parents=True)
    shutil.copyfile(GOLDEN / "visual" / "model.onnx", blob)
    link.symlink_to(blob)


def _out_of_the_blobs(link: Path) -> None:
    _elsewhere(link)
    blobs = link.parents[3] / "blobs"
    (blobs / "chained").symlink_to(link.readlink())
    link.unlink()
    link.symlink_to(blobs / "chained")


def _linked_blobs(link: Path) -> None:
    """The blobs themselves moved elsewhere."""
    blobs = link.parents[3] / "blobs"
    blobs.rename(link.parents[4] / "moved")
    blobs.symlink_to("../moved")
    link.symlink_to(next(blobs.iterdir()))


ASTRAY = {
    "elsewhere": (_elsewhere, "leaves the bundle"),
    "etc": (lambda link: link.symlink_to("/etc/passwd"), "leaves the bundle"),
    "device": (lambda link: link.symlink_to("/dev/zero"), "leaves the bundle"),
    "another-repository": (_another_repository, "leaves the bundle"),
    "refs": (lambda link: link.symlink_to(link.parents[2]), "leaves the bundle"),
    "out-of-the-blobs": (_out_of_the_blobs, "leaves the bundle"),
    "dangling": (lambda link: link.symlink_to("../../blobs/none"), "leads nowhere"),
    "loop": (lambda link: link.symlink_to(link.name), "cannot be followed"),
    "folder": (lambda link: link.symlink_to("../flow"), "regular file"),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("visual/model.onnx", way) for way in ASTRAY),
        *(("manifest.json", way) for way in ("etc", "device", "dangling", "loop")),
    ],
)
def test_a_link_that_leads_elsewhere_is_refused(name, way, tmp_path):
    path = _hub_cache(tmp_path)
    (path / "flow").mkdir(exist_ok=True)
    make, message = ASTRAY[way]
    link = path / name
    link.unlink()
    make(link)
    with pytest.raises(BundleError, match=message):
        Classifier.load(path, device="cpu", num_threads=1)


def test_blobs_that_lie_out_of_the_cache_are_refused(tmp_path):
    path = _hub_cache(tmp_path)
    (path / "visual" / "model.onnx").unlink()
    _linked_blobs(path / "visual" / "model.onnx")
    with pytest.raises(BundleError, match="leaves the bundle"):
        bundle.check_bundle(path)


def test_a_link_put_in_a_file_s_place_after_it_was_looked_at_is_not_followed(tmp_path, monkeypatch):
    path = _hub_cache(tmp_path)
    manifest = bundle.read_manifest(path)
    blob = (path / "visual" / "model.onnx").resolve()
    (tmp_path / "outside").write_bytes(blob.read_bytes())
    opened = os.open

    def exchange(file, *arguments, **options):
        if Path(file) == blob:
            blob.unlink()
            blob.symlink_to(tmp_path / "outside")
        return opened(file, *arguments, **options)

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises(BundleError, match="expected a regular file"):
        bundle.read_file(path, manifest, "visual/model.onnx")


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s9--0.onnx\n", "git annex get"),
    ],
)
def test_a_pointer_in_place_of_a_file_is_named(text, remedy, tmp_path):
    path = _copy(tmp_path / "bundle")
    (path / "visual" / "model.onnx").write_bytes(text)
    with pytest.raises(BundleError, match=f"pointer.*`{remedy}`"):
        Classifier.load(path, device="cpu", num_threads=1)


# -------------------------------------------------------------------------------------------------------------- card


def _without_card(path: Path) -> None:
    (path / "README.md").unlink()


def _longer_card(path: Path) -> None:
    with (path / "README.md").open("a") as card:
        card.write("\nFine-tuned by me.\n")


def _hub_files(path: Path) -> None:
    _longer_card(path)
    (path / "LICENSE").write_text("MIT")
    (path / ".gitattributes").write_text("*.onnx filter=lfs\n")
    for folder in (".git", ".cache/huggingface"):
        (path / folder).mkdir(parents=True)
        (path / folder / "x").write_text("x")


@pytest.mark.parametrize("edit", [_without_card, _longer_card, _hub_files])
def test_the_model_card_may_be_edited(edit, tmp_path):
    path = _copy(tmp_path / "bundle")
    assert "README.md" in bundle.read_manifest(path).files  # as older versions wrote it
    edit(path)
    manifest = bundle.check_bundle(path)
    assert bundle.bundle_digest(path) == DIGEST
    Classifier.load(path, device="cpu", num_threads=1, expected_digest=DIGEST)
    hub = [".cache", ".git", ".gitattributes", "LICENSE"] if edit is _hub_files else []
    assert bundle.unlisted_files(path, manifest) == hub
    card = [] if edit is _without_card else ["README.md"]
    assert bundle.unverified_files(path, manifest) == sorted([*hub, *card])

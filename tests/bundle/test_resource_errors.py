"""A bundle that cannot be read now is not called damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fastfsl import bundle
from fastfsl.errors import BundleError, ResourceError
from fastfsl.runtime import Classifier

GOLDEN = Path(__file__).parents[1] / "golden" / "v1" / "images"


def _failing(monkeypatch, name):
    number = getattr(errno, name)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)


@pytest.mark.parametrize("name", ["EMFILE", "EIO", "ENOMEM", "ESTALE"])
def test_a_bundle_is_not_called_damaged_for_the_machine_s_fault(monkeypatch, name):
    manifest = bundle.read_manifest(GOLDEN)
    _failing(monkeypatch, name)
    for read in (
        lambda: Classifier.load(GOLDEN, device="cpu"),
        lambda: bundle.bundle_digest(GOLDEN),
        lambda: bundle.check_bundle(GOLDEN, manifest),
    ):
        with pytest.raises(ResourceError, match=r"cannot read .*then run it again"):
            read()


def test_a_bundle_that_may_not_be_read_is_not_called_damaged(monkeypatch):
    _failing(monkeypatch, "EACCES")
    with pytest.raises(BundleError, match="check its permissions"):
        bundle.read_manifest(GOLDEN)


def test_a_link_on_a_failing_disk_is_not_refused_for_good(tmp_path, monkeypatch):
    (tmp_path / "real.json").write_bytes((GOLDEN / "manifest.json").read_bytes())
    (tmp_path / "manifest.json").symlink_to("real.json")
    assert bundle.bundle_digest(tmp_path)

    def fail(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os.path, "realpath", fail)
    with pytest.raises(ResourceError, match="stale file handle"):
        bundle.bundle_digest(tmp_path)

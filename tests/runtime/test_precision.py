"""int8 on a processor that sums products of bytes in 16 bits: it is said, and nothing else is."""

from __future__ import annotations

import logging
import platform

import pytest

from fastfsl.runtime import Classifier, loading
from fastfsl.runtime.precision import int8_warning


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    def write(flags):
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor\t: 0\nmodel name\t: one\nflags\t\t: fpu {flags}\nvmx flags\t: vnmi\n\n" * 2)
        return file

    return write


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ("avx2 fma", True),
        ("avx2 avx512f avx512bw", True),
        ("avx2 avx_vnni", False),
        ("avx512f avx512_vnni", False),
        ("avx512f amx_int8", False),
    ],
)
def test_int8_without_vnni_is_warned_of(cpuinfo, monkeypatch, flags, warned):
    file = cpuinfo(flags)
    assert (int8_warning("int8", file) is not None) is warned
    assert int8_warning("fp32", file) is None
    assert int8_warning("int8", file.with_name("none")) is None  # no Linux
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert int8_warning("int8", file) is None


def test_a_bundle_says_it_when_it_is_loaded(write, cpuinfo, tmp_path, monkeypatch, caplog):
    file = cpuinfo("avx2")
    monkeypatch.setattr("fastfsl.bundle.check_graphs", lambda *_: None)  # the graphs of this one are float32
    monkeypatch.setattr(loading, "int8_warning", lambda precision: int8_warning(precision, file))
    with caplog.at_level(logging.WARNING, "fastfsl.runtime"):
        plain = Classifier.load(write(tmp_path / "fp32"), device="cpu", num_threads=1)
        assert not caplog.records
        int8 = Classifier.load(write(tmp_path / "int8", precision="int8"), device="cpu", num_threads=1)
    assert plain.describe()["int8_warning"] is None
    assert "neither VNNI nor AMX" in int8.describe()["int8_warning"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "neither VNNI nor AMX" in caplog.text

"""Threads follow the container's share of the machine."""

from __future__ import annotations

import os

import pytest

from fastfsl.runtime import threads


@pytest.fixture
def sixteen(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", 16),
        ("200000 100000\n", 2),
        ("250000 100000\n", 2),  # a third thread would be stopped half of the time
        ("50000 100000\n", 1),
        ("6400000 100000\n", 16),
        ("nonsense", 16),
        ("100000 0\n", 16),
        ("-1 100000\n", 16),
    ],
)
def test_cgroup_2(sixteen, tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    assert threads.available_cpus(tmp_path) == expected


def test_cgroup_1(sixteen, tmp_path):
    assert threads.available_cpus(tmp_path) == 16
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.available_cpus(tmp_path) == 3
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert threads.available_cpus(tmp_path) == 16


def test_onnxruntime_chooses_unless_the_process_has_less_than_the_machine(sixteen, monkeypatch):
    monkeypatch.setattr(threads, "_cgroup_quota", lambda _: None)
    assert threads.default_threads() == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 9}, raising=False)
    assert threads.default_threads() == 3
    monkeypatch.setattr(threads, "_cgroup_quota", lambda _: 2.0)
    assert threads.default_threads() == 2

"""How many processors this process may really use: a container's share, not the machine's."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = _CGROUP) -> int:
    """Processors this process may use: its affinity mask, cut by the control group's quota (rounded down, at least 1).

    Args:
        cgroup: where the control group's files are mounted.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(cgroup)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def default_threads() -> int:
    """Threads for one operator: 0, which is ONNX Runtime's own choice, or fewer where the process has fewer processors.

    ONNX Runtime counts the machine's cores. In a container limited to two of sixty-four it would start dozens of
    threads, and the kernel would then stop them all for most of every scheduling period.
    """
    cpus = available_cpus()
    return 0 if cpus == os.cpu_count() else cpus


def _cgroup_quota(cgroup: Path) -> float | None:
    """Processors' worth of time per period, or None without a limit. Version 2 first, then version 1."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        limit = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return limit if limit > 0 else None

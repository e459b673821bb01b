"""What may be installed beside the runtime, what of it is, and what is too old."""

import importlib.metadata
import re
from collections.abc import Iterable
from typing import Any

# Optional parts: what they bring, by the name of the extra that installs them.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text": ("classes added by name at run time", ("tokenizers", "ftfy")),
    "parquet": ("predictions as Parquet files", ("pyarrow",)),
    "metrics": ("metrics for Prometheus", ("prometheus-client",)),
    "gpu": ("ONNX Runtime and compiled kernels on NVIDIA cards", ("onnxruntime-gpu", "cuda-bindings")),
    "train": ("training", ("torch", "open_clip_torch", "scikit-learn", "pydantic", "pyyaml", "matplotlib")),
    "export": ("export", ("torch", "open_clip_torch", "onnx", "onnxscript")),
}
# `name>=1.2` with or without extras of its own, and at its end perhaps `extra == "dev"`.
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*>=\s*([0-9.]+)")
_NAME = re.compile(r"\s*([A-Za-z0-9._-]+)")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([A-Za-z0-9._-]+)['"]""")


def version_of(name: str) -> str | None:
    """Version of a distribution; None where it is not installed. Nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def optional_parts() -> dict[str, dict[str, Any]]:
    """For each optional part what it is for, what of it is missing, and the command that brings it."""
    found = {}
    for extra, (purpose, distributions) in PARTS.items():
        missing = [name for name in distributions if version_of(name) is None]
        remedy = f"pip install 'fastfsl[{extra}]'"
        if extra == "gpu" and version_of("onnxruntime") is not None:
            remedy = f"pip uninstall -y onnxruntime, then {remedy}"
        found[extra] = {"for": purpose, "missing": missing, "install": remedy if missing else None}
    return found


def outdated(requirements: Iterable[str] | None = None) -> list[dict[str, str]]:
    """Installed packages that are older than fastfsl was made for, each with the version wanted.

    What an extra asks for is judged where that extra is installed.

    Args:
        requirements: as in a package's metadata; None: those of fastfsl.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("fastfsl") or []
        except importlib.metadata.PackageNotFoundError:  # run from the sources
            requirements = []
    lines = list(requirements)
    judged = _installed_extras(lines)
    old: dict[str, dict[str, str]] = {}
    for line in lines:
        found, extra = _REQUIREMENT.match(line), _EXTRA.search(line)
        if found is None or (extra is not None and extra[1] not in judged):
            continue
        name, wanted = found.groups()
        installed = version_of(name)
        if installed is not None and _numbers(installed) < _numbers(wanted):
            old[name] = {"package": name, "installed": installed, "wanted": wanted}
    return list(old.values())


def _installed_extras(requirements: Iterable[str]) -> set[str]:
    """Extras whose packages are all here: what others ask for concerns nobody who did not install them.

    Every environment has some setuptools or other, which only development needs in a certain version.
    """
    needed: dict[str, set[str]] = {}
    for line in requirements:
        extra, name = _EXTRA.search(line), _NAME.match(line)
        if extra is not None and name is not None and "sys_platform" not in line:
            needed.setdefault(extra[1], set()).add(name[1])
    for known in needed.keys() & PARTS.keys():
        needed[known] = set(PARTS[known][1])
    return {
        known for known, names in needed.items() if all(version_of(name) is not None for name in names - {"fastfsl"})
    }


def _numbers(version: str) -> tuple[int, ...]:
    """The release as numbers, without trailing zeros: 2.0 and 2 are the same."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[^0-9.]", version, maxsplit=1)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)

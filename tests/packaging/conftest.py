"""The checkout and the wheel made from it."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkout():
    return CHECKOUT


@pytest.fixture(scope="session")
def pyproject():
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def rooms(pyproject):
    """Every sub-package or module of fastfsl that lies directly below it, by its dotted name."""
    packages = {name for name in pyproject["tool"]["setuptools"]["packages"] if name.count(".") == 1}
    modules = {f"fastfsl.{path.stem}" for path in (CHECKOUT / "fastfsl").glob("*.py") if path.stem != "__init__"}
    return packages | modules


@pytest.fixture(scope="session")
def wheel_files(tmp_path_factory):
    """The names in a wheel built from a copy of the sources, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("wheel")
    for folder in ("fastfsl", "kernels", "export"):
        shutil.copytree(CHECKOUT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / file, copy)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())

"""An editable install that type checkers and editors can read: `--config-settings editable_mode=strict`."""

import shutil
import subprocess
import sys
import zipfile

import pytest

USER = """
from fastfsl import FlowMatchingAlignment
from fastfsl.kernels.tiles import ARCHITECTURES
from fastfsl.runtime import Classifier

best: str = Classifier.load("bundle/").predict(["a.jpg"])[0].label
newest: int = ARCHITECTURES[-1]
wrong: int = Classifier.load("bundle/")
"""

_BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_editable(sys.argv[1], {"editable_mode": "strict"}))
"""


@pytest.fixture(scope="module")
def visible(checkout, tmp_path_factory):
    """The folder that a strict editable install puts on Python's path."""
    copy = tmp_path_factory.mktemp("editable")
    for folder in ("fastfsl", "kernels", "export"):
        shutil.copytree(checkout / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout / file, copy)
    command = [sys.executable, "-c", _BUILD, str(copy / "dist")]
    (copy / "dist").mkdir()
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".pth"))
        # A line that imports something is read by Python alone, and tells a type checker nothing.
        (folder,) = archive.read(path).decode().split()
    return copy / folder


def test_a_strict_editable_install_shows_every_room_and_its_types(visible, checkout):
    assert (visible / "fastfsl" / "py.typed").is_file()
    for folder, room in (("fastfsl", ""), ("kernels", "kernels"), ("export", "export")):
        for module in (checkout / folder).rglob("*.py"):
            shown = visible / "fastfsl" / room / module.relative_to(checkout / folder)
            assert shown.is_file(), shown


@pytest.mark.slow
def test_user_code_is_checked_against_it(visible, tmp_path):
    (tmp_path / "user.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(tmp_path), "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(visible), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("user.py")]
    assert len(lines) == 1, done.stdout
    assert 'expression has type "Classifier", variable has type "int"' in lines[0]

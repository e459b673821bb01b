"""Documents, versions and the Makefile agree, and nothing of a builder's machine is tracked."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

import fastfsl

# Written with character classes so that they do not find themselves.
INDEX_OPTION = re.compile(r"index[-_]url|find[-_]links|trusted[-_]host|file:[/]{2}", re.IGNORECASE)
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:wor[k]|roo[t]|hom[e]|User[s])/\w")


@pytest.fixture(scope="module")
def tracked_texts(checkout):
    """Path and text of every tracked file; weights and other binary files are left out."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=checkout, capture_output=True, text=True, check=True).stdout
    texts = {}
    for name in filter(None, listed.split("\0")):
        content = (checkout / name).read_bytes() if (checkout / name).is_file() else b""
        if b"\0" not in content:
            texts[name] = content.decode()
    return texts


def test_versions_agree(checkout, pyproject):
    version = pyproject["project"]["version"]
    (newest, *_) = re.findall(r"^## \[(.+?)\]", (checkout / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest == version
    assert fastfsl.__version__ == version
    assert importlib.metadata.version("fastfsl") == version


def test_readme_names_make_targets_that_exist(checkout):
    targets = set(re.findall(r"^([a-z-]+):", (checkout / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\$ |&& )make ([a-z-]+)", (checkout / "README.md").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_readme_installs_extras_that_exist(checkout, pyproject):
    extras = set(pyproject["project"]["optional-dependencies"])
    named = re.findall(r"(?:fastfsl|\.)\[([\w,]+)\]", (checkout / "README.md").read_text())
    assert named
    assert {name for group in named for name in group.split(",")} <= extras


@pytest.mark.parametrize("pattern", [INDEX_OPTION, MACHINE_PATH], ids=["package index", "machine path"])
def test_nothing_of_the_builders_machine_is_tracked(tracked_texts, checkout, pattern):
    here = re.compile("|".join(re.escape(str(path)) for path in {checkout, Path.home()} if len(path.parts) > 1))
    found = {
        f"{name}: {match.group()}"
        for name, text in tracked_texts.items()
        for match in (*pattern.finditer(text), *here.finditer(text))
    }
    assert not found


def test_patterns_find_what_they_look_for():
    assert INDEX_OPTION.search("pip install --extra-index-" + "url=x")
    assert MACHINE_PATH.search('open("/' + 'home/someone/data")')
    assert not MACHINE_PATH.search("https://example.org/" + "home/page and runs/" + "work/x")


def test_cpu_and_gpu_extras_take_one_onnxruntime_each(pyproject):
    # The two distributions overwrite each other's files.
    names = {
        extra: {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}
        for extra, requirements in pyproject["project"]["optional-dependencies"].items()
    }
    assert {extra for extra, found in names.items() if "onnxruntime" in found} == {"cpu"}
    assert {extra for extra, found in names.items() if "onnxruntime-gpu" in found} == {"gpu"}


def test_no_onnxruntime_with_wrong_int8_products_is_admitted(pyproject):
    # Mended in 1.25 (its change 27671): products of bytes and int8 weights of 32 rows and more, with AMX.
    extras = pyproject["project"]["optional-dependencies"]
    found = [
        re.search(r">=(\d+)\.(\d+)", requirement)
        for requirement in (*extras["cpu"], *extras["gpu"])
        if requirement.startswith("onnxruntime")
    ]
    assert len(found) == 2
    assert all(bound and tuple(map(int, bound.groups())) >= (1, 25) for bound in found)

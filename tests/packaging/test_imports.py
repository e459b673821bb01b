"""What importing a room costs: each import is watched in an interpreter of its own."""

import subprocess
import sys

import pytest

import fastfsl

TRAINING = {"torch", "torchvision", "triton", "onnx", "onnxscript", "open_clip", "sklearn", "scipy", "pydantic"}


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import fastfsl", {*TRAINING, "numpy", "PIL", "onnxruntime", "typer", "rich", "matplotlib"}),
        ("import fastfsl.errors", {*TRAINING, "numpy", "PIL"}),
        ("import fastfsl.runtime", {*TRAINING, "PIL", "typer", "rich", "matplotlib"}),
        ("import fastfsl.bundle", {*TRAINING, "PIL", "onnxruntime", "typer", "rich", "matplotlib"}),
        ("import fastfsl.images", {*TRAINING, "PIL", "numpy", "onnxruntime", "matplotlib"}),
        ("import fastfsl.cli", {*TRAINING, "numpy", "PIL", "onnxruntime", "matplotlib"}),
    ],
)
def test_light_rooms_leave_heavy_libraries_alone(statement, unwanted):
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not unwanted & set(done.stdout.split())


def test_every_public_name_resolves():
    assert fastfsl.__all__
    for name in fastfsl.__all__:
        assert getattr(fastfsl, name) is not None


def test_help_works_where_training_is_not_installed():
    code = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(cls, name, *rest):
    return None if name.split('.')[0] in {'torch', 'torchvision', 'sklearn', 'scipy'} else find(name, *rest)
PathFinder.find_spec = classmethod(find_spec)
import fastfsl, pydoc
print(pydoc.render_doc(fastfsl, renderer=pydoc.plaintext))
print(dir(fastfsl))
try:
    fastfsl.Auto
except fastfsl.ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "class DataError" in done.stdout
    assert "'Auto'" not in done.stdout
    assert 'pip install "fastfsl[train]"' in done.stdout


def test_an_unknown_public_name_is_an_attribute_error():
    name = "no_such_name"
    with pytest.raises(AttributeError, match=name):
        getattr(fastfsl, name)


@pytest.mark.parametrize("name", ["kernels", "export"])
def test_no_mapped_folder_is_importable_by_its_bare_name(checkout, name):
    # -P: with the working directory on the path, any folder there is importable, installed or not.
    code = f"import importlib.util; spec = importlib.util.find_spec({name!r}); print(spec and spec.origin)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert str(checkout / name) not in done.stdout

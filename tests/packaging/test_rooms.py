"""The mapped layout: what setuptools, import-linter and the type checker are told is what lies on the disk."""

import ast
import subprocess
import sys

import pytest

FOLDERS = {"fastfsl": "fastfsl", "kernels": "fastfsl.kernels", "export": "fastfsl.export"}


def test_packages_are_the_folders_that_exist(checkout, pyproject):
    # A sub-package that is missing from the list works in an editable install and vanishes from the wheel.
    found = set()
    for folder, package in FOLDERS.items():
        for init in (checkout / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(checkout / folder).parts]))
    assert set(pyproject["tool"]["setuptools"]["packages"]) == found


def test_every_module_lies_in_a_package(checkout):
    stray = {
        path.relative_to(checkout)
        for folder in FOLDERS
        for path in (checkout / folder).rglob("*.py")
        if not (path.parent / "__init__.py").is_file()
    }
    assert not stray


@pytest.mark.parametrize("folder", ["kernels", "export"])
def test_mapped_rooms_start_with_a_docstring_only(checkout, folder):
    # `python -c` at the top of a checkout can import the folder under its bare name: nothing may run then.
    (statement,) = ast.parse((checkout / folder / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)


def test_every_room_has_an_import_contract(pyproject, rooms):
    contracts = pyproject["tool"]["importlinter"]["contracts"]
    protected = [room for contract in contracts for room in contract.get("protected_modules", ())]
    assert sorted(protected) == sorted(rooms - {"fastfsl.errors"})  # everyone may import the errors


def test_contracts_say_in_their_name_what_they_allow(pyproject):
    for contract in pyproject["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "protected":
            (room,) = contract["protected_modules"]
            allowed = [name.removeprefix("fastfsl.") for name in contract["allowed_importers"]]
            expected = f"{room.removeprefix('fastfsl.')}: imported by {', '.join(allowed) or 'nobody'}"
            assert contract["name"] == expected


def test_typetree_shows_every_room(checkout, rooms):
    subprocess.run([sys.executable, checkout / ".ci" / "typetree.py"], check=True)
    tree = checkout / "typetree" / "fastfsl"
    shown = {f"fastfsl.{path.stem}" for path in tree.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert shown - {"fastfsl.__init__"} == rooms
    assert (tree / "kernels").samefile(checkout / "kernels")
    assert (tree / "export").samefile(checkout / "export")

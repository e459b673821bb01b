"""The options of an estimator or a source, read from its source code: importing it would import torch.

A typing mistake in a configuration is then answered at once. What cannot be read so (no source file, an annotation of
another form than those in this package) is left to an import.
"""

import ast
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

_PACKAGE = Path(__file__).resolve().parents[1]

_SIMPLE: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "Any": Any}
_GENERIC: dict[str, Any] = {"tuple": tuple, "list": list, "dict": dict}


class _UnreadableError(Exception):
    """This code has to be imported to be understood."""


def read_options(path: str, without: Collection[str] = ()) -> dict[str, Any] | None:
    """Types of a class's constructor arguments by name, as `typing.get_type_hints` gives them.

    Args:
        path: Module and class, `module:Class`; the module may only pass the class on.
        without: Arguments to leave out; their types are not looked at.

    Returns:
        The types in the order of the arguments; None if only an import can tell.
    """
    module, _, name = path.partition(":")
    try:
        found = _find(module, name)
        if not isinstance(found.node, ast.ClassDef):
            return None
        return _constructor(found.module, found.node, without)
    except (_UnreadableError, OSError, SyntaxError, ValueError):
        return None


@dataclass(frozen=True)
class _Definition:
    """What a name stands for, and the module that says so."""

    module: str
    node: ast.AST


@cache
def _tree(module: str) -> ast.Module:
    # importlib's find_spec would import the packages above the module.
    place = _PACKAGE.joinpath(*module.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _find(module: str, name: str) -> _Definition:
    """The definition of a name at the top of a module, through imports of our own."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Definition(module, node)
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return _Definition(module, node.value)
        if isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module.startswith("fastfsl."):
                    return _find(node.module, alias.name)
    raise _UnreadableError


def _constructor(module: str, node: ast.ClassDef, without: Collection[str]) -> dict[str, Any]:
    """Arguments of a class that has an `__init__` or is a dataclass, with what it inherits."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            arguments = statement.args
            if arguments.vararg is not None or arguments.kwarg is not None:
                raise _UnreadableError
            return {
                argument.arg: _type(module, argument.annotation)
                for argument in (*arguments.args[1:], *arguments.kwonlyargs)
                if argument.arg not in without
            }
    options: dict[str, Any] = {}
    for base in reversed(node.bases):  # the first base wins
        if isinstance(base, ast.Name):
            try:
                found = _find(module, base.id)
            except _UnreadableError:  # of another package: ABC, BaseEstimator
                continue
            if isinstance(found.node, ast.ClassDef):
                options |= _constructor(found.module, found.node, without)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        options |= {name: _type(module, kind) for name, kind in _fields(node) if name not in without}
    return options


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Names and annotations of a dataclass's own arguments."""
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(statement.annotation):
            continue
        if statement.value is None or "init=False" not in ast.unparse(statement.value):
            yield statement.target.id, statement.annotation


def _type(module: str, node: ast.AST | None) -> Any:  # noqa: ANN401  # a type
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    if isinstance(node, ast.Name):
        if node.id in _SIMPLE:
            return _SIMPLE[node.id]
        found = _find(module, node.id)
        return _type(found.module, found.node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_type(module, node.left), _type(module, node.right)]  # noqa: UP007  # of types known when it runs
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        items: Sequence[ast.AST] = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return Literal[tuple(ast.literal_eval(item) for item in items)]
        if node.value.id in _GENERIC:
            inner = tuple(_item(module, item) for item in items)
            return _GENERIC[node.value.id][inner]
    raise _UnreadableError


def _item(module: str, node: ast.AST) -> Any:  # noqa: ANN401  # a type, or the dots of tuple[int, ...]
    return ... if isinstance(node, ast.Constant) and node.value is ... else _type(module, node)

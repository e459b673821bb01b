"""Which column of a table holds the paths, which the labels, which the splits."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fastfsl.data.split_names import split_of
from fastfsl.data.table_file import Table, looks_like_image
from fastfsl.errors import ConfigError, DataError

# The likelier before the less likely; compared in lower case and without blanks, - and _.
_PATHS = (
    "path", "filepath", "file", "filename", "imagepath", "imgpath", "imagefile", "imagefilename", "imagename",
    "image", "img", "imgname", "imgfile", "relativepath", "relpath", "fname", "imageid", "id", "name",
)  # fmt: skip
_LABELS = (
    "label", "class", "category", "target", "y", "labels", "classes", "classname", "labelname", "categoryname",
    "classlabel", "labeltext", "classid", "labelid", "categoryid", "targetname", "classidx", "labelidx", "species",
)  # fmt: skip
_SPLITS = ("split", "set", "subset", "partition", "dataset", "phase", "usage", "datasplit", "splitname")
_NAMES = (
    "labelname", "classname", "categoryname", "labeltext", "targetname", "labelstr", "classlabel", "text", "name",
)  # fmt: skip

# Rows that are looked at to see what a column holds.
_SAMPLE = 200


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns, as a user gives them; None: they are guessed.

    Attributes:
        path: of the image files.
        label: of the classes.
        split: of train, val and test.
    """

    path: str | None = None
    label: str | None = None
    split: str | None = None

    def __bool__(self) -> bool:
        """Whether any is given."""
        return any((self.path, self.label, self.split))


@dataclass(frozen=True)
class Chosen:
    """The columns of one table: names; of splits and of names of numbered labels None where there are none."""

    path: str
    label: str
    split: str | None
    names: str | None


def choose_columns(table: Table, given: Columns) -> Chosen:
    """The columns that are given, and for the others those whose names or values say what they are.

    Raises:
        ConfigError: a column that was named is not there.
        DataError: it is not clear which column holds the paths or the labels.
    """
    for option, name in (("path", given.path), ("label", given.label), ("split", given.split)):
        if name is not None and name not in table.columns:
            raise ConfigError(f"--{option}-column {name!r}: {table.path} has the columns {_listed(table.columns)}")
    taken = {name for name in (given.path, given.label, given.split) if name is not None}
    path = given.path or _path_column(table, taken)
    if path is None:
        raise DataError(_unclear(table, "paths", "path", "file_name, image"))
    taken.add(path)
    split = given.split or _split_column(table, taken)
    if split is not None:
        taken.add(split)
    label = given.label or next(iter(_named(table, _LABELS, taken)), None) or _only_other(table, taken)
    if label is None:
        raise DataError(_unclear(table, "labels", "label", "class, category"))
    taken.add(label)
    names = None
    if _are_numbers(table.columns[label]):
        names = next((name for name in _named(table, _NAMES, taken) if _name_numbers(table, label, name)), None)
    return Chosen(path, label, split, names)


def has_labels(table: Table, given: Columns) -> bool:
    """Whether it lists images with their labels, as far as its columns say."""
    try:
        choose_columns(table, given)
    except (ConfigError, DataError):
        return False
    return True


def _path_column(table: Table, taken: set[str]) -> str | None:
    """By name and values, by values alone, or by name alone: identifiers are names of files without their ending."""
    named = _named(table, _PATHS, taken)
    others = [name for name in table.columns if name not in taken]
    by_values = next((name for name in (*named, *others) if _mostly(table, name, looks_like_image)), None)
    return by_values or next((name for name in named if _plain(name) != "name"), None)


def _split_column(table: Table, taken: set[str]) -> str | None:
    """By name; a name that may mean something else as well only if its values are splits."""
    for name in _named(table, _SPLITS, taken):
        if "split" in _plain(name) or _mostly(table, name, lambda value: split_of(value) is not None):
            return name
    return None


def _named(table: Table, known: Sequence[str], taken: set[str]) -> list[str]:
    """The columns with one of these names, the likeliest first."""
    found = {_plain(name): name for name in reversed(table.columns) if name not in taken}
    return [found[name] for name in known if name in found]


def _mostly(table: Table, name: str, test: Callable[[str], bool]) -> bool:
    values = [value for value in table.columns[name][:_SAMPLE] if value not in (None, "")]
    return bool(values) and sum(test(str(value)) for value in values) > len(values) / 2


def _only_other(table: Table, taken: set[str]) -> str | None:
    """The one column that is left; a frame's nameless index is none."""
    left = [name for name in table.columns if name not in taken and not re.fullmatch(r"column \d+", name)]
    return left[0] if len(left) == 1 else None


def _are_numbers(values: Sequence[object]) -> bool:
    return all(re.fullmatch(r"\s*-?\d+(\.0+)?\s*", str(value)) for value in values[:_SAMPLE] if value not in (None, ""))


def _name_numbers(table: Table, label: str, names: str) -> bool:
    """Whether a column gives each label one name."""
    known: dict[str, object] = {}
    pairs = zip(table.columns[label], table.columns[names], strict=True)
    return all(isinstance(name, str) and known.setdefault(str(value), name) == name for value, name in pairs)


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).casefold()


def _unclear(table: Table, what: str, option: str, such_as: str) -> str:
    return (
        f"{table.path}: it is not clear which column holds the {what}: it has {_listed(table.columns)}; name it with "
        f"--{option}-column, or call it {option} (or {such_as})"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, list(names)[:20]))

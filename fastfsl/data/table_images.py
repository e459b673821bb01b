"""Where the images are that a table lists."""

from collections.abc import Sequence
from pathlib import Path

from fastfsl.data.natural_order import natural_key
from fastfsl.data.walk import is_system_name, readable_extensions
from fastfsl.errors import resource_error
from fastfsl.images import with_slashes

# Rows that are looked at to choose the folder.
_SAMPLE = 50


class ImageFinder:
    """Finds listed images below one folder, or below several.

    Args:
        beside: the table's folder, which is looked in first, and then the folders in it.
        root: the only folder to look in, if it is given.
        listed: paths as the table has them.
    """

    def __init__(self, beside: Path, root: Path | None, listed: Sequence[str]) -> None:
        self._places = [root] if root is not None else [beside, *_folders(beside)]
        self._endless: dict[Path, dict[str, Path]] = {}
        sample = [path for path in listed[:: max(1, len(listed) // _SAMPLE)] if not Path(path).is_absolute()]
        hits = {place: sum(self._at(place, path) is not None for path in sample) for place in self._places}
        # Stable: of places that hold as many the table's own folder comes first.
        self._places.sort(key=lambda place: -hits[place])
        self.root = self._places[0]

    @property
    def looked_in(self) -> list[Path]:
        """The folders that paths may be relative to."""
        return self._places

    def find(self, listed: str) -> Path | None:
        """The image file; None if it is nowhere."""
        return next((path for place in self._places if (path := self._at(place, listed)) is not None), None)

    def _at(self, place: Path, listed: str) -> Path | None:
        for text in dict.fromkeys((listed, with_slashes(listed))):
            path = place / text.removeprefix("./")  # an absolute one stays as it is
            if _is_file(path):
                return path
        if Path(listed).suffix.lower() not in readable_extensions():
            return self._by_stem(place / with_slashes(listed))
        return None

    def _by_stem(self, path: Path) -> Path | None:
        """The image whose name without its ending is listed, as the identifiers of some tables are."""
        folder = path.parent
        if folder not in self._endless:
            endings = readable_extensions()
            try:
                found = sorted(folder.iterdir())
            except (OSError, ValueError) as error:
                fault = resource_error(error, f"list {folder}")
                if fault is not None:
                    raise fault from error
                found = []
            self._endless[folder] = {file.stem: file for file in found if file.suffix.lower() in endings}
        return self._endless[folder].get(path.name)


def _folders(folder: Path) -> list[Path]:
    try:
        found = [path for path in folder.iterdir() if path.is_dir() and not is_system_name(path.name)]
    except OSError as error:
        fault = resource_error(error, f"list {folder}")
        if fault is not None:
            raise fault from error
        return []
    nested = [path / name for path in found for name in ("images", "train", "test") if (path / name).is_dir()]
    return [*sorted(found, key=lambda path: natural_key(path.name)), *nested]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError) as error:  # such as a name too long for the file system, or a disk that fails
        fault = resource_error(error, f"read {path}")
        if fault is not None:
            raise fault from error
        return False

"""One entrance for every kind of data."""

from pathlib import Path

from fastfsl.data.dataset import FeatureDataset, ImageDataset
from fastfsl.data.feature_file import read_feature_file
from fastfsl.data.folder import read_folder
from fastfsl.data.layouts import read_standard_set
from fastfsl.data.split_file import read_split_file
from fastfsl.errors import ConfigError, DataError, resource_error


def load_dataset(path: str | Path, image_root: str | Path | None = None) -> ImageDataset | FeatureDataset:
    """Read an image folder, a standard set's folder, a CoOp/Dassl split file (.json) or a feature file (.npz, ...).

    Args:
        path: Folder or file.
        image_root: For a split file: the folder its paths are relative to.

    Returns:
        Images or features, as the path says.

    Raises:
        DataError: The path does not exist, is of no known kind, or its content cannot be used.
        ShapeError: A feature file's arrays do not fit each other.
        ConfigError: `image_root` given where there is no split file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not _exists(path):
        raise DataError(
            f"{path} does not exist: expected an image folder, a split file (.json) or a feature file (.npz)"
        )
    if not path.is_dir() and suffix == ".json":
        return read_split_file(path, image_root)
    if image_root is not None:
        raise ConfigError(f"an image root goes with a split file (.json), and {path} is none")
    if path.is_dir():
        return read_standard_set(path) or read_folder(path)
    if suffix in {".npz", ".safetensors"}:
        return read_feature_file(path)
    raise DataError(
        f"{path} is of no known kind: expected an image folder, a CoOp/Dassl split file (.json) or a feature file "
        "(.npz or .safetensors)"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:  # a name too long for the file system, or with a NUL; or the disk fails
        fault = resource_error(error, f"read {path}")
        if fault is not None:
            raise fault from error
        return False

"""The demo's real data: scikit-learn's handwritten digits as a folder of images, with a fixed test split.

scikit-learn ships 1797 scans of handwritten digits, each an 8x8 grid of counts 0..16 (the number of ink pixels in every
4x4 block of a 32x32 bitmap). They are written here as 32x32 greyscale PNG files, ink light on dark:

    root/train/<word>/NNNN.png      the pool that few-shot episodes are sampled from (at least 74 images per class)
    root/test/<word>/NNNN.png       100 images per class, the same for every seed and every number of shots

`NNNN` is the scan's index in scikit-learn's order. The split needs no random generator, so it cannot change with a
library's version: within each class the scans are ordered by the SHA-256 of their index (`_rank`), and the first
`TEST_PER_CLASS` of them are the test split.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfsl.errors import ConfigError, DataError
from fastfsl.leftovers import NEW, staging_area, sweep_leftovers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Class folders and class names, index = digit."""

TEMPLATES = (
    "a photo of the digit {}.",
    "a scan of the digit {}.",
    "a photo of the handwritten digit {}.",
    "the number {}.",
)
"""Prompt templates of the demo; the tiny CLIP is pretrained on them among others."""

AUGMENTATION: dict[str, Any] = {"scale": (0.6, 1.0), "ratio": (0.8, 1.25), "horizontal_flip": False}
"""Random-resized-crop views for few-shot training: a mirrored digit is another shape, a small crop loses the stroke."""

TUNING: dict[str, dict[str, Any]] = {
    "mps": {"epochs": 40, "learning_rate": 0.05, "alpha": 0.9, "alignment_weight": 1.5},
    "lora": {"epochs": 40, "learning_rate": 1e-2},
    "clip-adapter": {"learning_rate": 0.1},
    "coop": {"learning_rate": 0.1},
    "cocoop": {"learning_rate": 5e-4},
}
"""Options by source. The published rates are for large models with a logit scale of 100, the tiny CLIP's is 15.6; these
were chosen on train images that the episode had left over."""

IMAGE_SIZE = 32
"""Height and width of the written images, in pixels: the resolution of the original bitmaps."""

TEST_PER_CLASS = 100
"""Test images per class; 1000 in all."""


def tiny_clip_dir() -> Path:
    """Folder of the packaged tiny CLIP (`open_clip_config.json`, `open_clip_model.safetensors`)."""
    return Path(__file__).resolve().parent / "tiny_clip"


def _rank(indices: Sequence[int], salt: str) -> list[int]:
    """Order indices by the SHA-256 of "<salt>/<index>": a fixed shuffle without a random generator."""
    return sorted(indices, key=lambda index: hashlib.sha256(f"{salt}/{index}".encode()).digest())


def split_indices(labels: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The demo's fixed stratified split.

    Args:
        labels: Class of every scan, in scikit-learn's order.

    Returns:
        Indices of the train pool and of the test split, each ascending. They are disjoint and cover all scans.

    Raises:
        DataError: A class has too few scans to leave a train pool of 16.
    """
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(int(label), []).append(index)
    test: list[int] = []
    for label, indices in by_class.items():
        if len(indices) < TEST_PER_CLASS + 16:
            raise DataError(
                f"expected at least {TEST_PER_CLASS + 16} scans of class {label}, got {len(indices)}; "
                "pass the labels of sklearn.datasets.load_digits()"
            )
        test += _rank(indices, "fastfsl-digits-test")[:TEST_PER_CLASS]
    chosen = frozenset(test)
    return tuple(i for i in range(len(labels)) if i not in chosen), tuple(sorted(chosen))


def load_scans() -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """All scans of scikit-learn's digits.

    Returns:
        Block counts 0..16 of shape (1797, 8, 8), and the label 0..9 of each.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the demo's digits come with scikit-learn: pip install 'fastfsl[train]'") from error
    digits = load_digits()
    return digits.images.astype("uint8"), tuple(int(label) for label in digits.target)


def enlarge(counts: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn one grid of block counts into a greyscale image by Pillow's bicubic enlargement.

    Args:
        counts: Ink pixels per block, 0..16, shape (8, 8).

    Returns:
        Grey levels 0..255 (ink light), shape (32, 32).
    """
    import numpy as np
    from PIL import Image

    grey = np.rint(counts.astype(np.float32) * (255 / 16)).astype(np.uint8)
    enlarged = Image.fromarray(grey).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(enlarged, dtype=np.uint8)


def write_digits(root: Path | str, *, num_shots: int | None = None, seed: int = 0) -> Path:
    """Write the digits as an image folder with the subfolders `train` and `test`.

    The folder is written beside its target and renamed, so it is never half there. A folder that already holds exactly
    these files is left as it is.

    Args:
        root: Target folder.
        num_shots: Train images per class, drawn from the pool with `seed`; None writes the whole pool.
        seed: Chooses the train images when `num_shots` is given. The test split never depends on it.

    Returns:
        The target folder.

    Raises:
        ConfigError: The target exists with other content, cannot be written, or scikit-learn is missing.
        DataError: `num_shots` is not between 1 and the size of the smallest class of the pool.
    """
    from PIL import Image

    root = Path(root)
    counts, labels = load_scans()
    train, test = split_indices(labels)
    if num_shots is not None:
        train = _sample(train, labels, num_shots, seed)
    files = {
        f"{split}/{CLASS_NAMES[labels[index]]}/{index:04d}.png": index
        for split, indices in (("train", train), ("test", test))
        for index in indices
    }
    if root.exists():
        found = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
        if found == files.keys():
            return root
        if found or not root.is_dir():
            raise ConfigError(f"{root} exists and is not this set of digits; remove it or choose another folder")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        sweep_leftovers(root.parent)
        with staging_area(root.absolute()) as area:
            for name, index in files.items():
                path = area / NEW / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(enlarge(counts[index])).save(path)
            if root.is_dir():
                root.rmdir()  # empty, as checked above
            (area / NEW).rename(root)
    except OSError as error:
        raise ConfigError(
            f"cannot write {root}: {error}; free some space or choose a folder you may write to"
        ) from error
    return root


def _sample(pool: Sequence[int], labels: Sequence[int], num_shots: int, seed: int) -> tuple[int, ...]:
    """Draw `num_shots` indices per class from the pool, the same for the same seed."""
    chosen: list[int] = []
    for digit, name in enumerate(CLASS_NAMES):
        members = [index for index in pool if labels[index] == digit]
        if not 1 <= num_shots <= len(members):
            raise DataError(f"expected num_shots between 1 and {len(members)} (class {name}), got {num_shots}")
        chosen += _rank(members, f"fastfsl-digits-train-{seed}")[:num_shots]
    return tuple(sorted(chosen))

"""Augmented views of an image: a random crop, resized, maybe mirrored.

Every view is a function of (image bytes, augmentation, seed, number of the view) alone: its random numbers come from a
generator of its own, not from torch's, so a view does not depend on the batch, the thread or the images around it, and
a cached one can stand in for it.
"""

import hashlib
import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

from fastfsl.errors import ConfigError
from fastfsl.images import Preprocessing

_TRIES = 10  # as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Augmentation:
    """How views differ. The default is CLIP's usual few-shot recipe.

    Attributes:
        scale: Least and greatest area of the crop, as a fraction of the image.
        ratio: Least and greatest width / height of the crop before it is resized.
        horizontal_flip: Mirror every second view on average; off for data with a left and a right, such as digits.
        interpolation: "bicubic" or "bilinear".
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: bool = True
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            try:
                low, high = (float(value) for value in getattr(self, name))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"augmentation {name}: expected two numbers, got {getattr(self, name)!r}") from error
            if not (0 < low <= high < math.inf) or (name == "scale" and high > 1):
                limit = "0 < least <= greatest <= 1" if name == "scale" else "0 < least <= greatest"
                raise ConfigError(f"augmentation {name}: expected {limit}, got {(low, high)}")
            object.__setattr__(self, name, (low, high))
        if not isinstance(self.horizontal_flip, bool):
            raise ConfigError(f"augmentation horizontal_flip: expected true or false, got {self.horizontal_flip!r}")
        if self.interpolation not in {"bicubic", "bilinear"}:
            raise ConfigError(f"augmentation interpolation: expected bicubic or bilinear, got {self.interpolation!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def augmented_view(
    image: Image.Image,
    augmentation: Augmentation,
    preprocessing: Preprocessing,
    view_seed: int,
) -> torch.Tensor:
    """One augmented view, ready for the encoder.

    Args:
        image: The whole image.
        augmentation: What may vary.
        preprocessing: The model's size, mean and standard deviation.
        view_seed: Decides what does; see `seed_of_view`.

    Returns:
        Normalised pixels (3, height, width), fp32.
    """
    rng = random.Random(view_seed)
    image = image.convert("RGB")
    top, left, height, width = crop_box(image.height, image.width, augmentation, rng)
    mode = InterpolationMode(augmentation.interpolation)
    view = TF.resized_crop(image, top, left, height, width, list(preprocessing.image_size), mode)
    if augmentation.horizontal_flip and rng.random() < 0.5:
        view = TF.hflip(view)
    pixels: torch.Tensor = TF.normalize(TF.to_tensor(view), preprocessing.mean, preprocessing.std)
    return pixels


def crop_box(
    image_height: int, image_width: int, augmentation: Augmentation, rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw the crop that torchvision's RandomResizedCrop draws, but from a generator of one's own.

    Only `rng.random()` is used: its stream is the one that Python guarantees between versions.

    Args:
        image_height: Pixels.
        image_width: Pixels.
        augmentation: Its `scale` and `ratio`.
        rng: Where the randomness comes from.

    Returns:
        (top, left, height, width) in pixels, inside the image.

    Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    area = image_height * image_width
    low, high = augmentation.ratio
    for _ in range(_TRIES):
        target_area = area * _uniform(rng, *augmentation.scale)
        ratio = math.exp(_uniform(rng, math.log(low), math.log(high)))
        width, height = round(math.sqrt(target_area * ratio)), round(math.sqrt(target_area / ratio))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(rng.random() * (image_height - height + 1))
            left = int(rng.random() * (image_width - width + 1))
            return top, left, height, width
    # An image far from any allowed shape: the largest central crop of the nearest shape.
    width, height = image_width, image_height
    if image_width / image_height < low:
        height = max(1, round(image_width / low))
    elif image_width / image_height > high:
        width = max(1, round(image_height * high))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def seed_of_view(seed: int, image_sha256: str, view: int) -> int:
    """Seed of one view of one image, from the run's seed, the image's content and the view's number."""
    return int.from_bytes(hashlib.sha256(f"{seed} {image_sha256} {view}".encode()).digest()[:16], "big")


def _uniform(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()

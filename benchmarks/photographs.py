"""Photographs to measure with: those of a folder, or pictures drawn with the spectrum that photographs have."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def photographs(folder: str | None, scratch: Path, count: int = 64) -> list[Path]:
    """The JPEG files below ``folder``, sorted; without one, ``count`` drawn ones, written to ``scratch``."""
    if folder is not None:
        found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        assert found, f"no JPEG file below {folder}"
        return found
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        paths.append(scratch / f"{index:03}.jpg")
        size = (400, 533) if index % 3 else (533, 400)
        draw(rng, *size).save(paths[-1], quality=75)
    return paths


def draw(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency, as a photograph's does, and whose bands are alike."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    fall = 1 / np.maximum(np.hypot(fx, fy), 1 / max(width, height))

    def noise() -> np.ndarray:
        return np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * fall, (height, width))

    grey = noise()
    bands = np.stack([grey + 0.3 * noise() for _ in range(3)], axis=-1)
    return Image.fromarray((128 + 50 * bands / bands.std()).clip(0, 255).astype(np.uint8))


def mosaic(paths: list[Path], width: int, height: int, offset: int = 0) -> bytes:
    """A large JPEG with detail down to the pixel: photographs side by side."""
    canvas = Image.new("RGB", (width, height))
    x = y = row = 0
    for index in range(offset, offset + 10_000):
        with Image.open(paths[index % len(paths)]) as photo:
            canvas.paste(photo, (x, y))
            row = max(row, photo.height)
            x += photo.width
        if x >= width:
            x, y, row = 0, y + row, 0
        if y >= height:
            break
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

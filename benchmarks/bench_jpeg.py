"""From JPEG files to classes with a ViT-B-32: Pillow, open_clip's transform and torch against the bundle's runtime.

`pytest benchmarks/bench_jpeg.py [--photos FOLDER] [--save-results]`. Weights are random, which costs the same time.
Both sides take 32 images at once and both cores; rounds are interleaved, and figures are medians.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.photographs import mosaic, photographs
from benchmarks.random_vit import random_encoder, write_bundle
from fastfsl.encoders import Encoder
from fastfsl.images import exact_pixels, fast_pixels, open_image
from fastfsl.images.prepared import MARGIN
from fastfsl.runtime import Classifier

BATCH, IMAGES, ROUNDS = 32, 64, 5
SIDES = ("torch", "exact", "fast")
# Threads of the graphs, and threads that decode.
DIVISIONS = ((1, 1), (1, 2), (2, 1), (2, 2))
# Short edges, in pixels: a photograph of a telephone, and the smallest that are decoded at 1/8, 1/4 and 1/2.
LARGE = (3024, *(int(224 * MARGIN * scale) for scale in (8, 4, 2)))


@pytest.fixture(scope="module")
def photos(request, tmp_path_factory) -> list[Path]:
    return photographs(request.config.getoption("--photos"), tmp_path_factory.mktemp("photos"))


@pytest.fixture
def drawn(request) -> str:
    """Ends the name of a result: what was measured on photographs is not replaced by what was on drawn ones."""
    return "" if request.config.getoption("--photos") else "_drawn"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return random_encoder()


@pytest.fixture(scope="module")
def int8_bundle(encoder, tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "int8", encoder)


def bench_jpeg_to_class(benchmark, record, encoder, int8_bundle, photos, drawn):
    files = [photos[index % len(photos)] for index in range(IMAGES)]
    loaded = {mode: Classifier.load(int8_bundle, device="cpu", preprocess=mode, max_batch=BATCH) for mode in SIDES[1:]}
    head = torch.from_numpy(np.random.default_rng(0).normal(size=(10, encoder.embed_dim)).astype(np.float32))

    def torch_side() -> np.ndarray:
        found = []
        for start in range(0, len(files), BATCH):
            pixels = torch.stack([encoder.transform(Image.open(file)) for file in files[start : start + BATCH]])
            found.append(encoder.encode_images(pixels))
        embeddings = torch.cat(found)
        (embeddings @ head.T).softmax(dim=1).topk(5)
        return embeddings.numpy()

    sides: dict[str, Callable[[], object]] = {
        "torch": torch_side,
        "exact": lambda: loaded["exact"].predict(files),
        "fast": lambda: loaded["fast"].predict(files),
    }
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}

    def all_rounds():
        for side in SIDES:
            sides[side]()
        for _ in range(ROUNDS):
            for side in SIDES:
                start = time.perf_counter()
                sides[side]()
                seconds[side].append(time.perf_counter() - start)

    benchmark.pedantic(all_rounds, rounds=1)
    speedups = {
        mode: statistics.median(a / b for a, b in zip(seconds["torch"], seconds[mode], strict=True))
        for mode in SIDES[1:]
    }
    cosines = {mode: float((loaded[mode].embed(files) * torch_side()).sum(axis=1).min()) for mode in SIDES[1:]}
    record(
        f"jpeg_to_class{drawn}",
        {
            "what": f"JPEG files to the 5 best classes, ViT-B-32, batches of {BATCH}, {IMAGES} files, {ROUNDS} rounds",
            "photos": _describe(files),
            "images_per_second": {side: round(IMAGES / statistics.median(seconds[side]), 1) for side in SIDES},
            "speedup": {mode: round(value, 2) for mode, value in speedups.items()},
            "min_cosine_to_torch": {mode: round(value, 5) for mode, value in cosines.items()},
            "image_threads": loaded["exact"].describe()["image_threads"],
        },
    )
    assert min(cosines.values()) >= 0.99
    assert min(speedups.values()) >= 3


@pytest.mark.slow  # `make bench-all`
def bench_division_of_threads(benchmark, record, int8_bundle, photos, monkeypatch, drawn):
    """What two cores gain from reading ahead, and how many threads should decode."""
    files = [photos[index % len(photos)] for index in range(IMAGES)]
    sides = {
        (session, images): Classifier.load(
            int8_bundle, device="cpu", max_batch=BATCH // 2, num_threads=session, image_threads=images
        )
        for session, images in DIVISIONS
    }
    seconds: dict[tuple[int, int, int], list[float]] = {}

    def all_rounds():
        for side in sides.values():
            side.predict(files)
        for _ in range(ROUNDS):
            for (session, images), side in sides.items():
                for look_ahead in (0, 1):
                    monkeypatch.setattr("fastfsl.runtime.image_reader.LOOK_AHEAD", look_ahead)
                    start = time.perf_counter()
                    side.predict(files)
                    seconds.setdefault((session, images, look_ahead), []).append(time.perf_counter() - start)

    benchmark.pedantic(all_rounds, rounds=1)
    rate = {key: IMAGES / statistics.median(values) for key, values in seconds.items()}
    record(
        f"image_threads{drawn}",
        {
            "what": f"images a second from JPEG files, ViT-B-32 int8, batches of {BATCH // 2}, {ROUNDS} rounds",
            "rows": [
                {
                    "num_threads": session,
                    "image_threads": images,
                    "batches_read_ahead": look_ahead,
                    "images_per_second": round(value, 1),
                }
                for (session, images, look_ahead), value in rate.items()
            ],
        },
    )
    # What a classifier does when it is not told otherwise is within reach of the best division.
    assert rate[2, 2, 1] >= 0.85 * max(rate.values())


def bench_fast_preprocessing(benchmark, record, encoder, photos, drawn):
    """Time for one image on one thread, and what is left of its embedding in fp32."""
    rows: list[dict[str, Any]] = []

    def all_sizes():
        own = [path.read_bytes() for path in photos[:: max(1, len(photos) // 64)]]
        rows.append({"short_edge": "as they are", **_compare(encoder, own)})
        for edge in LARGE:
            made = [mosaic(photos, edge, edge * 4 // 3, offset=7 * index) for index in range(8)]
            rows.append({"short_edge": edge, **_compare(encoder, made)})

    benchmark.pedantic(all_sizes, rounds=1)
    record(
        f"fast_preprocessing{drawn}",
        {
            "what": "preprocess='fast' against 'exact': milliseconds for one JPEG on one thread, cosine of ViT-B-32",
            "margin": MARGIN,
            "rows": rows,
        },
    )
    for row in rows:
        assert row["min_cosine"] >= 0.999
    assert rows[1]["fast_ms"] <= rows[1]["exact_ms"] / 2


def _compare(encoder: Encoder, files: list[bytes]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"exact": [], "fast": []}
    pixels: dict[str, list[np.ndarray]] = {"exact": [], "fast": []}
    for data in files:
        for name, prepare in (("exact", exact_pixels), ("fast", fast_pixels)):
            start = time.perf_counter()
            pixels[name].append(prepare(data, encoder.preprocessing))
            seconds[name].append(time.perf_counter() - start)
    mean, std = (torch.tensor(values) for values in (encoder.preprocessing.mean, encoder.preprocessing.std))
    exact, fast = (
        torch.cat(
            [
                encoder.encode_images(((torch.from_numpy(np.stack(part)) / 255 - mean) / std).permute(0, 3, 1, 2))
                for part in (pixels[name][start : start + 16] for start in range(0, len(files), 16))
            ]
        )
        for name in ("exact", "fast")
    )
    return {
        "images": len(files),
        **{f"{name}_ms": round(1000 * statistics.median(values), 2) for name, values in seconds.items()},
        "min_cosine": round(float((exact * fast).sum(dim=1).min()), 6),
    }


def _describe(files: list[Path]) -> dict[str, object]:
    sizes = [open_image(file).size for file in files]
    return {
        "median_size": [int(statistics.median(size[axis] for size in sizes)) for axis in (0, 1)],
        "mean_bytes": round(statistics.mean(file.stat().st_size for file in files)),
    }

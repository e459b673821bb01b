"""What the kernels do to the memory of a `FakeDriver`: by Triton's interpreter, or faster by their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.runtime.fake_driver import FakeDriver

Execute = Callable[[dict[str, Any], tuple[int, int], dict[str, Any]], None]


def interpreted(driver: FakeDriver) -> Execute:
    """Runs the Triton kernel that an image names, in Triton's interpreter."""
    import torch

    from fastfsl.kernels import flow_kernels
    from fastfsl.kernels.tiles import Tile

    dtypes = {"float32": torch.float32, "weight": torch.float16, "state": torch.float16}

    def execute(image, grid, values):
        def argument(name, value):
            dtype = dtypes.get(image["parameters"][name])
            if dtype is None:
                return value
            rest = driver.bytes_at(value)
            return torch.from_numpy(rest[: len(rest) // 4 * 4]).view(dtype)

        kernel = flow_kernels.FLOW[image["kernel"]]
        constants = flow_kernels.constants(image["kernel"], image["dim"], Tile(**image["tile"]))
        with np.errstate(all="ignore"):
            kernel[grid](**{name: argument(name, value) for name, value in values.items()}, **constants)

    return execute


def by_equation(driver: FakeDriver) -> Execute:
    """Computes what an image's kernel stands for, in float32 but for what is stored in 16 bits."""

    def execute(image, grid, values):
        n, dim = values["n"], image["dim"]

        def at(name, *shape):
            dtype = np.dtype(np.float32 if image["parameters"][name] == "float32" else np.float16)
            size = int(np.prod(shape))
            return driver.bytes_at(values[name], size * dtype.itemsize).view(dtype).reshape(shape)

        def product(x):
            return x.astype(np.float32) @ at("weight", dim, dim).astype(np.float32).T + at("bias", dim)

        def normalised():
            h, (a, c) = at("h", n, dim).astype(np.float32), at("table", 2, dim)
            return (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6) * a + c

        kernel = image["kernel"]
        if kernel == "enter":
            at("u", n, dim)[:] = at("h", n, dim)[:] = product(at("x", n, dim))
            at("total", n, dim)[:] = 0
        elif kernel == "first":
            value = product(normalised())
            at("hidden", n, dim)[:] = value / (1 + np.exp(-value))
        elif kernel == "second":
            at("h", n, dim)[:] += at("table", 3, dim)[2] * product(at("hidden", n, dim))
        elif kernel == "carry":
            m = normalised()
            at("total", n, dim)[:] += m
            at("u", n, dim)[:] += values["step_size"] * product(m)
            at("next_h", n, dim)[:] = at("u", n, dim)
        elif kernel == "exit":
            moved = product(at("total", n, dim) + normalised()) + (values["done"] - 1) * at("bias", dim)
            at("out", n, dim)[:] = at("x", n, dim) + values["step_size"] * moved
        else:
            features, classes = at("features", n, dim), at("classes", values["num_classes"], dim)
            length = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
            at("logits", n, values["num_classes"])[:] = values["logit_scale"] * features @ classes.T / length

    def quiet(image, grid, values):
        with np.errstate(all="ignore"):
            execute(image, grid, values)

    return quiet

"""Plans, features and plain torch versions that the sections of the GPU suite share. Nothing in them is zero."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

import fastfsl
from fastfsl.flow import FlowPlan, VelocityField, normalize

# What the products' operands are; "tf32" is float32 whose products may round their operands.
Precision = Literal["fp16", "bf16", "fp32", "tf32"]
DTYPES: dict[Precision, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}


class FlowOptions(TypedDict):
    """Of `euler_flow`, for a precision."""

    dtype: torch.dtype
    allow_tf32: bool


def flow_options(precision: Precision) -> FlowOptions:
    """What makes `euler_flow` compute so."""
    return {"dtype": DTYPES[precision], "allow_tf32": precision == "tf32"}


def timed_dtype(device: str) -> torch.dtype:
    """What is timed: bf16, and fp16 in Triton's interpreter, which multiplies bf16 wrongly."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def random_plan(dim: int, num_blocks: int, num_steps: int, seed: int, precision: Precision) -> FlowPlan:
    """A plan whose every tensor is drawn and then rounded, in float32 on the CPU.

    Weights of gain one, gates of 0.3: a kernel that leaves a part out is far off. Rounded here, so that what is
    compared with float64 is arithmetic alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float, shift: float = 0.0) -> Tensor:
        return shift + scale * torch.randn(*shape, generator=generator)

    def weight(*shape: int) -> Tensor:
        return drawn(*shape, dim, dim, scale=dim**-0.5)

    input_weight, output_weight, output_bias = weight(), weight(), drawn(dim, scale=0.1)
    block_table = drawn(num_steps, num_blocks, 3, dim, scale=0.3)
    block_table[:, :, 0] += 1.0
    final_table = drawn(num_steps, 2, dim, scale=0.3)
    final_table[:, 0] += 1.0
    plan = FlowPlan(
        step_size=1 / num_steps,
        input_weight=input_weight,
        input_bias=drawn(dim, scale=0.1),
        first_weight=weight(num_blocks),
        first_bias=drawn(num_blocks, dim, scale=0.1),
        second_weight=weight(num_blocks),
        second_bias=drawn(num_blocks, dim, scale=0.1),
        output_weight=output_weight,
        output_bias=output_bias,
        carry_weight=input_weight @ output_weight,
        carry_bias=input_weight @ output_bias,
        block_table=block_table,
        final_table=final_table,
    )
    return plan.to(dtype=DTYPES[precision]).to(dtype=torch.float32)


def random_features(rows: int, dim: int, seed: int, precision: Precision) -> Tensor:
    """Unit rows, rounded, in float32 on the CPU, (rows, dim)."""
    drawn = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return normalize(drawn).to(DTYPES[precision]).to(torch.float32)


def random_field(dim: int, num_blocks: int, seed: int) -> VelocityField:
    """A velocity field with drawn weights, in evaluation mode on the CPU."""
    torch.manual_seed(seed)
    field = VelocityField(dim, num_blocks).eval()
    with torch.no_grad():  # zero-initialised layers would make v = 0
        for parameter in field.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 / dim**0.5 if parameter.ndim > 1 else 0.02))
    return field


def random_tokens(
    shape: tuple[int, int, int], drift: float, seed: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Features and reference (B, N, d), unit rows but for rounding, with Gram matrices about `drift` apart.

    Half of every row is common to all of its matrix, as tokens of an image have much in common.
    """
    generator = torch.Generator(device).manual_seed(seed)
    batch, _, dim = shape
    common = torch.randn(batch, 1, dim, generator=generator, device=device)
    reference = normalize(common + torch.randn(shape, generator=generator, device=device))
    direction = torch.randn(shape, generator=generator, device=device) / dim**0.5
    # An entry of S - S' is f . e' + e . f', of standard deviation sqrt(2 / d); its mean magnitude sqrt(2 / pi) of that.
    scale = drift * (dim / 2) ** 0.5 * (torch.pi / 2) ** 0.5
    features = normalize(reference + scale * direction)
    return features.to(dtype), reference.to(dtype)


def _manifold_gram() -> Any:
    """`fastfsl.manifold.gram` by its file: the package's other modules need open_clip, which a card may be without."""
    name = "fastfsl_manifold_gram"
    if name not in sys.modules:
        (folder,) = fastfsl.__path__
        spec = importlib.util.spec_from_file_location(name, Path(folder) / "manifold" / "gram.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"expected manifold/gram.py in {folder}")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where torch.compile looks for it
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


manifold_gram_loss = _manifold_gram().gram_alignment_loss


def plain_gram_loss(features: Tensor, reference: Tensor, kind: str = "l1", *, normalize: bool = True) -> Tensor:
    """The loss as research code writes it: two Gram matrices in the features' dtype and their difference."""
    if normalize:
        features, reference = functional.normalize(features, dim=-1), functional.normalize(reference, dim=-1)
    difference = features @ features.mT - reference @ reference.mT
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def distance(out: Tensor, exact: Tensor, origin: Tensor | float = 0.0) -> float:
    """|out - exact| / |exact - origin| in float64; not a number if anything in `out` is."""
    exact = exact.to(torch.float64)
    return float((out.to(exact) - exact).norm() / (exact - origin).norm())


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that is allocated without a value is filled with NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills memory, unless told otherwise
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def tf32(precision: Precision) -> Iterator[None]:
    """Torch's own float32 products round their operands too, if `precision` says so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

from collections.abc import Callable

import pytest
import torch

from fastfsl.flow import VelocityField


@pytest.fixture(scope="session")
def randomised() -> Callable[..., VelocityField]:
    """A maker of fields whose zero-initialised layers are random too: with them at zero, v = 0 would pass anything."""

    def make(dim: int, num_blocks: int, seed: int = 0) -> VelocityField:
        generator = torch.Generator().manual_seed(seed)
        field = VelocityField(dim, num_blocks).double()
        with torch.no_grad():
            for parameter in field.parameters():
                std = 0.5 / dim**0.5 if parameter.ndim > 1 else 0.1
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=std)
        return field

    return make


@pytest.fixture
def field(randomised) -> VelocityField:
    return randomised(48, 3)

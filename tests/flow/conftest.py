from collections.abc import Callable

import pytest
import torch

from fastfsl.flow import VelocityField


@pytest.fixture(scope="session")
def randomised() -> Callable[..., VelocityField]:
    """A maker of fields whose zero-initialised layers are random too: with them at zero, v = 0 would pass anything."""

    def make(dim: int, num_blocks: int, seed: int = 0) -> VelocityField:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the field's own initialisation draws too
            field = VelocityField(dim, num_blocks).double()
            for parameter in field.parameters():
                std = 0.5 / dim**0.5 if parameter.ndim > 1 else 0.1
                parameter.add_(torch.randn_like(parameter), alpha=std)
        return field

    return make


@pytest.fixture
def field(randomised) -> VelocityField:
    return randomised(48, 3)

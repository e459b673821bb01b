from collections.abc import Callable

import pytest
import torch

from fastfsl.flow import FlowPlan, VelocityField, build_plan


@pytest.fixture(scope="session")
def random_plan() -> Callable[..., FlowPlan]:
    """A maker of float64 plans of fields whose zero-initialised layers are random too."""

    def make(dim: int, num_blocks: int, num_steps: int, seed: int = 0) -> FlowPlan:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            field = VelocityField(dim, num_blocks).double().requires_grad_(requires_grad=False)
            for parameter in field.parameters():
                std = 0.5 / dim**0.5 if parameter.ndim > 1 else 0.1
                parameter.add_(torch.randn_like(parameter), alpha=std)
        return build_plan(field, num_steps, 0.1)

    return make

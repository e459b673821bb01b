"""Which implementation of a loss a training takes: compiled kernels where a card runs them, torch elsewhere."""

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastfsl.manifold import gram_alignment_loss

GramKind = Literal["l1", "squared"]
GramLoss = Callable[[Tensor, Tensor, GramKind], Tensor]

# The oldest tensor cores that multiply bfloat16.
_LEAST_CAPABILITY = (8, 0)


def gram_loss_for(device: torch.device) -> GramLoss:
    """The Gram alignment loss, called with (features, reference, kind): the kernel on CUDA, torch elsewhere.

    Torch too where Triton is not installed, and on cards before compute capability 8.
    """
    if (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    ):
        from fastfsl.kernels import gram_loss

        return gram_loss.gram_alignment_loss
    return gram_alignment_loss

"""The tuned tower: a vision transformer's upper half, trained beside the frozen one that it came from.

Of L blocks the lower third is frozen. A middle block gets a parallel linear map, x <- Block(x) + A x, with Block frozen
and A trained from zero. The upper third, the final norm and the projection are trained copies. Both branches share the
lower third and the first middle block, whose Block(x) they have in common.

Source: "Preserve and Sculpt" (arXiv 2508.12877), method section.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfsl.errors import ConfigError, DataError
from fastfsl.manifold.vit import Block, take_apart


@dataclass(frozen=True)
class TowerOutput:
    """What a training step takes from both branches; nothing is normalised.

    Attributes:
        tuned: Features (n, d) of the tuned branch.
        frozen: Features (n, d) of the frozen encoder; they carry no gradient.
        tuned_tokens: All tokens (n, T, d) of the tuned branch after the final norm and the projection, if asked for.
        frozen_tokens: The same of the frozen encoder.
        last_stream: Value stream (n, d) from the input of the last tuned block, if asked for.
        previous_stream: Value stream (n, d) from the input of the block before it.
    """

    tuned: Tensor
    frozen: Tensor
    tuned_tokens: Tensor | None = None
    frozen_tokens: Tensor | None = None
    last_stream: Tensor | None = None
    previous_stream: Tensor | None = None


class TunedTower(nn.Module):
    """A frozen visual tower and its tuned branch.

    The tower given is frozen in place and shared: only what is trained is copied. Trained parameters are those that
    require gradients. There is no dropout: `train()` leaves the tower in evaluation mode.

    Args:
        visual: open_clip's `model.visual`, OpenAI-style or a timm vision transformer.

    Attributes:
        checkpointing: Recompute the activations of the tuned blocks in the backward pass instead of keeping them.

    Raises:
        ConfigError: A tower that cannot be taken apart, or too few blocks for two in the upper third.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        anatomy = take_apart(visual)
        depth = len(anatomy.blocks)
        lower, upper = round(depth / 3), round(2 * depth / 3)
        if depth - upper < 2:
            raise ConfigError(
                f"the visual tower has {depth} blocks, which leaves {depth - upper} for the tuned upper third: "
                "expected at least 2, so a tower of at least 5 blocks"
            )
        visual.requires_grad_(requires_grad=False)
        self.checkpointing = False
        self.embed = anatomy.embed
        self.lower = nn.ModuleList(anatomy.blocks[:lower])
        self.middle = nn.ModuleList(anatomy.blocks[lower:upper])
        self.frozen_upper = nn.ModuleList(anatomy.blocks[upper:])
        self.frozen_head = anatomy.head
        weight = anatomy.blocks[0].in_weight
        width = weight.shape[1]
        parallel = [nn.Linear(width, width, bias=False).to(weight) for _ in self.middle]
        for linear in parallel:
            nn.init.zeros_(linear.weight)
        self.parallel = nn.ModuleList(parallel)
        self.upper = copy.deepcopy(self.frozen_upper).requires_grad_()
        self.head = copy.deepcopy(self.frozen_head).requires_grad_()
        self.eval()

    def train(self, mode: bool = True) -> "TunedTower":  # noqa: ARG002, FBT001, FBT002  # torch's signature
        """Stay in evaluation mode."""
        return super().train(mode=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features of both branches, for inference.

        Args:
            pixels: Normalised pixels (n, 3, height, width).

        Returns:
            tuned (n, d), frozen (n, d), not normalised.
        """
        x, first = self._shared(pixels)
        tuned, frozen = first + self.parallel[0](x), first
        for block, linear in zip(self.middle[1:], self.parallel[1:], strict=True):
            both = block(torch.cat([tuned, frozen])).unflatten(0, (2, -1))
            tuned, frozen = both[0] + linear(tuned), both[1]
        for block, frozen_block in zip(self.upper[:-1], self.frozen_upper[:-1], strict=True):
            tuned, frozen = block(tuned), frozen_block(frozen)
        return (
            self.head.feature(self._last(self.upper, tuned)),
            self.frozen_head.feature(self._last(self.frozen_upper, frozen)),
        )

    def training_output(self, pixels: Tensor, *, local: bool, streams: bool) -> TowerOutput:
        """Everything the losses of one step need, and no more.

        Args:
            pixels: Normalised pixels (n, 3, height, width); several views go in as one batch.
            local: Whether the tokens of both branches are needed.
            streams: Whether the value streams of the last two blocks are needed.
        """
        with torch.no_grad():
            x, first = self._shared(pixels)
            frozen, frozen_tokens = self._frozen_half(first, local=local)
        tuned = first + self.parallel[0](x)
        for block, linear in zip(self.middle[1:], self.parallel[1:], strict=True):
            tuned = self._kept(_with_parallel, block, linear, tuned)
        inputs = []
        for block in self.upper[:-1]:
            inputs.append(tuned)
            tuned = self._kept(block, tuned)
        inputs.append(tuned)
        if local:
            feature, tokens = self.head.feature_and_tokens(self._kept(self.upper[-1], tuned))
        else:
            feature, tokens = self.head.feature(self._kept(self._last, self.upper, tuned)), None
        last_stream, previous_stream = self._streams(inputs[-1], inputs[-2]) if streams else (None, None)
        return TowerOutput(feature, frozen, tokens, frozen_tokens, last_stream, previous_stream)

    def state(self) -> dict[str, NDArray[Any]]:
        """The trained tensors by name, copied."""
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in self._trained().items()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put trained tensors back.

        Raises:
            DataError: A name is missing or unknown, or a shape differs.
        """
        trained = self._trained()
        misfits = [f"{name} is missing" for name in trained.keys() - state.keys()]
        misfits += [f"{name} is unknown" for name in state.keys() - trained.keys()]
        misfits += [
            f"{name} is {state[name].shape}, expected {tuple(tensor.shape)}"
            for name, tensor in trained.items()
            if name in state and state[name].shape != tuple(tensor.shape)
        ]
        if misfits:
            shown = ", ".join(sorted(misfits)[:3])
            raise DataError(
                f"the tuned tensors do not fit the visual tower: {shown}{', ...' if len(misfits) > 3 else ''}; "
                "they belong to a tower of another architecture"
            )
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(torch.from_numpy(np.asarray(state[name])))

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _shared(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Input and Block(input) of the first middle block, which both branches have in common."""
        x = self.embed(pixels)
        for block in self.lower:
            x = block(x)
        return x, self.middle[0](x)

    def _frozen_half(self, x: Tensor, *, local: bool) -> tuple[Tensor, Tensor | None]:
        for block in [*self.middle[1:], *self.frozen_upper[:-1]]:
            x = block(x)
        if local:
            return self.frozen_head.feature_and_tokens(self.frozen_upper[-1](x))
        return self.frozen_head.feature(self._last(self.frozen_upper, x)), None

    def _streams(self, last_input: Tensor, previous_input: Tensor) -> tuple[Tensor, Tensor]:
        """Value streams of the last block and of the one before it, through the last block as one batch."""
        if self.head.pool is None:
            last_input, previous_input = last_input[:, 0], previous_input[:, 0]
        before, last = (cast("Block", block) for block in self.upper[-2:])
        both = torch.cat([last_input, before.value_stream(previous_input)])
        last_stream, previous_stream = self.head.feature(last.value_stream(both)).chunk(2)
        return last_stream, previous_stream

    def _last(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """The last of the blocks for what the pooling reads: one token (n, width), or all (n, T, width)."""
        last = cast("Block", blocks[-1])
        return last.read(x) if self.head.pool is None else last(x)

    def _kept(self, function: Callable[..., Tensor], *arguments: Tensor | nn.Module) -> Tensor:
        """function(*arguments), its activations recomputed in the backward pass if `checkpointing`."""
        if self.checkpointing and torch.is_grad_enabled():
            result: Tensor = checkpoint(function, *arguments, use_reentrant=False)
            return result
        return function(*arguments)


def _with_parallel(block: Block, linear: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x) + linear(x)
    return y

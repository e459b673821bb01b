"""What is tuned, and the gradient of its loss over a batch, taken in parts without changing it."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from fastfsl.errors import ConfigError
from fastfsl.fit.batches import derived_seed
from fastfsl.fit.processes import ALONE, Processes


class Objective(Protocol):
    """A module with a loss: own + batch_loss. Its trained parameters are those with `requires_grad`."""

    def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the loss is made of.

        Args:
            inputs: normalised pixels of V views, (n, V, 3, height, width), or their features, (n, V, d).
            progress: fraction of the training done, in [0, 1].

        Returns:
            Tensors whose first dimension is the samples, which enter losses over the whole batch; and the mean over the
            samples of the losses that each has by itself, weighted already, or None.
        """

    def batch_loss(
        self, outputs: dict[str, Tensor], labels: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss over the whole batch from the outputs of all its samples and labels (n,), and its parts."""

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """As of a torch module."""

    def train(self, mode: bool = True) -> object:  # noqa: FBT001, FBT002 - torch's signature
        """As of a torch module."""


def take_gradient(
    objective: Objective,
    inputs: Tensor,
    labels: Tensor,
    progress: float,
    *,
    seed: int,
    micro_batch: int | None = None,
    processes: Processes = ALONE,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, float]:
    """Give every trained parameter the gradient of the loss over one batch; none may have one yet.

    With outputs o(θ) of the samples, own losses c_i(θ) of parts of n_i samples and the loss over the batch B(o, θ),

        L = Σ_i (n_i/n) c_i(θ) + B(o(θ), θ),    dL/dθ = ∂B/∂θ + Σ_i [(∂o_i/∂θ)ᵀ ∂B/∂o_i + (n_i/n) ∂c_i/∂θ].

    B and its gradient with respect to o are taken first, over all samples; then each part is carried back by itself.
    With more than one part the outputs are computed twice, at first without a graph, with the same random numbers;
    these belong to a part's place in the batch. Of several processes each carries its share's parts back and takes
    1/world of ∂B/∂θ; their sum is the gradient.

    Args:
        objective: what is trained.
        inputs: of this process's share of the batch (of one sample if that is empty), on the device.
        labels: of the whole batch, (n,), on the device.
        progress: fraction of the training done.
        seed: seed of the objective's random numbers.
        micro_batch: samples of a part; None: the share is one.
        processes: who takes part.
        autocast: context of the forward computations.
        scale: factor on the loss, undone by the caller.

    Returns:
        The loss (`loss`), its parts over the batch and `own`, if there is one.

    Raises:
        ConfigError: the loss is not finite.
    """
    share = processes.share(len(labels))
    parts = inputs.split(micro_batch or len(inputs))
    starts = range(share.start, share.start + len(inputs), len(parts[0]))
    spans = [slice(start, min(start + len(part), share.stop)) for start, part in zip(starts, parts, strict=True)]
    weights = [(span.stop - span.start) / len(labels) for span in spans]

    def forward(number: int) -> tuple[dict[str, Tensor], Tensor | None]:
        torch.manual_seed(derived_seed(seed, "part", starts[number]))
        with autocast():
            return objective.forward(parts[number], progress)

    with torch.set_grad_enabled(len(parts) == 1):
        results = [forward(number) for number in range(len(parts))]
    outputs = {
        name: _gather([result[name].detach() for result, _ in results], spans, len(labels), processes)
        for name in results[0][0]
    }
    torch.manual_seed(derived_seed(seed, "batch"))
    with autocast():
        loss, report = objective.batch_loss(dict(outputs), labels, progress)

    total = loss.item()
    owns = [own.detach() * weight for (_, own), weight in zip(results, weights, strict=True) if own is not None]
    if owns:
        own_loss = processes.total(torch.stack(owns).sum()).item()
        report, total = {**report, "own": own_loss}, total + own_loss
    if not math.isfinite(total):
        raise ConfigError(f"the training diverged: expected a finite loss, got {total}: lower learning_rate")

    if loss.requires_grad:
        scale(loss / processes.world).backward()
    for number, span in enumerate(spans):
        result, own = results[number] if len(parts) == 1 else forward(number)
        roots, gradients = [], []
        for name, value in result.items():
            gradient = outputs[name].grad
            if value.requires_grad and gradient is not None:
                roots.append(value[: span.stop - span.start])
                gradients.append(gradient[span] * processes.world)
        if own is not None and own.requires_grad:
            roots.append(scale(own))
            gradients.append(torch.full_like(roots[-1], weights[number]))
        if roots:
            torch.autograd.backward(roots, gradients)
    _sum_gradients([parameter for _, parameter in objective.named_parameters()], processes)
    return {**report, "loss": total}


def _gather(parts: list[Tensor], spans: list[slice], num_samples: int, processes: Processes) -> Tensor:
    """The outputs of all samples, as a leaf."""
    whole = parts[0].new_zeros(num_samples, *parts[0].shape[1:])
    for part, span in zip(parts, spans, strict=True):
        whole[span] = part[: span.stop - span.start]
    return processes.total(whole).requires_grad_(whole.is_floating_point())


def _sum_gradients(parameters: list[Parameter], processes: Processes) -> None:
    """Replace every gradient by its sum over the processes, all of them in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if processes.world == 1 or not gradients:
        return
    flat = processes.total(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))

"""What is tuned, and the gradient of its loss over a batch, taken in parts without changing it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from fastfsl.errors import ConfigError
from fastfsl.fit.batches import derived_seed


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


def add_gradient(
    objective: Objective,
    inputs: Tensor,
    labels: Tensor,
    progress: float,
    *,
    seed: int,
    micro_batch: int | None = None,
    autocast: Callable[[], AbstractContextManager[object]],
    scale: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Add the gradient of the loss over one batch to that of every trained parameter.

    With outputs o(θ) of the samples, own losses c_i(θ) of parts of n_i samples and the loss over the batch B(o, θ),

        L = Σ_i (n_i/n) c_i(θ) + B(o(θ), θ),    dL/dθ = ∂B/∂θ + Σ_i [(∂o_i/∂θ)ᵀ ∂B/∂o_i + (n_i/n) ∂c_i/∂θ].

    B and its gradient with respect to o are taken first, over all samples; then each part is carried back by itself.
    With more than one part the outputs are computed twice, at first without a graph, with the same random numbers.

    Args:
        objective: what is trained.
        inputs: of the batch, on the device.
        labels: (n,), on the device.
        progress: fraction of the training done.
        seed: seed of the objective's random numbers.
        micro_batch: samples of a part; None: the batch is one.
        autocast: context of the forward computations.
        scale: factor on the loss, undone by the caller.

    Returns:
        The loss (`loss`), its parts over the batch and `own`, if there is one.

    Raises:
        ConfigError: the loss is not finite.
    """
    parts = inputs.split(micro_batch or len(inputs))

    def forward(number: int) -> tuple[dict[str, Tensor], Tensor | None]:
        torch.manual_seed(derived_seed(seed, "part", number))
        with autocast():
            return objective.forward(parts[number], progress)

    with torch.set_grad_enabled(len(parts) == 1):
        results = [forward(number) for number in range(len(parts))]
    outputs = {name: torch.cat([result[name].detach() for result, _ in results]) for name in results[0][0]}
    for output in outputs.values():
        output.requires_grad_(output.is_floating_point())
    weights = [len(part) / len(labels) for part in parts]
    torch.manual_seed(derived_seed(seed, "batch"))
    with autocast():
        loss, report = objective.batch_loss(dict(outputs), labels, progress)

    total = loss.item()
    owns = [own.detach() * weight for (_, own), weight in zip(results, weights, strict=True) if own is not None]
    if owns:
        report = {**report, "own": float(sum(owns))}
        total += report["own"]
    if not torch.isfinite(torch.tensor(total)):
        raise ConfigError(f"the training diverged: expected a finite loss, got {total}: lower learning_rate")

    if loss.requires_grad:
        scale(loss).backward()
    for number, weight in enumerate(weights):
        result, own = results[number] if len(parts) == 1 else forward(number)
        start = sum(len(part) for part in parts[:number])
        roots, gradients = [], []
        for name, value in result.items():
            gradient = outputs[name].grad
            if value.requires_grad and gradient is not None:
                roots.append(value)
                gradients.append(gradient[start : start + len(parts[number])])
        if own is not None and own.requires_grad:
            roots.append(scale(own))
            gradients.append(torch.full_like(roots[-1], weight))
        if roots:
            torch.autograd.backward(roots, gradients)
    return {**report, "loss": total}

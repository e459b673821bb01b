"""FMA's training as its paper describes it, in the fewest lines of torch: what ours is timed against."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastfsl.flow import VelocityField


def train_plain(
    features: Tensor,
    labels: Tensor,
    class_embeddings: Tensor,
    *,
    num_blocks: int = 6,
    epochs: int = 200,
    seed: int = 0,
    on_epoch: Callable[[int, int], None] | None = None,
) -> VelocityField:
    """Fit v(x_t, t) to x_1 - x_0 by AdamW, batches of 32, one epoch of warm-up, then cosine.

    The features are in memory, so a batch is an index: no loader, no workers, nothing copied between processes. No
    noise on the path, which would only add work.

    Args:
        features: L2-normalised image features x_0, (n, d).
        labels: class indices, (n,).
        class_embeddings: L2-normalised text features, (C, d); x_1 is the row of the sample's class.
        num_blocks: residual blocks.
        epochs: passes over the samples.
        seed: of everything random.
        on_epoch: called with (epochs done, epochs in all).

    Source: FMA (arXiv 2510.14543), training details.
    """
    torch.manual_seed(seed)
    field = VelocityField(features.shape[1], num_blocks).to(features.device)
    optimizer = torch.optim.AdamW(field.parameters(), lr=2e-4, weight_decay=0.01)
    warmup = math.ceil(len(features) / 32)
    total = epochs * warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(epochs):
        for batch in torch.randperm(len(features), device=features.device).split(32):
            x_0, x_1 = features[batch], class_embeddings[labels[batch]]
            t = torch.rand(len(batch), device=features.device)
            x_t = (1 - t)[:, None] * x_0 + t[:, None] * x_1
            loss = (field(x_t, t) - (x_1 - x_0)).square().sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if on_epoch is not None:
            on_epoch(epoch + 1, epochs)
    return field.eval()

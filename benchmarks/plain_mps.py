"""A training step of MPS-Tuning as its paper describes it, in the fewest lines of torch: what ours is timed against.

Two towers side by side, nothing shared: both embed the patches and run all blocks, a value stream starts from each of
the upper blocks and carries every token, and norm, projection and normalisation are done wherever they are needed. The
streams project values alone, not queries and keys, and the frozen tower runs without a graph: no work is added.

Source: "Preserve and Sculpt" (arXiv 2508.12877).
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOWER, UPPER = 4, 8  # of twelve blocks
ALPHA, ALIGNMENT_WEIGHT, SCULPTING_WEIGHT = 0.3, 0.5, 0.1


class PlainMPS(nn.Module):
    """The frozen tower, a copy whose upper third is trained, and A of x <- Block(x) + A x for the middle third.

    Args:
        visual: OpenAI-style tower of open_clip, twelve blocks.
    """

    frozen: Any  # open_clip's modules have no types
    tuned: Any

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.frozen = copy.deepcopy(visual).requires_grad_(requires_grad=False)
        self.tuned = copy.deepcopy(visual).requires_grad_(requires_grad=False)
        for trained in (self.tuned.transformer.resblocks[UPPER:], self.tuned.ln_post, self.tuned.proj):
            trained.requires_grad_()
        width = self.tuned.conv1.out_channels
        parallel = [nn.Linear(width, width, bias=False) for _ in range(LOWER, UPPER)]
        for linear in parallel:
            nn.init.zeros_(linear.weight)
        self.parallel = nn.ModuleList(parallel)

    def loss(
        self, pixels: Tensor, labels: Tensor, class_embeddings: Tensor, logit_scale: float, temperature: float
    ) -> Tensor:
        """CE(logits) + 0.5 L_MAR + 0.1 L_HMS.

        Args:
            pixels: two views of each image, (n, 2, 3, h, w).
            labels: class indices, (n,).
            class_embeddings: L2-normalised texts, (C, d).
            logit_scale: of the logits.
            temperature: tau of the sculpting loss.
        """
        num_samples, num_views = pixels.shape[:2]
        images = pixels.flatten(0, 1)
        with torch.no_grad():
            x = embed(self.frozen, images)
            for block in self.frozen.transformer.resblocks:
                x = block(x)
            frozen, frozen_tokens = head(self.frozen, x[:, 0]), head(self.frozen, x)

        x = embed(self.tuned, images)
        inputs = []
        for number, block in enumerate(self.tuned.transformer.resblocks):
            inputs.append(x)
            x = block(x) + self.parallel[number - LOWER](x) if LOWER <= number < UPPER else block(x)
        tuned, tuned_tokens = head(self.tuned, x[:, 0]), head(self.tuned, x)

        streams = []
        for number in range(UPPER, len(inputs)):
            v = inputs[number]
            for block in self.tuned.transformer.resblocks[number:]:
                v = value_block(block, v)
            streams.append(head(self.tuned, v[:, 0]))

        blend = ALPHA * F.normalize(tuned, dim=-1) + (1 - ALPHA) * F.normalize(frozen, dim=-1)
        logits = logit_scale * blend @ class_embeddings.T
        cross_entropy = F.cross_entropy(logits.unflatten(0, (num_samples, num_views)).mean(dim=1), labels)
        alignment = sum(
            gram_distance(tuned[view::num_views], frozen[view::num_views])
            + gram_distance(tuned_tokens[view::num_views], frozen_tokens[view::num_views])
            for view in range(num_views)
        )
        labels = labels.repeat_interleave(num_views)
        sculpting = (
            contrast(tuned, labels, class_embeddings, temperature)
            + contrast(streams[-1], labels, class_embeddings, temperature)
            + contrast(streams[-2], labels, class_embeddings, 2 * temperature) / 2
        )
        return cross_entropy + ALIGNMENT_WEIGHT * alignment + SCULPTING_WEIGHT * sculpting


def embed(visual: Any, images: Tensor) -> Tensor:
    """Images (n, 3, h, w) to tokens (n, T, width)."""
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    first = visual.class_embedding.expand(len(images), 1, -1)
    return visual.ln_pre(torch.cat([first, patches], dim=1) + visual.positional_embedding)


def head(visual: Any, x: Tensor) -> Tensor:
    """Final norm and projection of tokens (..., width)."""
    return visual.ln_post(x) @ visual.proj


def value_block(block: Any, x: Tensor) -> Tensor:
    """v = x + out_proj(V(LN1 x)), then v + MLP(LN2 v)."""
    width = x.shape[-1]
    values = F.linear(block.ln_1(x), block.attn.in_proj_weight[-width:], block.attn.in_proj_bias[-width:])
    x = x + block.attn.out_proj(values)
    return x + block.mlp(block.ln_2(x))


def gram_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Mean |S - S'| of the Gram matrices of the normalised rows, (..., N, d)."""
    x, y = F.normalize(features, dim=-1), F.normalize(reference, dim=-1)
    return (x @ x.mT - y @ y.mT).abs().mean()


def contrast(queries: Tensor, labels: Tensor, class_embeddings: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss of queries (n, d) over themselves and the texts."""
    queries = F.normalize(queries, dim=-1)
    support = torch.cat([queries, F.normalize(class_embeddings, dim=-1)])
    itself = torch.eye(len(queries), len(support), dtype=torch.bool)
    classes = torch.cat([labels, torch.arange(len(class_embeddings))])
    positive = (labels[:, None] == classes) & ~itself
    logits = (queries @ support.T / temperature).masked_fill(itself, -torch.inf)
    log_share = logits - logits.logsumexp(dim=1, keepdim=True)
    return -(log_share.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)).mean()

"""Contrastive pretraining of the tiny CLIP on rendered glyphs: recipe, captions, loss, loop and zero-shot accuracy.

A batch holds many images of few concepts, so the plain CLIP loss would push apart equal pairs. Every concept gets one
caption per step instead, and the two directions share targets among equal concepts. With images i of concept c(i),
captions k, and logits s_ik = scale * cos(image_i, caption_k):

    image -> text   mean_i  -log softmax_k(s_ik)[c(i)]
    text -> image   mean_k  mean_{i: c(i)=k}  -log softmax_i(s_ik)

Source: J. Yang et al., "Unified Contrastive Learning in Image-Text-Label Space" (UniCL), CVPR 2022, section 3.2.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import open_clip
import torch
import torch.nn.functional as F

from fastfsl.demo.digits import CLASS_NAMES, TEMPLATES, tiny_clip_dir
from fastfsl.demo.fonts import CONCEPTS, HELD_OUT_FAMILIES, TRAIN_FAMILIES, GlyphAtlas, build_atlas
from fastfsl.demo.glyphs import Warp, enlarge_counts, render_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from open_clip import CLIP
    from torch import Generator, Tensor

PIXEL_MEAN = PIXEL_STD = 0.5
"""Normalisation of the images; the same numbers stand in `open_clip_config.json`."""

CAPTIONS = (
    "a photo of the {kind} {name}.",
    "a scan of the {kind} {name}.",
    "a photo of the handwritten {kind} {name}.",
    "a photo of the printed {kind} {name}.",
    "a blurry photo of the {kind} {name}.",
    "a drawing of the {kind} {name}.",
    "a {kind} {name} in white on black.",
    "the {kind} {name}.",
    "a photo of {name}.",
    "{name}",
)
"""Captions of pretraining; `kind` is one of `DIGIT_KINDS` or `LETTER_KINDS`."""

DIGIT_KINDS = ("digit", "number")
LETTER_KINDS = ("letter", "character")

MAX_LOGIT_SCALE = 100.0
"""CLIP's clamp on the learned scale (A. Radford et al., 2021, section 2.5)."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, chosen on held-out fonts.

    Attributes:
        steps: Optimizer steps.
        batch_size: Images per step.
        learning_rate: Peak of the warm-up and cosine schedule.
        weight_decay: On matrices; embeddings, biases and norms are exempt.
        warmup_steps: Steps of linear warm-up.
        ema_decay: Decay of the moving average of the weights, which is what is kept.
        digit_share: Share of digits among the images; the others are letters.
        warp: Strengths of the deformations.
        seed: Seed of initialisation and data.
    """

    steps: int = 2400
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 200
    ema_decay: float = 0.995
    digit_share: float = 0.5
    warp: Warp = field(default_factory=Warp)
    seed: int = 0


class GlyphBatches:
    """Endless batches of freshly warped glyphs.

    Args:
        atlas: Glyphs to draw.
        digit_share: Share of digits among the images, split evenly among the digits, as the rest is among the letters.
        warp: Strengths of the deformations.
        seed: Seed of the glyphs' choice and deformation.
    """

    def __init__(self, atlas: GlyphAtlas, *, digit_share: float, warp: Warp, seed: int) -> None:
        self.fields = torch.from_numpy(atlas.fields)
        self.half_widths = torch.from_numpy(atlas.half_widths)
        self.concepts = torch.from_numpy(atlas.concepts)
        self.warp = warp
        self.generator: Generator = torch.Generator().manual_seed(seed)
        counts = torch.bincount(self.concepts, minlength=len(CONCEPTS)).clamp(min=1)
        digit = self.concepts < len(CLASS_NAMES)
        share = torch.where(
            digit, digit_share / len(CLASS_NAMES), (1 - digit_share) / (len(CONCEPTS) - len(CLASS_NAMES))
        )
        self.probabilities = share / counts[self.concepts]

    def draw(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Normalised images of shape (batch_size, 3, 32, 32) and their concepts of shape (batch_size,)."""
        chosen = torch.multinomial(self.probabilities, batch_size, replacement=True, generator=self.generator)
        counts = render_counts(self.fields[chosen], self.half_widths[chosen], generator=self.generator, warp=self.warp)
        images = (enlarge_counts(counts) - PIXEL_MEAN) / PIXEL_STD
        return images.expand(-1, 3, -1, -1), self.concepts[chosen]


def caption_tokens(tokenizer: Callable[[list[str]], Tensor]) -> Tensor:
    """Tokens of every caption of every concept, shape (num_captions, num_concepts, context_length)."""
    return torch.stack(
        [
            tokenizer(
                [
                    caption.format(kind=(DIGIT_KINDS if i < len(CLASS_NAMES) else LETTER_KINDS)[kind], name=name)
                    for i, name in enumerate(CONCEPTS)
                ]
            )
            for caption in CAPTIONS
            for kind in range(2)
        ]
    )


def contrastive_loss(images: Tensor, texts: Tensor, concepts: Tensor, scale: Tensor) -> Tensor:
    """The loss of the module's docstring.

    Args:
        images: Unit image features, shape (n, d).
        texts: Unit features of one caption per concept, shape (num_concepts, d).
        concepts: Concept of each image, shape (n,).
        scale: Logit scale, a scalar.

    Returns:
        Mean of the two directions, a scalar.
    """
    logits = scale * images @ texts.T
    image_to_text = F.cross_entropy(logits, concepts)
    own = F.one_hot(concepts, len(texts)).to(logits.dtype)
    per_concept = own.sum(0)
    pulled = (own * logits.log_softmax(dim=0)).sum(0)[per_concept > 0] / per_concept[per_concept > 0]
    return (image_to_text - pulled.mean()) / 2


def pretrain(
    recipe: Recipe, *, log: Callable[[str], None] = print, atlas: GlyphAtlas | None = None, log_every: int = 50
) -> CLIP:
    """Train a tiny CLIP from scratch.

    Args:
        recipe: What to do.
        log: Receives a line of progress every `log_every` steps.
        atlas: Glyphs to train on; those of `TRAIN_FAMILIES` if None.
        log_every: Steps between two lines of progress.

    Returns:
        The moving average of the weights, in fp32, in evaluation mode.
    """
    folder = f"local-dir:{tiny_clip_dir()}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = open_clip.create_model(folder, load_weights=False)
    captions = caption_tokens(open_clip.get_tokenizer(folder))
    batches = GlyphBatches(
        atlas or build_atlas(TRAIN_FAMILIES), digit_share=recipe.digit_share, warp=recipe.warp, seed=recipe.seed
    )
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, recipe))
    average = copy.deepcopy(model).eval().requires_grad_(False)
    model.train()
    every_concept = torch.arange(len(CONCEPTS))
    start = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        images, concepts = batches.draw(recipe.batch_size)
        template = torch.randint(len(captions), (len(CONCEPTS),), generator=batches.generator)
        image_features = model.encode_image(images, normalize=True)
        text_features = model.encode_text(captions[template, every_concept], normalize=True)
        loss = contrastive_loss(image_features, text_features, concepts, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
            decay = min(recipe.ema_decay, (1 + step) / (10 + step))
            for kept, current in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(current, 1 - decay)
        if step % log_every == 0 or step == recipe.steps:
            right = (image_features @ text_features.T).argmax(1) == concepts
            seconds = time.perf_counter() - start
            log(
                f"step {step}/{recipe.steps}  loss {loss.item():.3f}  accuracy {right.float().mean().item():.3f}  "
                f"scale {model.logit_scale.exp().item():.1f}  {seconds:.0f} s, "
                f"{seconds * (recipe.steps / step - 1):.0f} s to go"
            )
    return average


def _optimizer(model: CLIP, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, weight decay on matrices only: decay would wipe out the tokens that no caption holds."""
    decayed: list[Tensor] = []
    exempt: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (exempt if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Fraction of the peak learning rate: linear warm-up, then a cosine to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return (1 + math.cos(math.pi * min(1.0, done))) / 2


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, images: Tensor, labels: Tensor, *, templates: Sequence[str] = TEMPLATES) -> float:
    """Share of digit images whose nearest class embedding (mean over the templates) is that of their label.

    Args:
        model: The model, in evaluation mode.
        images: Normalised images, shape (n, 3, 32, 32).
        labels: Digits 0..9, shape (n,).
        templates: Prompt templates with one "{}".

    Returns:
        Accuracy between 0 and 1.
    """
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip_dir()}")
    prompts = tokenizer([template.format(name) for name in CLASS_NAMES for template in templates])
    texts = model.encode_text(prompts, normalize=True).reshape(len(CLASS_NAMES), len(templates), -1)
    class_embeddings = F.normalize(texts.mean(1), dim=-1)
    features = torch.cat([model.encode_image(batch, normalize=True) for batch in images.split(256)])
    return float(((features @ class_embeddings.T).argmax(1) == labels).double().mean())


def held_out_accuracy(model: CLIP, *, num_images: int = 2000, warp: Warp | None = None) -> float:
    """Zero-shot accuracy on freshly warped digits of the held-out fonts: the figure that recipes are chosen by.

    The images are the same for every recipe: fixed seed, and the default warp unless another is given.
    """
    atlas = build_atlas(HELD_OUT_FAMILIES, "0123456789")
    batches = GlyphBatches(atlas, digit_share=1.0, warp=warp or Warp(), seed=123456789)
    return zero_shot_accuracy(model, *batches.draw(num_images))


def scans_accuracy(folder: Path) -> float:
    """Zero-shot accuracy on the demo's test split of real scans, through open_clip's own loading and preprocessing.

    No choice may ever be made by this figure.

    Args:
        folder: Folder of the model.
    """
    from PIL import Image

    from fastfsl.demo.digits import enlarge, load_scans, split_indices

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    counts, labels = load_scans()
    _, test = split_indices(labels)
    images = torch.stack([transform(Image.fromarray(enlarge(counts[index]))) for index in test])
    return zero_shot_accuracy(model.eval(), images, torch.tensor([labels[index] for index in test]))

"""Small visual towers of every kind that can be tuned, and the straightforward encoder that a tuned one must equal."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from fastfsl.manifold import TunedTower


def open_clip_tower(**changes: Any) -> nn.Module:
    options = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 6, "heads": 2, "mlp_ratio": 2.0}
    return VisionTransformer(**(options | {"output_dim": 24} | changes))


def timm_tower(name: str, pool: str, proj: str, **changes: Any) -> nn.Module:
    tower = TimmModel(name, 24, pool=pool, proj=proj)
    tower.set_input_size(48)
    vars(tower.trunk).update(changes)
    return tower


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "token": open_clip_tower,
    "deep": lambda: open_clip_tower(layers=12, width=16, patch_dropout=0.5),
    "scaled": lambda: open_clip_tower(layers=7, ls_init_value=1e-3, act_layer=QuickGELU, no_ln_pre=True),
    "average": lambda: open_clip_tower(pool_type="avg"),
    "average-norm": lambda: open_clip_tower(pool_type="avg", final_ln_after_pool=True),
    "timm-token": lambda: timm_tower("test_vit", "token", "linear"),
    "timm-average": lambda: timm_tower("test_vit2", "avg", ""),  # the trunk's own head, norm after the pool
    "timm-mlp": lambda: timm_tower("test_vit", "avg", "mlp"),
    "timm-map": lambda: timm_tower("test_vit3", "map", "none", pool_include_prefix=False),  # SigLIP's
    "timm-map-all": lambda: timm_tower("test_vit3", "map", "none"),  # its register token is pooled too
}


def randomised(module: nn.Module, seed: int) -> None:
    """Every parameter by a seed: matrices that keep the scale of what they multiply, vectors around what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(parameter.detach() + 0.2 * noise)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = make().double().eval()
    randomised(tower, seed=0)
    return tower


@pytest.fixture(params=TOWERS)
def visual(request) -> nn.Module:
    """A visual tower in float64."""
    return _seeded(TOWERS[request.param])


@pytest.fixture(scope="session")
def make_tower() -> Callable[..., nn.Module]:
    """open_clip's tower by its options, in float64."""

    def make(**options: Any) -> nn.Module:
        return _seeded(lambda: open_clip_tower(**options))

    return make


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module, int], None]:
    return randomised


@pytest.fixture
def pixels() -> Callable[[Any, int], torch.Tensor]:
    """Normalised pixels for a tower."""

    def make(tower: Any, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, 3, *tower.image_size, generator=generator, dtype=torch.float64)

    return make


# The library's name of each trained tensor of a block.
OPEN_CLIP_NAMES = {
    "norm_1": "ln_1",
    "in_weight": "attn.in_proj_weight",
    "in_bias": "attn.in_proj_bias",
    "out": "attn.out_proj",
    "scale_1": "ls_1",
    "norm_2": "ln_2",
    "scale_2": "ls_2",
}
TIMM_NAMES = {
    "norm_1": "norm1",
    "in_weight": "attn.qkv.weight",
    "in_bias": "attn.qkv.bias",
    "out": "attn.proj",
    "scale_1": "ls1",
    "norm_2": "norm2",
    "scale_2": "ls2",
}
HEAD_NAMES = {
    "token": {"norm": "ln_post", "projection.weight": "proj"},
    "average-norm": {"norm_pooled": "ln_post", "projection.weight": "proj"},
    "timm": {
        "norm": "trunk.norm",
        "norm_pooled": "trunk.fc_norm",
        "pool.pool": "trunk.attn_pool",
        "projection.0": "trunk.head",
        "projection.1": "head",
    },
}


@dataclass
class Straightforward:
    """MPS-Tuning's encoder by the library's own modules: no sharing, no shortcut."""

    frozen: nn.Module
    tuned: nn.Module  # a full copy; only its upper third and head are looked at
    parallel: list[Tensor]
    names: list[str]  # the tower's, of its trained copies

    def __call__(self, pixels: Tensor) -> SimpleNamespace:
        depth = len(_blocks(self.frozen))
        lower, upper = round(depth / 3), round(2 * depth / 3)
        x = _embed(self.frozen, pixels)
        for block in _blocks(self.frozen):
            x = block(x)
        frozen = x
        x = _embed(self.frozen, pixels)
        for block in _blocks(self.frozen)[:lower]:
            x = block(x)
        for block, matrix in zip(_blocks(self.frozen)[lower:upper], self.parallel, strict=True):
            x = block(x) + x @ matrix.T
        inputs = []
        for block in _blocks(self.tuned)[upper:]:
            inputs.append(x)
            x = block(x)
        last, before = _blocks(self.tuned)[-1], _blocks(self.tuned)[-2]
        return SimpleNamespace(
            tuned=_feature(self.tuned, x),
            frozen=_feature(self.frozen, frozen),
            tuned_tokens=_tokens(self.tuned, x),
            frozen_tokens=_tokens(self.frozen, frozen),
            last_stream=_feature(self.tuned, _value(last, inputs[-1])),
            previous_stream=_feature(self.tuned, _value(last, _value(before, inputs[-2]))),
        )

    def gradients(self) -> dict[str, Tensor | None]:
        """By the tower's names."""
        theirs = dict(self.tuned.named_parameters())
        named = {_library_name(name, self.tuned): name for name in self.names}
        ours = {named[name]: parameter.grad for name, parameter in theirs.items() if name in named}
        return ours | {f"parallel.{number}.weight": matrix.grad for number, matrix in enumerate(self.parallel)}


def _blocks(visual):
    trunk = getattr(visual, "trunk", None)
    return visual.transformer.resblocks if trunk is None else trunk.blocks


def _embed(visual, pixels):
    trunk = getattr(visual, "trunk", None)
    return visual._embeds(pixels) if trunk is None else trunk._pos_embed(trunk.patch_embed(pixels))


def _feature(visual, x):
    trunk = getattr(visual, "trunk", None)
    return visual._pool(x)[0] @ visual.proj if trunk is None else visual.head(trunk.forward_head(trunk.norm(x)))


def _tokens(visual, x):
    trunk = getattr(visual, "trunk", None)
    return visual.ln_post(x) @ visual.proj if trunk is None else visual.head(trunk.head(trunk.fc_norm(trunk.norm(x))))


def _value(block, x):
    """v = x + out_proj(V(LN1 x)); v + MLP(LN2 v), with the layer scales where there are some."""
    if hasattr(block, "ln_1"):
        value = block.attn.in_proj_weight.chunk(3)[2], block.attn.in_proj_bias.chunk(3)[2]
        x = x + block.ls_1(block.attn.out_proj(F.linear(block.ln_1(x), *value)))
        return x + block.ls_2(block.mlp(block.ln_2(x)))
    x = x + block.ls1(block.attn.proj(block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)[2]))
    return x + block.ls2(block.mlp(block.norm2(x)))


def _library_name(name: str, visual: Any) -> str:
    """The library's name of a trained tensor of the tower: upper.1.norm_1.weight, head.projection.weight, ..."""
    timm = hasattr(visual, "trunk")
    if name.startswith("upper."):
        _, index, part = name.split(".", 2)
        number = round(2 * len(_blocks(visual)) / 3) + int(index)
        prefix = f"trunk.blocks.{number}." if timm else f"transformer.resblocks.{number}."
        names = TIMM_NAMES if timm else OPEN_CLIP_NAMES
    else:
        prefix, part = "", name.removeprefix("head.")
        names = HEAD_NAMES["timm" if timm else "average-norm" if visual.final_ln_after_pool else "token"]
    for ours, theirs in names.items():
        if part == ours or part.startswith(f"{ours}."):
            return prefix + theirs + part.removeprefix(ours)
    return prefix + part


@pytest.fixture
def pair(visual) -> tuple[TunedTower, Straightforward]:
    """A tower with nothing at its initial value, and the straightforward encoder with the same tensors."""
    frozen, tuned = copy.deepcopy(visual), copy.deepcopy(visual)
    tower = TunedTower(visual)
    for number, module in enumerate((tower.parallel, tower.upper, tower.head)):
        randomised(module, number + 1)
    parallel = [matrix.detach().clone().requires_grad_() for matrix in tower.parallel.parameters()]
    theirs = dict(tuned.named_parameters())
    copies = {name: value for name, value in tower.named_parameters() if name.startswith(("upper.", "head."))}
    with torch.no_grad():
        for name, parameter in copies.items():
            theirs[_library_name(name, tuned)].copy_(parameter)
    return tower, Straightforward(frozen.requires_grad_(False), tuned, parallel, list(copies))

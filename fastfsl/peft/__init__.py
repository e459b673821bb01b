"""Peers that change the features: CLIP-LoRA, CLIP-Adapter, CoOp and CoCoOp."""

from fastfsl.peft.base import FeatureSource, SharedTextSource
from fastfsl.peft.lora import CLIPLoRA

__all__ = ["CLIPLoRA", "FeatureSource", "SharedTextSource"]

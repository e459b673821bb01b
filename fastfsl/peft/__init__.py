"""Peers that change the features: CLIP-LoRA, CLIP-Adapter, CoOp and CoCoOp."""

from fastfsl.peft.base import FeatureSource, SharedTextSource
from fastfsl.peft.clip_adapter import CLIPAdapter
from fastfsl.peft.cocoop import CoCoOp
from fastfsl.peft.coop import CoOp
from fastfsl.peft.lora import CLIPLoRA

__all__ = ["CLIPAdapter", "CLIPLoRA", "CoCoOp", "CoOp", "FeatureSource", "SharedTextSource"]

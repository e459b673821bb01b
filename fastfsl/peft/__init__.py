"""Peers that change the features: CLIP-LoRA, CLIP-Adapter, CoOp and CoCoOp."""

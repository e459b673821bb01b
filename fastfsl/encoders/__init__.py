"""CLIP models by name or file, their class embeddings and their image features, cached by content."""

from fastfsl.backbones import TINY_CLIP
from fastfsl.encoders.augmentation import Augmentation
from fastfsl.encoders.class_embeddings import class_embeddings
from fastfsl.encoders.encoder import Encoder, weights_digest
from fastfsl.encoders.feature_cache import FeatureCache, default_cache_dir
from fastfsl.encoders.features import extract_features
from fastfsl.encoders.loading import load_encoder

__all__ = [
    "TINY_CLIP",
    "Augmentation",
    "Encoder",
    "FeatureCache",
    "class_embeddings",
    "default_cache_dir",
    "extract_features",
    "load_encoder",
    "weights_digest",
]

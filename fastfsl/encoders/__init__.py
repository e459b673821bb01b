"""CLIP encoders through open_clip: loading, class embeddings, cached features."""

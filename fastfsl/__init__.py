"""fastfsl: few-shot adapters for CLIP, from a handful of labelled images to a classifier in production."""

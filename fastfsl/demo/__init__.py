"""The embedded default: a tiny CLIP and real scans of handwritten digits."""

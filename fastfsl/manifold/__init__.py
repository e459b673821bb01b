"""MPS-Tuning: Gram alignment, hierarchical sculpting and the tuned tower, in pure torch."""

"""Triton kernels of the flow and of the Gram loss, their launchers and the ahead-of-time compiler."""

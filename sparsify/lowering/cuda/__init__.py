"""Lowering to the generated kernels for CUDA devices."""

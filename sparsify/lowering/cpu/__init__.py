"""Lowering to the generated kernels for CPUs."""

"""Generated Triton kernels. Importing this package, or `sparsify`, does not import triton."""

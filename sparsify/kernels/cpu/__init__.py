"""CPU kernels for sparse linears: packed formats, generated C++, its build cache, and the choice between kernels."""

"""The operators of the `sparsify` namespace, one a file: schema, oracle, checks, fake, autograd formula, autocast rule.

Importing this package registers them all.
"""

from sparsify.ops import partial_linear, sparse_lowrank_linear

__all__ = ["partial_linear", "sparse_lowrank_linear"]

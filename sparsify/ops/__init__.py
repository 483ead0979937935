"""The operators of the `sparsify` namespace, one a file: schema, oracle, checks, fake, eager code, ATen form, autograd, autocast.

    partial_linear           y = x W'ᵀ + b,  a block of channels of W replaced; `partial_linear_at`: channels at an index
    sparse_lowrank_linear    y = x W'ᵀ + s (x Aᵀ) Bᵀ + b,  entries of W replaced at a support
    quantized_linear         both, over a packed base
    masked_linear            y = x (W∘M)ᵀ + b,  the gradient masked
    grouped_linear           y_e = x_e W_eᵀ           rows sorted by expert
    partial_grouped_linear   the same with trained channels, and `sparse_lowrank_grouped_linear`
    partial_embedding        y = W'[ids],  some rows of W replaced
    lowrank_embedding        y = (W + s B A)[ids]
    lowrank_conv             y = x ∗ (W + s B A) + b
    partial_conv             y = x ∗ W' + b,  some input channels of W replaced
    chunked_loss             Σ −log softmax(x Wᵀ)[target],  the logits in chunks
    apply_mask               t∘M
    masked_grad              (gᵀ x)∘M                 weight gradients: under a mask,
    sampled_product          (aᵀ b)[index]            on a support,
    channel_grad             (g[:, rows])ᵀ x          of some channels,
    skinny_products          (x rowsᵀ, factorᵀ x)     of low-rank factors,
    grouped_outer            g_eᵀ x_e                 of an expert's rows, and `grouped_sampled`: on a support
    adapter_columns          y + x[:, c] D            what many adapters add, one a token:
    adapter_rows             y[:, c] + x Dᵀ           trained inputs and outputs,
    adapter_lowrank          y + (x Aᵀ) B             factors,
    adapter_sparse           y[:, i] + v x[:, j]      entries,
    adapter_bias             y + d                    biases

The first three each have a `_dx` beside them. Every formula is made of ATen and of these operators, so
derivatives of any order are right. Importing this package registers them all, and the inference operators of
`sparsify.kernels`.

    checks.py  schema.py                  what an operator refuses, its arguments by name (`sparsify.library` registers it)
    shapes.py  bits.py  saved_input.py    tokens and turned weights, masks as bits, what is saved of an input
    added_parts.py                        sparse values and low-rank factors, beside a dense or a packed base
    adapter_tables.py                     what lies where of adapters that are live together
    dispatch.py                           which kernel serves; no other file here imports `sparsify.kernels`

Shapes stand in annotations (`Float[Tensor, "*t m"]`, read by people and type checkers, never at run time):

    *t  tokens of any leading shape, T flattened     n m  outputs and inputs of a linear
    p q  a weight as it is stored: (n, m), or (m, n) where `transposed`; also the sides of a product that is sampled there
    i j  a trained block of channels: (s, m) for output rows (axis 0), (n, s) for input columns (axis 1)
    s  trained channels     k  entries of a support     r  rank of two factors     c  channels, of whatever side
"""

from sparsify.ops import (
    adapter_bias,
    adapter_columns,
    adapter_lowrank,
    adapter_rows,
    adapter_sparse,
    apply_mask,
    channel_grad,
    chunked_loss,
    grouped_linear,
    lowrank_conv,
    lowrank_embedding,
    masked_grad,
    masked_linear,
    partial_conv,
    partial_embedding,
    partial_grouped_linear,
    partial_linear,
    quantized_linear,
    sampled_product,
    skinny_products,
    sparse_lowrank_linear,
)

__all__ = [
    "adapter_bias",
    "adapter_columns",
    "adapter_lowrank",
    "adapter_rows",
    "adapter_sparse",
    "apply_mask",
    "channel_grad",
    "chunked_loss",
    "grouped_linear",
    "lowrank_conv",
    "lowrank_embedding",
    "masked_grad",
    "masked_linear",
    "partial_conv",
    "partial_embedding",
    "partial_grouped_linear",
    "partial_linear",
    "quantized_linear",
    "sampled_product",
    "skinny_products",
    "sparse_lowrank_linear",
]

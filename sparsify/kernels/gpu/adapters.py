"""Addends of many adapters on a GPU, one adapter a token (`sparsify.ops.adapter_tables`): nothing is read back, so a step may be captured.

    columns    axpys over gathered inputs          lowrank   dots into u (T, LIMIT), then axpys over u
    rows       dots, added at the outputs          sparse    atomic sums in fp32, then one addition        bias   axpys without a sum

A program takes a tile of tokens of one slot, which it finds by counting tiles slot by slot; the grid is as large as the tiles could ever
be, and programs without one end at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import OperatorError
from sparsify.kernels.gpu import launch as launches
from sparsify.kernels.gpu.build import target_of
from sparsify.kernels.gpu.launch import power_above, x_type
from sparsify.kernels.gpu.spec import KernelSpec, Op
from sparsify.kernels.gpu.tiles import choose_tile

#: largest rank of low-rank factors here; `serve` refuses larger ones on a GPU
LIMIT = 512
PARTS = 16  # programs that share the entries of one tile of tokens


def add_on_gpu(
    kind: str, y: Tensor, x: Tensor, values: Tensor, places: Tensor, table: Tensor, order: Tensor, offs: Tensor
) -> None:
    """`y (*t, n) += …` in place, contiguous, for `x (*t, m)` and values of y's type. Raises OperatorError for what does not fit; what the
    table and the places point to is not looked at, which would wait for the device: `serve` has checked it."""
    m, n, slots = x.shape[-1], y.shape[-1], table.shape[0]
    tokens, rows = y.numel() // max(n, 1), order.numel()
    if rows == 0 or tokens % rows:
        raise OperatorError(
            f"adapter_{kind}: {tokens} tokens are no multiple of the {rows} rows that adapters are named for"
        )
    if tokens == 0 or n == 0:
        return
    x = x.contiguous()
    sizes = {"n": n, "m": m, "each": tokens // rows, "slots": slots}
    where: dict[str, Tensor | int] = {"table_ptr": table, "order_ptr": order, "offs_ptr": offs, **sizes}

    def spec(op: Op, format: str) -> KernelSpec:
        target = target_of(y.device)
        tile = choose_tile(op, tokens, target, x_type(x))
        kind = x_type(x)
        return KernelSpec(
            op=op, target=target, tile=tile, x=kind, value=kind, out=kind, format=format, group=power_above(slots)
        )

    def grid(made: KernelSpec, second: int) -> tuple[int, int]:
        return (-(-tokens // made.tile.rows) + slots - 1, second)

    if kind == "sparse":
        total = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        made = spec("adapter_sparse", "")
        launches.launch(
            made,
            grid(made, PARTS),
            {"x_ptr": x, "values_ptr": values, "places_ptr": places, "total_ptr": total, **where, "parts": PARTS},
        )
        y.add_(total)
        return
    if kind == "rows":
        made = spec("adapter_dots", "rows")
        launches.launch(
            made,
            grid(made, -(-n // made.tile.cols)),
            {"x_ptr": x, "values_ptr": values, "places_ptr": places, "y_ptr": y, **where},
        )
        return
    extra: dict[str, Tensor | int] = {}
    if kind == "lowrank":
        u = torch.empty(tokens, LIMIT, dtype=x.dtype, device=y.device)
        made = spec("adapter_dots", "lowrank")
        given = {"x_ptr": x, "values_ptr": values, "u_ptr": u, **where, "limit": LIMIT}
        launches.launch(made, grid(made, LIMIT // made.tile.cols), given)
        extra = {"u_ptr": u}
    elif kind == "columns":
        extra = {"x_ptr": x, "places_ptr": places}
    made = spec("adapter_axpys", kind)
    limit = {"limit": LIMIT} if kind == "lowrank" else {}
    launches.launch(
        made, grid(made, -(-n // made.tile.cols)), {**extra, "values_ptr": values, "y_ptr": y, **where, **limit}
    )


__all__ = ["LIMIT", "add_on_gpu"]

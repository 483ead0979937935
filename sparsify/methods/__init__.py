"""Kinds of trained parts, each in one file: its tensors, its node, its fold, its deltas, its words; and methods from outside.

    part              the protocol                  channels          S2FT, PaCA
    registry          `register`                    sparse_lowrank    RoSA, LoRA
                                                    packed            any of these over a packed base

What a method from outside needs is listed in `__all__`; `examples/write_a_method.py` is one.
"""

from sparsify.adapters.adapter import Delta
from sparsify.adapters.delta_kinds import DeltaKind, PeftLayer
from sparsify.library import OperatorLibrary
from sparsify.methods import channels, lowrank_conv, lowrank_embedding, packed, partial_conv, rows, sparse_lowrank
from sparsify.methods.part import LivePart, OutsidePart, Snapshot, TrainedPart, beside, master_dtype
from sparsify.methods.registry import register
from sparsify.methods.sparse_lowrank import kaiming_a
from sparsify.modules.adapted import AdaptedMixin, as_parameter, become, take_leaves
from sparsify.modules.layout import Layout
from sparsify.ops.checks import require, require_floats, require_shape, require_together
from sparsify.ops.schema import argument, arguments
from sparsify.plan import LinearRule
from sparsify.program import LinearNode, Program
from sparsify.program.graph_editor import GraphEditor

__all__ = [
    "AdaptedMixin",
    "Delta",
    "DeltaKind",
    "GraphEditor",
    "Layout",
    "LinearNode",
    "LinearRule",
    "LivePart",
    "OperatorLibrary",
    "OutsidePart",
    "PeftLayer",
    "Program",
    "Snapshot",
    "TrainedPart",
    "argument",
    "arguments",
    "as_parameter",
    "become",
    "beside",
    "channels",
    "kaiming_a",
    "lowrank_conv",
    "lowrank_embedding",
    "master_dtype",
    "packed",
    "partial_conv",
    "register",
    "require",
    "require_floats",
    "require_shape",
    "require_together",
    "rows",
    "sparse_lowrank",
    "take_leaves",
]

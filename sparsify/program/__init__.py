"""The program, and what passes read and write of it: structures, choices, permutations, names; its text and its graph's editor."""

from sparsify.program.program import (
    ChannelChoice,
    Input,
    LinearNode,
    Move,
    Packed,
    Program,
    Stage,
    UnitChoice,
    canonical_names,
    through_transpose,
)

__all__ = [
    "ChannelChoice",
    "Input",
    "LinearNode",
    "Move",
    "Packed",
    "Program",
    "Stage",
    "UnitChoice",
    "canonical_names",
    "through_transpose",
]

"""The program, and what passes read and write of it: structures, choices, permutations, names; its text and its graph's editor."""

from sparsify.program.program import Program, Stage, canonical_names, through_transpose
from sparsify.program.values import (
    Captured,
    ChannelChoice,
    ConvolutionNode,
    EmbeddingNode,
    Input,
    LinearNode,
    Move,
    Packed,
    UnitChoice,
)

__all__ = [
    "Captured",
    "ChannelChoice",
    "ConvolutionNode",
    "EmbeddingNode",
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

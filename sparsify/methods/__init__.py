"""Kinds of trained parts, each in one file: its tensors, its node, its fold, its deltas, its words."""

from sparsify.methods import channels, packed, sparse_lowrank
from sparsify.methods.part import LivePart, TrainedPart

__all__ = ["LivePart", "TrainedPart", "channels", "packed", "sparse_lowrank"]

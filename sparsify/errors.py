"""Errors and refusals: every one says what is wrong, where, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.console import one_line, printable


@printable
class SparsifyError(Exception):
    """Base class of every error that sparsify raises on purpose.

    exit_code: of a command that ends with it. 2: what it was given cannot be used. 1: it can, but the work failed.
    """

    exit_code = 2


class PlanError(SparsifyError, ValueError):
    """A plan is wrong in itself, or names something that the model does not have."""


class CaptureError(SparsifyError, RuntimeError):
    """The model could not be turned into a graph; says which line of the model stopped it."""

    exit_code = 1


class VerifyError(SparsifyError, AssertionError):
    """A pass left a program that breaks its stage's grammar, or that computes something else."""

    exit_code = 1


class RefusedError(SparsifyError, RuntimeError):
    """A target that the plan names by name cannot be served."""


class AdapterError(SparsifyError, ValueError):
    """An adapter file is damaged, foreign, hostile, or does not fit the model."""


class OperatorError(SparsifyError, RuntimeError):
    """An operator was called with tensors that do not fit together; nothing was read or written."""


class PositionError(OperatorError, IndexError):
    """A position of a sparse part lies outside of what it points into."""


class StateError(SparsifyError, RuntimeError):
    """A state dict does not belong to the host that is to load or save it; nothing was loaded."""


class InputError(SparsifyError, ValueError):
    """A file, folder or word that a command was given is damaged, foreign or out of range; says which one."""


@printable
@dataclass(frozen=True)
class Refusal:
    """One declined opportunity. `where` is a parameter, node or structure name; `reason` a full sentence."""

    where: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.reason}")

"""sparsify: a compiler for sparse fine-tuning and sparse inference of PyTorch models."""

import warnings
from typing import TYPE_CHECKING

from sparsify.api import analyse, compile, load
from sparsify.errors import (
    AdapterError,
    CaptureError,
    OperatorError,
    PlanError,
    Refusal,
    RefusedError,
    SparsifyError,
    StateError,
    VerifyError,
)
from sparsify.lowering.cpu.options import CpuOptions
from sparsify.lowering.deploy.exported import lower_exported, package
from sparsify.lowering.torch_compile.backend import backend
from sparsify.plan import S2FT, LoRA, PaCA, Plan, Quantize, RoSA, Tokens, register_rule
from sparsify.planner.autoplan import AutoPlan, autoplan
from sparsify.pruning.rule import Prune
from sparsify.serving.host import serve
from sparsify.version import __version__, other_sparsify

register_rule(Prune)
if _other := other_sparsify():
    warnings.warn(_other, stacklevel=2)

__all__ = [
    "S2FT",
    "AdapterError",
    "AutoPlan",
    "CaptureError",
    "CpuOptions",
    "LoRA",
    "OperatorError",
    "PaCA",
    "Plan",
    "PlanError",
    "Prune",
    "Quantize",
    "Refusal",
    "RefusedError",
    "RoSA",
    "SparsifyError",
    "StateError",
    "Tokens",
    "VerifyError",
    "__version__",
    "analyse",
    "autoplan",
    "backend",
    "compile",
    "load",
    "lower_exported",
    "package",
    "serve",
]

if not TYPE_CHECKING:

    def __getattr__(word: str) -> object:
        from sparsify.plan.habits import at_the_door

        raise AttributeError(at_the_door(word))

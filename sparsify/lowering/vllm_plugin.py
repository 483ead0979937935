"""Pruned checkpoints with our CPU kernels inside vLLM: `vllm serve PRUNED --quantization sparsify`.

    vLLM's linear, weight (out, in) with zeros  ──after loading──▶  SparseLinear where that is measured to be faster, its own elsewhere

vLLM loads an ordinary (dense) checkpoint, fuses q, k, v and gate, up as it always does, and then asks each linear's quantisation method
what to make of the weight. Ours packs it by the same rule as `Plan(target="cpu")`: where a generated kernel is nowhere slower than the
dense product (`CpuOptions(mode="small")`: wherever it can be packed). vLLM finds `register` by the entry point `vllm.general_plugins`,
which this package declares; nothing of vLLM is imported before it calls. Options may stand in the checkpoint's config.json, or be given
by `--hf-overrides`:

    {"quantization_config": {"quant_method": "sparsify", "mode": "small", "tokens": [1, 16]}}

On a GPU there is nothing to gain and it is refused. Tried with vLLM 0.32 (`tests/e2e/test_vllm.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsify.errors import PlanError, Refusal
from sparsify.lowering.cpu.lower import CpuTarget, DenseProducts, isa_text
from sparsify.lowering.cpu.options import CpuOptions
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.lowering.target import Layer

NAME = "sparsify"
FIELDS = ("mode", "tokens", "int8_activations")
log = logging.getLogger(__name__)


def options_of(config: Mapping[str, Any]) -> CpuOptions:
    """The options in a checkpoint's `quantization_config`. Raises PlanError for a field that is none, or has no such value."""
    given = {key: value for key, value in config.items() if key != "quant_method"}
    odd = next((key for key in given if key not in FIELDS), None)
    if odd is not None:
        raise PlanError(f"quantization_config of {NAME!r} has a field {odd!r}; it takes {', '.join(FIELDS)}")
    return CpuOptions(**given)


def packed(name: str, weight: torch.Tensor, options: CpuOptions) -> SparseLinear | Refusal:
    """A loaded weight (out, in) as a packed linear without bias, or why it stays dense."""
    rows, cols = weight.shape
    holder = nn.Linear(cols, rows, bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    layer = Layer(name, holder)
    target = CpuTarget(tokens=options.tokens, mode=options.mode, int8_activations=options.int8_activations)
    found = target.try_packed(layer, DenseProducts(layer.weight))
    return found if isinstance(found, Refusal) else found.module  # type: ignore[return-value]


def register() -> None:
    """Make `quantization="sparsify"` known to vLLM. vLLM calls it in each of its processes."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config(NAME)(config_class())


def config_class() -> type:
    """The class that vLLM asks how each of a model's linears is held."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.platforms import current_platform

    class PackedLinearMethod(UnquantizedLinearMethod):
        """A linear that is loaded dense and packed then."""

        def __init__(self, prefix: str, options: CpuOptions) -> None:
            super().__init__()
            self.prefix, self.options = prefix, options

        def process_weights_after_loading(self, layer: Any) -> None:
            found = packed(self.prefix, layer.weight.data, self.options)
            if isinstance(found, Refusal):
                log.info("dense: %s", found)
                super().process_weights_after_loading(layer)
                return
            log.info("packed: %s, %s", self.prefix, found.packed.value)
            layer.sparse = found
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # its dense form is not needed any more

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            if not hasattr(layer, "sparse"):
                return super().apply(layer, x, bias)
            y = layer.sparse(x)
            return y if bias is None else y + bias

    class SparsifyConfig(QuantizationConfig):
        """`quantization="sparsify"`."""

        def __init__(self, options: CpuOptions | None = None) -> None:
            super().__init__()
            if not current_platform.is_cpu():
                raise PlanError(f"quantization={NAME!r} packs for the CPU, and this vLLM runs on another device")
            self.options = options or CpuOptions()
            log.info("linears with zeros are packed for %s", isa_text())

        def get_name(self) -> Any:
            return NAME

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float32, torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> SparsifyConfig:
            return cls(options_of(config))

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            return PackedLinearMethod(prefix, self.options) if isinstance(layer, LinearBase) else None

    return SparsifyConfig


__all__ = ["register"]

"""The kept libraries that round and pack, loaded when the first weight is packed, never at import."""

from __future__ import annotations

import functools
from types import ModuleType

from sparsify.errors import PlanError


@functools.cache
def bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise PlanError(
            "Quantize('nf4' or 'int8') needs bitsandbytes: pip install 'sparsify-compiler[quant]'"
        ) from error
    return functional


@functools.cache
def torchao_primitives() -> ModuleType:
    try:
        from torchao.quantization import quant_primitives
    except ImportError as error:
        raise PlanError("Quantize('int4') needs torchao: pip install 'sparsify-compiler[quant]'") from error
    return quant_primitives

"""Fused branches of torch's own containers that read the weights of the linears inside them, and so pass over what trains beside those.

`nn.TransformerEncoderLayer` in eval mode without gradients, and `nn.TransformerEncoder` around it, hand every weight to one fused
operator. Where a linear inside is adapted, that branch is closed in the host by the layer's own switch: its forward then calls the
linears, as it does while it trains. The outputs are the same to rounding, but for what `enable_nested_tensor` does to padding: the
fused branch returns zeros at padded positions, the other one numbers that nobody should read. `restore` and `plain` open it again.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

#: class → the switch of its fused branch, and the value that closes it
SWITCHES: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
#: kept in a module whose fused branch is closed: what its switch was
KEPT = "_sparsify_fast_path"


def close_fast_paths(host: nn.Module, adapted: Iterable[str]) -> None:
    """Close the fused branch of every container of torch's above an adapted module. `adapted`: qualified names of modules."""
    for path in dict.fromkeys(p for name in adapted for p in above(name)):
        module = host.get_submodule(path)
        for kind, (switch, closed) in SWITCHES.items():
            if isinstance(module, kind) and KEPT not in module.__dict__:
                module.__dict__[KEPT] = getattr(module, switch)
                setattr(module, switch, closed)


def open_fast_paths(host: nn.Module) -> None:
    """Undo `close_fast_paths` in a whole module tree."""
    for module in host.modules():
        if KEPT in module.__dict__:
            switch = next(switch for kind, (switch, _) in SWITCHES.items() if isinstance(module, kind))
            setattr(module, switch, module.__dict__.pop(KEPT))


def above(name: str) -> list[str]:
    """`a.b.c` → ``, `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]

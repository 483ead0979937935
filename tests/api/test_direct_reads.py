"""Weights that are read past the module that holds them: by torch's fused encoder layer, and by branches that no trace ran."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsify
from sparsify import S2FT, CpuOptions, LoRA, PaCA, Plan, Prune, Quantize, RefusedError, RoSA
from sparsify.passes.direct_reads import direct_read

X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(4))
PADDING = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
RULES: dict[str, list[Any]] = {
    "S2FT": [S2FT(structure="ffn", fraction=0.2)],
    "S2FT in place": [S2FT(structure="ffn", fraction=0.2, permute=False)],
    "PaCA": [PaCA(rank=3)],
    "LoRA": [LoRA(match="*linear?", rank=2)],
    "RoSA": [RoSA(match="*linear2", rank=2, density=0.05, mask="random")],
    "Quantize + LoRA": [LoRA(match="*linear1", rank=2), Quantize("int8", match="*linear?")],
}


def encoder(wrapped: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, dropout=0.0)
    return (nn.TransformerEncoder(layer, 2) if wrapped else nn.Sequential(layer)).eval()


def trained(host: nn.Module) -> nn.Module:
    tiny.disturb(host, scale=0.2)
    return host.eval()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_the_fused_encoder_layer_does_not_pass_over_what_trains(name: str, wrapped: bool) -> None:
    """It took the stored weight in eval mode without gradients: LoRA did nothing there, a trained block was one step old."""
    model = encoder(wrapped)
    host: Any = sparsify.compile(model, Plan(RULES[name]), example=(X,), progress=False)
    host.train()
    want = trained(host).train()(X)
    host.eval()
    with torch.inference_mode():
        found = host(X)
        plain = host.sparsify.plain().train()(X)  # trained weights as plain modules, on the path that calls them
        base = model(X)
    torch.testing.assert_close(found, want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 1e-2
    with torch.no_grad():
        host.sparsify.set_adapter(None)
        if "Quantize" not in name:
            torch.testing.assert_close(host(X), base, rtol=1e-5, atol=1e-5)


def test_padding_is_masked_as_before_and_restore_opens_the_fused_layer_again() -> None:
    model = encoder()
    host: Any = sparsify.compile(model, Plan([LoRA(match="*linear?", rank=2)]), example=(X,), progress=False)
    with torch.no_grad():
        want, found = (m(X, src_key_padding_mask=PADDING) for m in (model, host))
    torch.testing.assert_close(found[~PADDING], want[~PADDING], rtol=1e-5, atol=1e-5)
    switches = [layer.activation_relu_or_gelu for layer in copy.deepcopy(model).layers]  # type: ignore[union-attr]
    assert [layer.activation_relu_or_gelu for layer in host.layers] == [0, 0]
    assert [layer.activation_relu_or_gelu for layer in host.sparsify.plain().layers] == switches
    assert [layer.activation_relu_or_gelu for layer in host.sparsify.restore().layers] == switches
    assert [layer.activation_relu_or_gelu for layer in model.layers] == switches  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", [Prune(sparsity=0.75, method="magnitude"), Quantize("int8")], ids=["prune", "int8"])
def test_lowered_encoders_take_padding(rule: Any) -> None:
    options = CpuOptions(mode="small", int8_activations=False)  # rounded activations agree to three digits at best
    host: Any = sparsify.compile(encoder(), Plan([rule], target="cpu"), example=(X,), progress=False, cpu=options)
    plain = host.sparsify.plain()
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": PADDING}):
            found, want = host(X, **options), plain(X, **options)
            keep = ~PADDING if options else slice(None)
            torch.testing.assert_close(found[keep], want[keep], rtol=1e-3, atol=1e-3)


class Reads(nn.Module):
    """A block whose fused branch, closed by default, reads the weights of its linears."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fused = how, False
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.at_once(x)
        return x + self.down(F.silu(self.up(x)))

    def at_once(self, x: Tensor) -> Tensor:
        return x


class Directly(Reads):
    def at_once(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(F.linear(x, self.up.weight, self.up.bias)))


class ByVariable(Reads):
    def at_once(self, x: Tensor) -> Tensor:
        layer = self.up
        return x + self.down(F.silu(x @ layer.weight.t() + layer.bias))


class InAClosure(Reads):
    def at_once(self, x: Tensor) -> Tensor:
        def product() -> Tensor:
            return torch.addmm(self.up.bias, x.reshape(-1, 24), self.up.weight.t())

        return x + self.down(F.silu(product().view(*x.shape[:-1], 40)))


class OnlyLooks(Reads):
    def at_once(self, x: Tensor) -> Tensor:
        if isinstance(self.up.weight, torch.Tensor) and x.dtype != self.up.weight.dtype:
            x = x.to(self.up.weight.dtype)
        if not isinstance(self.up.weight, Tensor) or not isinstance(self.up.weight, nn.Parameter):
            raise TypeError("packed")
        return x.reshape(-1, self.up.weight.shape[1]).to(self.up.weight.device).view_as(x)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.up.weight)


@pytest.mark.parametrize("kind", [Directly, ByVariable, InAClosure])
@pytest.mark.parametrize(
    "rule", [LoRA(match="up", rank=2), PaCA(match="up", rank=2), Quantize("nf4", match="up")], ids=str
)
def test_a_branch_that_was_not_traced_and_reads_the_weight_declines_it(kind: type[Reads], rule: Any) -> None:
    model = kind("").eval()
    rules = [rule, LoRA(match="down", rank=2)] if isinstance(rule, Quantize) else [rule]
    with pytest.raises(RefusedError, match="reads its weight past its own forward"):
        sparsify.compile(model, Plan(rules), example=(X,), progress=False)


def test_s2ft_leaves_a_structure_that_is_read_directly_and_says_so() -> None:
    model = nn.Sequential(Directly(""), OnlyLooks("")).eval()
    host: Any = sparsify.compile(
        model, Plan([S2FT(structure="ffn", fraction=0.2, select="random")]), example=(X,), progress=False
    )
    trained = {part.param for part in host.sparsify.program.parts}
    assert "0.up.weight" not in trained
    assert "1.down.weight" in trained


def test_looking_at_a_weight_is_not_reading_it() -> None:
    assert direct_read(OnlyLooks, "up", "weight") is None
    assert direct_read(Directly, "up", "weight") == "Directly.at_once"
    assert direct_read(Directly, "down", "weight") is None
    host: Any = sparsify.compile(OnlyLooks("").eval(), Plan([LoRA(match="up", rank=2)]), example=(X,), progress=False)
    assert len(host.sparsify.program.parts) == 1


@pytest.mark.parametrize("name", ["T5 (gated)", "Bloom"])
def test_families_that_look_at_weights_or_have_a_closed_branch_train(name: str) -> None:
    model = tiny.build(name)
    host: Any = tiny.lower(model, LoRA(match="*", rank=2))
    found = {part.param.rpartition(".")[0].rpartition(".")[2] for part in host.sparsify.program.parts}
    assert {"wo"} <= found or {"dense_4h_to_h", "dense"} <= found

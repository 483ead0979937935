"""LoRA and PaCA of convolutions: the low-rank change, and input channels, of the flattened kernel, in every geometry, and PEFT's form of it both ways."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn

import sparsify
from sparsify import AdapterError, LoRA, PaCA, Plan, RefusedError, RoSA


class Ears(nn.Module):
    """A front of two convolutions, as Whisper's or a small ResNet's, and a linear behind it."""

    def __init__(self, dims: int = 2, **options: Any) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv1d
        self.conv1 = conv(3, 6, 3, **{"stride": 2, "padding": 1} | options)
        self.conv2 = conv(6, 5, (3, 2)[:dims] if dims == 2 else 2, bias=False)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(torch.nn.functional.gelu(self.conv1(x)))
        return self.head(y.flatten(2).mean(-1))


def pixels(dims: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, *(13, 11)[:dims], generator=torch.Generator().manual_seed(seed))


def model_of(dims: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return tiny.perturb(Ears(dims, **options)).eval()


RULE = LoRA(rank=2, alpha=2, match=["conv1", "conv2", "head"])
CHANNELS = PaCA(rank={"conv1": 2, "*": 3}, match=["conv1", "conv2", "head"])
GEOMETRIES: list[dict[str, Any]] = [
    {}, {"stride": 1, "padding": "same"}, {"padding": "valid"}, {"dilation": 2}, {"padding_mode": "reflect"},
    {"padding_mode": "circular", "stride": 1},
]  # fmt: skip


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_factors_get_the_gradient_of_the_dense_kernel(options, dims):
    if dims == 2 and options.get("padding") == "same":
        options = options | {"dilation": (1, 2)}
    if options.get("padding") == "valid":
        options = {"stride": 2, **options}
    model, x = model_of(dims, **options).double(), pixels(dims).double()
    host = sparsify.compile(model, Plan([RULE], check="numeric"), example=x, progress=False)
    assert {part.owner for part in host.sparsify.program.parts} == {"conv1", "conv2", "head"}
    tiny.disturb(host, 0.3)
    dense = host.sparsify.plain().requires_grad_(True)
    y = host(x)
    torch.testing.assert_close(y, dense(x), rtol=1e-10, atol=1e-12)
    tiny.probe_loss(y).backward()
    tiny.probe_loss(dense(x)).backward()
    for name in ("conv1", "conv2"):
        module, full = host.get_submodule(name), dense.get_submodule(name).weight.grad.flatten(1)
        a, b, scale = module.lora_A.detach(), module.lora_B.detach(), module.scale
        torch.testing.assert_close(module.lora_B.grad, scale * full @ a.t(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(module.lora_A.grad, scale * b.t() @ full, rtol=1e-9, atol=1e-12)
        assert module.weight.grad is None
    torch.testing.assert_close(host(x[0]) if dims == 0 else host(x), dense(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("options", [{}, {"padding_mode": "reflect", "dilation": 2}], ids=str)
@pytest.mark.parametrize("select", ["random", "weight"])
def test_channels_get_their_part_of_the_dense_gradient(options, dims, select):
    model, x = model_of(dims, **options).double(), pixels(dims).double()
    rule = PaCA(rank={"conv1": 2, "*": 3}, match=["conv1", "conv2"], select=select)
    host = sparsify.compile(model, Plan([rule], check="numeric"), example=x, progress=False)
    tiny.disturb(host, 0.3)
    dense = host.sparsify.plain().requires_grad_(True)
    x.requires_grad_(True)
    y, want = host(x), dense(x)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)
    (dx,) = torch.autograd.grad(tiny.probe_loss(y), x, retain_graph=True)
    torch.testing.assert_close(
        dx, torch.autograd.grad(tiny.probe_loss(want), x, retain_graph=True)[0], rtol=1e-9, atol=1e-11
    )
    tiny.probe_loss(y).backward()
    tiny.probe_loss(want).backward()
    for name, count in (("conv1", 2), ("conv2", 3)):
        module, full = host.get_submodule(name), dense.get_submodule(name).weight.grad
        channels = module.slice_channels[:: full[0, 0].numel()] // full[0, 0].numel()
        assert channels.numel() == count
        torch.testing.assert_close(module.weight_slice.grad, full[:, channels].flatten(1), rtol=1e-9, atol=1e-12)
        assert module.weight.grad is None


def test_only_the_trained_channels_of_the_input_are_kept():
    x, weight, block = torch.randn(2, 8, 9, 9, requires_grad=True), torch.randn(4, 8, 3, 3), torch.randn(4, 18)
    columns, kept = torch.arange(9).repeat(2) + torch.tensor([9] * 9 + [45] * 9), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.ops.sparsify.partial_conv(x, weight, None, block.requires_grad_(True), columns, [1, 1], [1, 1], [1, 1])
    known = {weight.data_ptr(), block.data_ptr(), columns.data_ptr()}
    assert [tuple(t.shape) for t in kept if t.dim() == 4 and t.data_ptr() not in known] == [(2, 2, 9, 9)]


@pytest.mark.parametrize("RULE", [RULE, CHANNELS], ids=["LoRA", "PaCA"])
def test_it_goes_through_files_switches_merges_and_back(RULE, tmp_path):
    model, x = model_of(), pixels()
    host = sparsify.compile(model, Plan([RULE]), example=x, progress=False)
    other = sparsify.compile(model, Plan([RULE]), example=x, progress=False)
    base = model(x)
    assert torch.equal(host(x), base) or torch.allclose(host(x), base, atol=1e-6)
    tiny.disturb(host, 0.2)
    want = host(x).detach()
    host.sparsify.save_adapter(tmp_path)
    other.sparsify.load_adapter(tmp_path, "a")
    assert other.sparsify.set_adapter("a").trainable
    assert torch.equal(other(x), want)
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(sparsify.load(model, tmp_path)(x), want, **close)
    host.sparsify.load_adapter(tmp_path, "b")
    host.sparsify.set_adapter({"default": 0.25, "b": 0.75})
    torch.testing.assert_close(host(x), want, **close)
    host.sparsify.set_adapter("default")
    host.sparsify.merge()
    torch.testing.assert_close(host(x), want, **close)
    host.sparsify.unmerge()
    assert torch.equal(copy.deepcopy(host)(x), want)
    again = sparsify.compile(model, Plan([RULE]), example=x, progress=False)
    again.load_state_dict(host.state_dict())
    assert torch.equal(again(x), want)
    host.sparsify.set_adapter(None)
    torch.testing.assert_close(host(x), base, **close)
    tiny.assert_same(host.sparsify.restore().state_dict(), model.state_dict())


def in_peft(model: nn.Module, folder: Any) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@pytest.mark.parametrize("dims", [1, 2])
def test_peft_computes_the_same_both_ways(dims, tmp_path):
    model, x = model_of(dims), pixels(dims)
    host = sparsify.compile(model, Plan([RULE]), example=x, progress=False)
    tiny.disturb(host, 0.2)
    columns = sparsify.compile(model, Plan([CHANNELS]), example=x, progress=False)
    tiny.disturb(columns, 0.2)
    for each in (host, columns):
        each.sparsify.export_lora(tmp_path / "ours")
        torch.testing.assert_close(in_peft(model, tmp_path / "ours")(x), each(x), rtol=2e-5, atol=2e-5)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["conv1", "head"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    tiny.disturb(theirs, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    found = sparsify.load(model, tmp_path / "theirs")
    torch.testing.assert_close(found(x), theirs.eval()(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "reflect"}], ids=str)
def test_what_peft_leaves_out_is_not_exported(options, tmp_path):
    host = sparsify.compile(model_of(**options), Plan([RULE]), example=pixels(), progress=False)
    with pytest.raises(AdapterError, match=f"{next(iter(options))}=.*PEFT leaves out of the convolution"):
        host.sparsify.export_lora(tmp_path)


@pytest.mark.parametrize(
    ("model", "rule", "words"),
    [
        (Ears(groups=3), LoRA(2, match="conv1"), "it has 3 groups"),
        (Ears(), PaCA(3, match="conv1"), "rank 3, and it has 3 input channels"),
        (Ears(), PaCA(2, match="conv1", select="activation"), "'random' and 'weight' choose"),
        (Ears(), RoSA(rank=2, mask="random", match="conv1"), "RoSA has no form for convolutions"),
    ],
    ids=["groups", "rank", "select", "RoSA"],
)
def test_what_cannot_serve_is_declined(model, rule, words):
    with pytest.raises(RefusedError, match=words):
        sparsify.compile(model, Plan([rule]), example=pixels(), progress=False)


def test_a_pattern_must_speak_of_them():
    host = sparsify.compile(model_of(), Plan([LoRA(2)]), example=pixels(), progress=False)
    assert {part.owner for part in host.sparsify.program.parts} == {"head"}


def test_the_patches_of_a_vit():
    model = tiny.build("ViT")
    rule = LoRA(rank=2, match=["*.patch_embeddings.projection"])
    host = sparsify.compile(model, Plan([rule], check="numeric"), progress=False)
    losses = tiny.train(host, steps=3, **tiny.inputs_of(model, "ViT"))
    assert losses[-1] < losses[0]
    assert isinstance(host, hf.PreTrainedModel)
    assert [type(m).__name__ for m in host.modules() if "LowRank" in type(m).__name__] == ["LowRankConv2d"]

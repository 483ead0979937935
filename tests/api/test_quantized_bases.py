"""Models that bitsandbytes or torchao quantised before: taken as they are, trained beside, saved, switched; the rest is refused by name."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

import sparsify
from sparsify import S2FT, CaptureError, LoRA, PaCA, Plan, PlanError, Prune, Quantize, RoSA, SparsifyError
from sparsify.host.quantized_bases import dense_twin, packed_base

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

FOUR_BIT: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "nf4 single": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 blocks of 128": {"quant_type": "nf4", "blocksize": 128},
    "fp4": {"quant_type": "fp4"},
    "fp4 single": {"quant_type": "fp4", "compress_statistics": False},
    "nf4 in bf16": {"quant_type": "nf4", "compute_dtype": torch.bfloat16},
}
KINDS = (*FOUR_BIT, "int8", "torchao int8", "torchao intx", "torchao float8")


def mlp(seed: int = 0) -> nn.Module:
    """Two residual feed-forwards over 64 channels (whole blocks) and 40 (parts of blocks), biases everywhere."""
    torch.manual_seed(seed)
    return tiny.perturb(tiny.Mlp(64, 40)).eval()


X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))


def replace_linears(model: nn.Module, make: Any) -> nn.Module:
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(linear))
    return model


def four_bit(
    linear: nn.Linear, quant_type: str, compute_dtype: Any = None, blocksize: int = 64, **more: Any
) -> nn.Module:
    bias = linear.bias is not None
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias, compute_dtype, quant_type=quant_type, **more
    )
    options = {"quant_type": quant_type, "blocksize": blocksize, "module": made, **more}
    made.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, **options).to("cpu")
    made.bias = linear.bias
    return made


def eight_bit(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    made.bias = linear.bias
    return made


def quantised(kind: str, model: nn.Module | None = None) -> nn.Module:
    model = mlp() if model is None else model
    if kind in FOUR_BIT:
        return replace_linears(model, lambda linear: four_bit(linear, **FOUR_BIT[kind]))
    if kind == "int8":
        return replace_linears(model, eight_bit)
    config = {
        "torchao int8": torchao.Int8WeightOnlyConfig,
        "torchao intx": torchao.IntxWeightOnlyConfig,
        "torchao float8": torchao.Float8WeightOnlyConfig,
    }[kind]()
    torchao.quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X) if isinstance(model, tiny.Mlp) else model(input_ids=tiny.tokens()).logits


def step(host: nn.Module, steps: int = 3, lr: float = 1e-2) -> list[float]:
    """Towards the mean of a fixed target; returns the losses."""
    optimizer = torch.optim.SGD(tiny.trainable(host), lr=lr)
    losses = []
    for _ in range(steps):
        y = host(X) if isinstance(host, tiny.Mlp) else host(input_ids=tiny.tokens()).logits
        loss = (y - torch.linspace(-1, 1, y.shape[-1])).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def library_weight(module: nn.Module) -> Tensor:
    """What the library itself says that a packed weight stands for."""
    own: Any = module
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(own.weight.data, own.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = own.state.SCB if own.state.SCB is not None else own.weight.SCB
        return own.weight.data.float() * (scales / 127).unsqueeze(1)
    return own.weight.dequantize()


def compiled(model: nn.Module, *rules: Any, **options: Any) -> Any:
    if isinstance(model, tiny.Mlp):
        options.setdefault("example", (X,))
    return sparsify.compile(model, Plan(list(rules)), progress=False, **options)


RULES = {
    "LoRA": LoRA(rank=3),
    "PaCA": PaCA(rank=4),
    "RoSA": RoSA(rank=2, density=0.02, mask="random"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_taken_bit_for_bit_and_trains_beside(kind: str) -> None:
    model = quantised(kind)
    expected = logits(model)
    before = {n: t.detach().clone() for n, t in model.state_dict().items() if type(t) is Tensor}
    host = compiled(model, LoRA(rank=3))
    # the library's product and ours sum in other orders; in bf16 each of them rounds
    bound = 3e-2 if "bf16" in kind else 1e-5
    assert (logits(host) - expected).abs().max() <= bound * expected.abs().max()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            found = host.get_submodule(name).dense()
            assert torch.equal(found, library_weight(module).to(found.dtype)), name
            assert type(host.get_submodule(name)).__name__ == "QuantizedLinear"
    losses = step(host, lr=0.3)
    assert losses[-1] < losses[0]
    trained = logits(host)
    assert not torch.allclose(trained, expected, atol=1e-3)
    host.sparsify.set_adapter(None)
    assert (logits(host) - expected).abs().max() <= bound * expected.abs().max()
    host.sparsify.set_adapter("default")
    assert torch.equal(logits(host), trained)
    assert torch.equal(logits(model), expected), "the user's model is not written to"
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


RULES["S2FT"] = S2FT(structure="ffn", fraction=0.2)
OFTEN = {("fp4", "S2FT"), ("nf4", "LoRA"), ("int8", "PaCA"), ("torchao int8", "RoSA")}
PAIRS = [
    pytest.param(kind, rule, marks=() if (kind, rule) in OFTEN else pytest.mark.slow)
    for kind in ("nf4", "fp4", "int8", "torchao int8")
    for rule in RULES
]


@pytest.mark.parametrize(("kind", "rule"), PAIRS)
def test_adapters_save_load_and_switch(kind: str, rule: str, tmp_path: Path) -> None:
    model = quantised(kind)
    host = compiled(model, RULES[rule])
    step(host)
    expected = logits(host)
    host.sparsify.save_adapter(tmp_path / "a")
    again = compiled(quantised(kind), RULES[rule])
    assert not torch.equal(logits(again), expected)
    again.sparsify.load_adapter(tmp_path / "a", "a")
    again.sparsify.set_adapter("a")
    torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=1e-6)  # base + (value − base) rounds
    other = compiled(quantised(kind, mlp(seed=1)), RULES[rule])
    with pytest.raises(SparsifyError, match="is not the base that the adapter was trained on"):
        other.sparsify.load_adapter(tmp_path / "a", "a")


@pytest.mark.parametrize(
    "rule",
    [
        PaCA(rank=3, select="weight"),
        PaCA(rank=3, select="activation"),
        PaCA(rank=3, select="gradient"),
        S2FT(structure="ffn", units=5, select="product"),
        RoSA(rank=0, density=0.03, mask="gradient"),
        RoSA(rank=2, density=0.03, mask="magnitude"),
    ],
    ids=str,
)
def test_selections_look_at_what_the_packed_weights_stand_for(rule: Any) -> None:
    """The same channels and entries as in a dense model that holds the unpacked weights."""
    model = quantised("nf4 single")
    dense = mlp()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                dense.get_submodule(name).weight.copy_(library_weight(module))
    batches = [(X,), (X.flip(0) * 2,)]
    chosen = []
    for source in (model, dense):
        program = compiled(
            source, rule, calibration=batches, loss=lambda y, _: (y - 1).square().mean()
        ).sparsify.program
        # a structure of the dense model may have its channels brought together; the channels are the same
        columns = {s.param: set(s.channels) for s in program.slices}
        chosen.append([columns, {p.param: p.original.tolist() for p in program.lowranks}])
    assert chosen[0] == chosen[1]
    assert any(chosen[0])


def test_numbers_are_checked_after_every_pass_and_the_graph_agrees_with_the_host() -> None:
    host = sparsify.compile(
        quantised("nf4", tiny.llama()),
        Plan([LoRA(match="*.q_proj", rank=2), PaCA(rank=3)], check="numeric"),
        progress=False,
    )
    assert "quantized_linear" in str(host.sparsify.program)
    args, kwargs = host.sparsify.program.example
    with torch.no_grad():
        torch.testing.assert_close(host.sparsify.program(*args, **kwargs).logits, host(*args, **kwargs).logits)


def test_a_state_dict_round_trip_and_a_dense_checkpoint(tmp_path: Path) -> None:
    host = compiled(quantised("fp4", tiny.llama()), LoRA(rank=2))
    step(host)
    expected = logits(host)
    state = {k: v.clone() for k, v in host.state_dict().items()}
    again = compiled(quantised("fp4", tiny.llama()), LoRA(rank=2))
    again.load_state_dict(state)
    assert torch.equal(logits(again), expected)
    host.save_pretrained(tmp_path / "dense")
    loaded = type(host).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)


def test_a_four_bit_base_merges_by_packing_again_and_torchaos_says_that_it_cannot() -> None:
    host = compiled(quantised("fp4 single"), LoRA(rank=2))
    step(host)
    with pytest.warns(UserWarning, match="packed weights were quantised again"):
        host.sparsify.merge()
    assert torch.isfinite(logits(host)).all()
    host.sparsify.unmerge()
    host = compiled(quantised("torchao int8"), LoRA(rank=2))
    before = logits(host)
    with pytest.raises(SparsifyError, match="merge: .* came packed as torchao/"):
        host.sparsify.merge()
    assert torch.equal(logits(host), before)
    with pytest.raises(SparsifyError, match="restore: the base came packed"):
        host.sparsify.restore()


def test_a_dtype_that_is_not_the_activations_one() -> None:
    """compute_dtype bf16 in an fp32 model: the layer computes in bf16 and gives fp32 back."""
    host = compiled(quantised("nf4 in bf16"), PaCA(match="*.down", rank=3))
    module = host.layers[0]["down"]
    x = torch.randn(2, module.shape[1])
    assert module(x).dtype == torch.float32
    assert module.weight.dtype == torch.bfloat16
    assert module.weight_slice.dtype == torch.float32
    copied = copy.deepcopy(host)
    assert torch.equal(logits(copied), logits(host))


def test_stand_ins_take_no_memory_and_are_nan() -> None:
    model = quantised("nf4", tiny.llama())
    twin, bases = dense_twin(model)
    weight = twin.model.layers[0].mlp.up_proj.weight
    assert weight.untyped_storage().nbytes() == weight.element_size()
    assert bool(weight.isnan().all())
    assert len(bases) == 14
    assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    plain = tiny.llama()
    assert dense_twin(plain) == (plain, {})
    assert packed_base(plain.lm_head, "lm_head", torch.float32) is None


def test_scales_that_an_earlier_forward_laid_out_for_the_cpu_kernel() -> None:
    """bitsandbytes re-arranges a weight in place on machines with AVX-512 BF16; the same is done here by its own function."""
    made = four_bit(nn.Linear(64, 32), quant_type="nf4")
    own: Any = made
    state = own.weight.quant_state
    expected = library_weight(made)
    own.weight.data, own.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(own.weight.data, state)
    base = packed_base(made, "up", torch.float32)
    assert base is not None
    # the kernel's scales are bf16
    torch.testing.assert_close(base.dense(), expected, rtol=2**-7, atol=0)
    assert own.weight.quant_state.packing_format_for_cpu


class Fp8Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.weight = nn.Parameter(torch.zeros(8, 8).to(torch.float8_e4m3fn), requires_grad=False)


class QuantLinear(nn.Module):
    """The layout of GPTQ's and AWQ's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))


class HQQLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(4, 8, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    ("layer", "library"),
    [(Fp8Linear, "8-bit floats"), (QuantLinear, "GPTQ or AWQ"), (HQQLinear, "HQQ")],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_cannot_be_taken_is_named_with_its_library_and_class(layer: Any, library: str) -> None:
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj = layer()
    with pytest.raises(CaptureError) as error:
        compiled(model, LoRA(rank=2))
    text = str(error.value)
    assert f"model.layers.1.mlp.up_proj is quantised by {library}" in text
    assert f"(class {layer.__name__})" in text
    assert "Quantize(format='nf4')" in text


def test_layers_that_are_not_packed_yet_or_pack_in_every_forward() -> None:
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj = bnb.nn.Linear4bit(36, 56, bias=False)
    with pytest.raises(
        CaptureError, match=r"layers\.0\.mlp\.up_proj is a bitsandbytes Linear4bit whose weight is not packed yet"
    ):
        compiled(model, LoRA(rank=2))
    model.model.layers[0].mlp.up_proj = bnb.nn.Linear8bitLt(36, 56, bias=False)
    with pytest.raises(CaptureError, match="has_fp16_weights=True"):
        compiled(model, LoRA(rank=2))
    torchao.quantize_(plain := tiny.llama(), torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(CaptureError, match=r"is quantised by torchao .* with quantised activations"):
        compiled(plain, LoRA(rank=2))


def test_plans_that_a_packed_base_cannot_serve() -> None:
    model = quantised("nf4")
    with pytest.raises(PlanError, match=r"rule 0, Quantize.*serves nothing: .*packed already, by bitsandbytes"):
        compiled(model, Quantize(format="int8"), LoRA(rank=2))
    with pytest.raises(PlanError, match=r"packed already, by bitsandbytes: prune the model before"):
        compiled(model, Prune(method="magnitude"))
    with pytest.raises(PlanError, match=r"is quantised by bitsandbytes .* the kernels are made from dense weights"):
        sparsify.compile(model, Plan([], target="cpu"), example=(X,), progress=False)
    with pytest.raises(PlanError, match="add a rule that trains"):
        compiled(model, Quantize())


def test_loading_without_a_plan_wants_dense_weights(tmp_path: Path) -> None:
    compiled(quantised("nf4"), LoRA(rank=2)).sparsify.save_adapter(tmp_path)
    with pytest.raises(SparsifyError, match=r"load: .* came packed by bitsandbytes \(Linear4bit\)"):
        sparsify.load(quantised("nf4"), tmp_path, example=(X,))


def test_wrapped_and_offloaded_models_say_what_they_are() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny.llama()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    with pytest.raises(
        CaptureError, match=r"its forward is wrapped for mixed precision .* call sparsify.compile first"
    ):
        compiled(model, LoRA(rank=2))
    model = accelerate.cpu_offload(tiny.llama(), execution_device=torch.device("cpu"))
    with pytest.raises(CaptureError, match=r"is offloaded by accelerate"):
        compiled(model, LoRA(rank=2))
    with pytest.raises(PlanError) as error:
        sparsify.compile(
            nn.Sequential(nn.LayerNorm(3)), Plan([LoRA(rank=2)]), example=(torch.randn(2, 3),), progress=False
        )
    assert "known are" not in str(error.value)
    assert "no nn.Linear" in str(error.value)

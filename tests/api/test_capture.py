"""Capture: Hugging Face models without an example, plain modules with one; shared and tied weights; what stops it, in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, CaptureError
from sparsify.program import Stage
from sparsify.program.capture import capture, dummy_inputs, evaluating, example_inputs

pytestmark = pytest.mark.fresh_trace

NO_EXAMPLE = [f.name for f in zoo.FAMILIES if f.named and zoo.available(f) and f.inputs != "audio"]
#: one family for each kind of input that is made up; the others take the same, and `test_find_structures` exports every one of them
KINDS = ("Llama", "GPT-2", "BERT (classifier)", "T5", "Whisper", "ViT", "CLIP", "Mixtral")


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in NO_EXAMPLE])
def test_hugging_face_models_need_no_example(name):
    model = tiny.build(name)
    program = capture(model)
    assert program.stage is Stage.CAPTURED
    args, kwargs = program.example
    assert args == ()
    assert "use_cache" not in kwargs or kwargs["use_cache"] is False
    with torch.no_grad():
        torch.testing.assert_close(tiny.output_of(program.run_example()), tiny.output_of(model(**kwargs)))
    names = {n for n, p in model.named_parameters() if p.dim() == 2}
    assert {linear.weight for linear in program.linears()} <= names
    assert len(list(program.linears())) >= 4


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT (classifier)", "ViT"])
def test_every_linear_is_tied_to_its_parameter(name):
    """By name, orientation and bias: each node computes what its module does."""
    model = tiny.build(name)
    found = {linear.weight: linear for linear in capture(model).linears()}
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    tied = {f"{n}.weight" for n, m in modules.items()} - set(found)
    canonical = {n for n, _ in model.named_parameters()}
    assert not tied & canonical, "a linear is missing"
    for weight, linear in found.items():
        module = modules.get(weight.removesuffix(".weight"))
        if module is None:
            continue
        assert linear.transposed == (type(module).__name__ == "Conv1D")
        width = module.weight.shape[linear.in_axis]
        assert linear.x.meta["val"].shape[-1] == width
        assert linear.node.meta["val"].shape[-1] == module.weight.shape[linear.out_axis]
        assert (linear.bias is None) == (module.bias is None)


def test_plain_modules_take_an_example_of_any_form():
    x = torch.randn(3, 12)
    model = tiny.Mlp()
    for example in (x, (x,), [x], {"x": x}):
        program = capture(model, example)
        torch.testing.assert_close(program.run_example(), model(x))
        assert len(list(program.linears())) == 5


def test_plain_module_without_an_example_is_told_what_to_pass():
    with pytest.raises(
        CaptureError, match=r"^Mlp is not a Hugging Face model: pass example=… \(a batch as a mapping, or a tuple"
    ):
        capture(tiny.Mlp())
    with pytest.raises(CaptureError, match="example: expected a mapping, a tuple, or a tensor, got int"):
        capture(tiny.Mlp(), 3)


def test_labels_of_a_batch_are_left_out_and_caches_are_off():
    model = tiny.llama()
    args, kwargs = example_inputs(model, {"input_ids": tiny.tokens(), "labels": tiny.tokens()})
    assert args == ()
    assert set(kwargs) == {"input_ids", "use_cache"}
    assert kwargs["use_cache"] is False


def test_dummy_inputs_respect_the_config():
    model = tiny.build("ViT")
    assert dummy_inputs(model)["pixel_values"].shape == (2, 3, 10, 10)
    short = tiny.llama(max_position_embeddings=4)
    assert dummy_inputs(short)["input_ids"].shape == (2, 4)
    assert dummy_inputs(tiny.llama(torch.bfloat16))["input_ids"].dtype == torch.int64
    assert dummy_inputs(tiny.build("ViT", torch.bfloat16))["pixel_values"].dtype == torch.bfloat16


def test_capture_leaves_the_model_as_it_was():
    model = tiny.build("BERT (classifier)")
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    base = tiny.snapshot(model)
    state = torch.get_rng_state()
    capture(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    tiny.assert_same(tiny.snapshot(model), base)


def test_training_flags_come_back_when_the_trace_fails():
    model = Branching().train()
    with pytest.raises(CaptureError):
        capture(model, torch.randn(3, 12))
    assert all(m.training for m in model.modules())


def test_dropout_is_off_in_the_graph():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Linear(4, 4)).train()
    program = capture(model, torch.randn(3, 4))
    assert not any(n.args[2] for n in program.graph.nodes if n.target is torch.ops.aten.dropout.default)
    torch.testing.assert_close(program.run_example(), model.eval()(program.example[0][0]))


class Branching(nn.Module):
    """Control flow over the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        if h.sum() > 0:  # the line that stops the trace
            h = h * 2
        return self.down(h)


def test_data_dependent_control_flow_names_the_line_and_the_way_out():
    with pytest.raises(CaptureError) as caught:
        capture(Branching(), torch.randn(3, 12))
    text = str(caught.value)
    rows = Path(__file__).read_text().splitlines()
    line = next(i for i, row in enumerate(rows, 1) if row.strip().startswith("if h.sum() > 0:"))
    assert text.startswith("in stage 'capture': Branching could not be traced")
    assert f"test_capture.py:{line}, in forward: `if h.sum() > 0:" in text
    assert (
        "try: the code branches on the values of a tensor: branch on shapes or config instead, or use torch.where"
        in text
    )


class Broken(nn.Module):
    """Fails on its example."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.view(-1, 5))


def test_other_failures_name_the_line_too():
    message = r"(?s)test_capture\.py:\d+, in forward: `return self\.up\(x\.view\(-1, 5\)\)`.*try: call the model once"
    with pytest.raises(CaptureError, match=message):
        capture(Broken(), torch.randn(3, 12))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            nn.DataParallel(nn.Linear(3, 3)),
            "DataParallel wraps the model: call sparsify.compile on the model first, then wrap",
        ),
        ("model", "expected a torch.nn.Module, got str"),
    ],
    ids=["DataParallel", "text"],
)
def test_what_is_no_plain_module_is_refused(value, message):
    with pytest.raises(CaptureError, match=re.escape(message)):
        capture(value, torch.randn(2, 3))


class Shared(nn.Module):
    """One feed-forward module that runs twice, and a head tied to another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)})
        self.second = self.first
        self.encode, self.decode = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        for block in (self.first, self.second):
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.decode(x)


def test_shared_modules_and_tied_weights_have_one_name():
    model = Shared()
    x = torch.randn(3, 12)
    program = capture(model, x)
    weights = [linear.weight for linear in program.linears()]
    assert weights == ["encode.weight", *["first.up.weight", "first.down.weight"] * 2, "encode.weight"]
    assert program.aliases["second.up.weight"] == "first.up.weight"
    assert program.aliases["decode.weight"] == "encode.weight"
    assert program.tensor("decode.weight") is program.tensor("encode.weight")
    torch.testing.assert_close(program.run_example(), model(x))


def test_shared_modules_train_once_and_restore():
    model = Shared()
    base = tiny.snapshot(model)
    x = torch.randn(3, 12)
    expected = model(x)
    host = tiny.lower(model, S2FT(units=5, producer_fraction=0.2, budget="structure"), example=x, check="numeric")
    assert host.first is host.second
    assert host.decode.weight is host.encode.weight
    torch.testing.assert_close(host(x), expected)
    tiny.train(host, x=x)
    torch.testing.assert_close(host.sparsify.program(x), host(x))
    assert not torch.allclose(host(x), expected)
    tiny.assert_same(tiny.snapshot(host.sparsify.restore()), base)


@pytest.mark.parametrize("name", ["GPT-2", "T5 (gated)"])
def test_tied_embeddings_stay_tied(name):
    model = tiny.build(name)
    host = tiny.lower(model, S2FT(units=1))
    owners = [n for n, p in host.named_parameters(remove_duplicate=False) if p is host.get_input_embeddings().weight]
    assert len(owners) == len(
        [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_input_embeddings().weight]
    )
    assert set(host.state_dict()) >= set(model.state_dict())


def test_meta_device_needs_no_memory():
    with torch.device("meta"):
        model = tiny.llama(
            num_hidden_layers=1, hidden_size=512, intermediate_size=1536, num_attention_heads=8, head_dim=64
        )
    program = sparsify.analyse(model)
    assert {s.kind for s in program.structures} == {"ffn", "attention"}
    assert len(program.structures) == 2
    host = tiny.lower(model, S2FT(fraction=0.05, producer_fraction=0.05, budget="structure"))
    assert all(p.device.type == "meta" for p in host.parameters())
    assert host.sparsify.count_parameters()[0] > 0
    choices = tiny.lower(tiny.llama(num_hidden_layers=1), S2FT(units=3)).sparsify.program.choices
    with torch.device("meta"):
        small = tiny.llama(num_hidden_layers=1)
    assert tiny.lower(small, S2FT(units=3)).sparsify.program.choices == choices, "the selection needs no values"


def test_program_refuses_inputs_of_another_structure():
    program = capture(tiny.Mlp(), torch.randn(3, 12))
    with pytest.raises(sparsify.SparsifyError, match="the program was captured with inputs"):
        program(torch.randn(3, 12), torch.randn(3, 12))


def test_16_bit_models_are_captured_in_their_own_dtype():
    model = tiny.llama(torch.bfloat16)
    program = capture(model)
    assert tiny.output_of(program.run_example()).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [False, True])
def test_every_module_gets_its_own_mode_back(training):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model.train()
    model[1].eval()
    model[1][1].train()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    with evaluating(model, training):
        assert {module.training for module in model.modules()} == {training}
    assert [module.training for module in model.modules()] == before

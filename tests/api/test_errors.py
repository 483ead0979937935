"""Errors: one base class, standard parents, helpful words, a public door, and the model as it was after each."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny
import torch
from torch import nn

import sparsify
from sparsify import S2FT, Plan, Refusal
from sparsify.errors import AdapterError, CaptureError, PlanError, RefusedError, SparsifyError, VerifyError


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (PlanError, ValueError),
        (CaptureError, RuntimeError),
        (VerifyError, AssertionError),
        (RefusedError, RuntimeError),
        (AdapterError, ValueError),
    ],
)
def test_errors_are_sparsify_errors_and_standard_ones(error, parent):
    assert issubclass(error, SparsifyError)
    assert issubclass(error, parent)
    assert getattr(sparsify, error.__name__) is error


def test_a_refusal_prints_where_and_why():
    assert str(Refusal("model.mlp", "the weight is tied")) == "model.mlp: the weight is tied"


def test_every_public_name_exists():
    for name in sparsify.__all__:
        assert getattr(sparsify, name) is not None
    assert {"compile", "analyse", "Plan", "S2FT", "SparsifyError"} <= set(sparsify.__all__)


LEAN = """
import sys
import torch
heavy = ("transformers", "triton", "peft", "accelerate", "jinja2", "typer", "networkx")
before = [m for m in heavy if m in sys.modules]  # torch's own
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import sparsify
from sparsify.kernels.gpu import build, codegen, formats, launch, spec, tiles
assert [m for m in heavy if m in sys.modules] == before
"""


def test_import_is_lean():
    """`import sparsify` brings neither transformers nor triton nor peft nor networkx nor a compiler, and needs none; nor do the kernels."""
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Escaping(nn.Module):
    """The intermediate of its feed-forward is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.relu(self.up(x))
        return self.down(h), h


def test_a_model_without_structures_says_why():
    x = torch.randn(3, 12)
    model = Escaping()
    base = tiny.snapshot(model)
    with pytest.raises(PlanError) as caught:
        tiny.lower(model, S2FT(units=2), example=x)
    assert "rule 0" in str(caught.value)
    assert "output" in str(caught.value), "the reason must be told"
    tiny.assert_same(tiny.snapshot(model), base)
    assert all(p.requires_grad for p in model.parameters())


class Norm(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_a_linear_with_a_forward_of_its_own_is_refused_by_name():
    model = tiny.Mlp()
    model.layers[0]["down"].__class__ = Norm
    with pytest.raises(
        RefusedError, match=r"layers\.0\.down\.weight: its module is a Norm, whose own forward would be lost"
    ):
        tiny.lower(model, S2FT(match="layers.0.down", units=2), example=torch.randn(3, 12))


class Written(nn.Linear):
    """A subclass whose forward is a linear written out (as Falcon's)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def test_a_linear_that_is_written_out_trains_and_gets_its_class_back():
    model = tiny.Mlp()
    model.layers[0]["down"].__class__ = Written
    base, x = tiny.snapshot(model), torch.randn(3, 12)
    expected = model(x)
    host = tiny.lower(model, S2FT(match="layers.0.down", units=2), example=x, check="numeric")
    torch.testing.assert_close(host(x), expected)
    tiny.train(host, x=x)
    assert not torch.allclose(host(x), expected)
    restored = host.sparsify.restore()
    assert type(restored.layers[0]["down"]) is Written
    tiny.assert_same(tiny.snapshot(restored), base)


class Reader(tiny.Mlp):
    """Something else reads the weight of a down-projection."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.layers[0]["down"].weight.sum()


def test_a_weight_that_something_else_reads_is_refused():
    with pytest.raises((RefusedError, PlanError), match=r"layers\.0"):
        tiny.lower(Reader(), S2FT(match="layers.0.down", units=2), example=torch.randn(3, 12))


def test_errors_inside_a_pass_name_the_pass_and_keep_their_class():
    with pytest.raises(PlanError, match=r"^in pass '[a-z-]+' \(\d/\d\): "):
        tiny.lower(tiny.Mlp(), S2FT(match="nowhere", units=2), example=torch.randn(3, 12))


def test_the_report_lists_what_was_declined():
    host = tiny.lower(tiny.build("Bloom"), S2FT(units=2))
    report = host.sparsify.report
    assert report.found.get("ffn") == 2
    assert len(report.declined) == 2
    text = str(report)
    assert all(str(r) in text for r in report.declined)
    assert f"{report.trainable:,} of {report.total:,} parameters" in text


def test_print_trainable_parameters_counts_each_entry_once(capsys):
    model = tiny.llama()
    host = tiny.lower(model, S2FT(structure="ffn", units=4))
    host.sparsify.print_trainable_parameters()
    total = sum(p.numel() for p in model.parameters())
    assert host.sparsify.count_parameters() == (2 * 36 * 4, total)
    assert capsys.readouterr().out == (
        f"trainable params: 288 || all params: {total:,} || trainable%: {100 * 288 / total:.4f}\n"
    )
    assert (host.sparsify.report.trainable, host.sparsify.report.total) == (288, total)


def test_plan_prints_as_what_one_would_write():
    assert str(S2FT(units=2)) == "S2FT(match='*', units=2)"
    assert Plan([S2FT(units=2)]).rules[0].match == "*"

"""Names of modules never become source: every key of a ModuleDict compiles, under every rule, and nothing is executed."""

from __future__ import annotations

import ast
import keyword
import xml.dom.minidom
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import sparsify
from sparsify import S2FT, CaptureError, LoRA, PaCA, Plan, Prune, Quantize, RoSA
from sparsify.lowering.deploy.exported import export_for_inference, lower_exported
from sparsify.program.names import LONGEST, identifier, is_safe, placeholder, printable

KEYS = [
    "en-de",
    "en_de",  # the same identifier as its neighbours
    "en de",
    "en\nde",
    "1",
    "1e5",
    "class",
    "None",
    "print",
    "self",
    "é",
    "日本",
    "'",
    '"""',
    "\\",
    "\x1b[31m",
    "x\u2028y",
    "</text><script>",
    "%s{0}",
    "f" * 300,
    'x=exec(b\'open("executed","w")\') and y',
    "x): open('executed', 'w') #",
    "x\nopen('executed', 'w')\n",
    "x, y=open('executed', 'w')",
    "x: open('executed', 'w') = 1",
]
RULES = [
    S2FT(structure="ffn", units=2),
    LoRA(rank=2),
    PaCA(rank=2),
    RoSA(rank=2, density=0.1, mask="random"),
    Quantize(),
    Prune(sparsity=0.5, method="magnitude"),
]


class Net(nn.Module):
    """Residual feed-forwards, one a key: languages, tasks, labels as they come from a configuration."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.up = nn.ModuleDict({key: nn.Linear(8, 16) for key in keys})
        self.down = nn.ModuleDict({key: nn.Linear(16, 8) for key in keys})
        self.scales = nn.ParameterDict({key: nn.Parameter(torch.ones(8)) for key in keys})

    def forward(self, x: Tensor) -> Tensor:
        for key in self.up:
            x = x + self.scales[key] * self.down[key](torch.relu(self.up[key](x)))
        return x


@pytest.fixture(autouse=True)
def _nothing_is_executed(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("executed").exists()


def assert_harmless(program: sparsify.program.Program) -> None:
    code = program.graph_module.code
    assert code.isascii()
    tree = ast.walk(ast.parse(code.strip()))
    assert not {"exec", "open", "eval", "print"} & {n.id for n in tree if isinstance(n, ast.Name)}
    names = [node.name for node in program.graph.nodes]
    assert len(set(names)) == len(names)
    inputs = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    assert inputs == {i.name for i in program.inputs}
    assert all(is_safe(name) and len(name) <= LONGEST + 8 for name in inputs)
    assert all(n.target == n.name for n in program.graph.nodes if n.op == "placeholder")
    program.graph.lint()
    text = str(program)
    assert not [c for c in text if (ord(c) < 32 and c != "\n") or c in "\u2028\x85"]
    xml.dom.minidom.parseString(program.svg())


@pytest.mark.parametrize("rule", RULES, ids=[type(r).__name__ for r in RULES])
def test_any_key_under_any_rule(rule):
    torch.manual_seed(0)
    model, x = Net(KEYS), torch.randn(2, 8)
    host = sparsify.compile(model, Plan([rule]), example=(x,), progress=False)
    program = host.sparsify.program
    assert_harmless(program)
    assert len(program.structures) == len(KEYS)
    assert {i.target for i in program.inputs} >= {f"{half}.{key}.bias" for half in ("up", "down") for key in KEYS}
    str(host.sparsify.report)
    torch.testing.assert_close(program(x), host(x))
    if not isinstance(rule, Quantize | Prune):
        torch.testing.assert_close(host(x), model(x))


def test_parameters_whose_identifiers_collide_keep_apart():
    model, x = Net(["en-de", "en_de", "en de"]), torch.randn(2, 8)
    program = sparsify.analyse(model, (x,))
    assert len({i.name for i in program.inputs}) == len(program.inputs)
    torch.testing.assert_close(program(x), model(x))
    for linear in program.linears():
        assert torch.equal(program.tensor(linear.weight), dict(model.named_parameters())[linear.weight])


@pytest.mark.parametrize("target", ["cpu"])
def test_lowered_programs(target: str):
    model, x = Net(KEYS).eval(), torch.randn(2, 8)
    host = sparsify.compile(
        model, Plan([Prune(sparsity=0.5, method="magnitude")], target=target), example=(x,), progress=False
    )
    assert_harmless(host.sparsify.program)


def test_exported_programs():
    model, x = Net(KEYS).eval(), torch.randn(2, 8)
    host = sparsify.compile(model, Plan([LoRA(rank=2)]), example=(x,), progress=False)
    lowered = lower_exported(export_for_inference(host, (x,)))
    assert lowered.graph_module.code.isascii()
    torch.testing.assert_close(lowered.module()(x), host(x))


class Open(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, **batch) -> Tensor:
        x = sum(v[next(iter(v))] if isinstance(v, dict) else v for v in batch.values())
        return self.down(torch.relu(self.up(x)))


def test_keys_inside_inputs():
    model, batch = Open(), {"a": torch.randn(2, 8)} | {f"b{i}": {key: torch.randn(2, 8)} for i, key in enumerate(KEYS)}
    program = sparsify.analyse(model, batch)
    assert_harmless(program)
    torch.testing.assert_close(program(**batch), model(**batch))


@pytest.mark.parametrize("key", ["x=exec('')", "en-de", "class", "é", "", "a b"])
def test_names_of_inputs_that_are_no_names_are_refused(key: str):
    with pytest.raises(
        CaptureError, match=r"^example: the input .* is not called by a name of Python in ASCII letters"
    ):
        sparsify.analyse(Open(), {key: torch.randn(2, 8)})


class InPlace(Net):
    """Making a graph functional runs source that torch generates."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for key in self.up:
            x += self.scales[key] * self.down[key](self.up[key](x).relu_())
        return x


def test_any_key_in_a_model_that_writes_in_place():
    model, x = InPlace(KEYS), torch.randn(2, 8)
    program = sparsify.analyse(model, (x,))
    assert_harmless(program)
    assert len(program.structures) == len(KEYS)
    weights = {linear.weight for linear in program.linears()}
    assert weights == {f"{half}.{key}.weight" for half in ("up", "down") for key in KEYS}
    torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("text", [*KEYS, "", "_", "a.b.weight", "p_a", "for", "match"])
def test_identifier(text: str):
    name = identifier(text)
    assert is_safe(name)
    assert not keyword.iskeyword(name)
    assert len(name) <= LONGEST + 2
    if text.isascii() and text.isidentifier() and not keyword.iskeyword(text) and not keyword.issoftkeyword(text):
        assert name == text[:LONGEST]


def test_placeholder_is_unique_in_its_graph():
    graph = fx.Graph()
    nodes = [placeholder(graph, text) for text in ("p_a-b", "p_a_b", "p_a b", "p_a.b")]
    assert len({n.target for n in nodes}) == 4
    assert all(n.target == n.name for n in nodes)
    graph.output(tuple(nodes))
    assert fx.GraphModule(nn.Module(), graph)(1, 2, 3, 4) == (1, 2, 3, 4)


def test_printable():
    assert printable("a\x1b[31m\n\u2028\ud800é") == "a\\x1b[31m\\n\\u2028\\ud800é"
    assert printable("a\nb", keep="\n") == "a\nb"

"""Repeated layers fold to one, nothing that differs is hidden, and unfolding says what the whole text says."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, Prune, RoSA
from sparsify.program import Program
from sparsify.program.repeats import OWN, Line, fold_lines, layer_of, numbers_text, replace_layer

PLAN = Plan([S2FT(structure="ffn", fraction=0.1), S2FT(structure="attention", fraction=0.3, producer_fraction=0.5)])


def numbers(text: str) -> list[int]:
    """`0…2, 5` → [0, 1, 2, 5]: the reverse of `numbers_text`."""
    found = []
    for part in text.split(", "):
        low, _, high = part.partition("…")
        found += range(int(low), int(high or low) + 1)
    return found


def unfold(text: str) -> list[str]:
    """The lines of a folded text with every layer written out."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("graph("))
    return unfold_sections(lines[:start]) + unfold_graph(lines[start:])


def unfold_sections(lines: list[str]) -> list[str]:
    out = []
    while lines:
        line, lines = lines[0], lines[1:]
        found = re.fullmatch(r"  (.*\{([\d…, ]+)\}.*)  × (\d+)", line)
        if found is None:
            out.append(line)
            continue
        indices, own = numbers(found[2]), {}
        assert len(indices) == int(found[3])
        while lines and lines[0].startswith("    "):
            where, _, values = lines[0].strip().partition(": ")
            own |= dict.fromkeys(numbers(where), values.split(" | "))
            lines = lines[1:]
        for index in indices:
            text = found[1].replace(f"{{{found[2]}}}", str(index))
            for value in own.get(index, []):
                text = text.replace(OWN, value, 1)
            assert OWN not in text
            out.append(f"  {text}")
    return out


def unfold_graph(lines: list[str]) -> list[str]:
    out = []
    while lines:
        line, lines = lines[0], lines[1:]
        found = re.match(r"    # × (\d+): (.*?)\.?\{([\d…, ]+)\}(.*)", line)
        if found is None:
            out.append(line)
            continue
        foot = next(i for i, other in enumerate(lines) if other.startswith(f"    # end of × {found[1]}: {found[2]}"))
        body, lines = lines[:foot], lines[foot + 1 :]
        carried = re.findall(r"%(\w+) of the one before for %(\w+)", found[4])
        for k in range(int(found[1])):
            copy = []
            for text in body:
                for stack, indices in re.findall(r"([\w.]*?)\.?\{([\d…, ]+)\}", text):
                    if stack == found[2]:
                        whole = f"{stack}.{{{indices}}}".lstrip(".")
                        text = text.replace(whole, whole.replace(f"{{{indices}}}", str(numbers(indices)[k])))
                for inside, outside in carried if k else ():
                    text = re.sub(rf"%{outside}\b", f"%{inside}", text)
                copy.append(text)
            out += unfold_graph(copy)
    return out


def plain(line: str) -> str:
    """A line without the numbers in names of values, and without places that the section of trained channels spells out."""
    return re.sub(
        r"trains (\d+ \w+) channels \[[^]]*\]", r"trains \1 channels", re.sub(r"(%[a-z_]+?)_?\d+\b", r"\1", line)
    )


def assert_unfolds(program: Program, folds: bool = True) -> None:
    text, whole = program.text(), program.text(fold=False)
    assert ("  × " in text or "# × " in text) == folds
    if not folds:
        assert text == whole
        return
    assert len(text) < len(whole)
    found, expected = [plain(line) for line in unfold(text)], [plain(line) for line in whole.split("\n")]
    start = next(i for i, line in enumerate(expected) if line.startswith("graph("))
    assert found[start:] == expected[start:]
    assert sorted(found) == sorted(expected)
    names = re.compile(r"@([\w.]+)")
    assert set(names.findall("\n".join(unfold(text)))) == set(names.findall(whole))


def deep(name: str, **sizes: Any) -> Program:
    family = tiny.BY_NAME[name]
    family = replace(family, sizes={**family.sizes, **sizes})
    model = zoo.build(family, family.implementations[-1])[0]
    args, kwargs = zoo.example(family, model)
    return sparsify.analyse(model, kwargs or args)


@pytest.mark.parametrize(
    ("name", "sizes", "heads"),
    [
        (
            "Llama",
            {"num_hidden_layers": 4},
            ["# × 4: model.layers.{0…3}, values named as in layer 0; each reads %add"],
        ),
        ("GPT-2", {"n_layer": 4}, ["# × 4: transformer.h.{0…3}"]),
        ("BERT", {"num_hidden_layers": 4}, ["# × 4: bert.encoder.layer.{0…3}"]),
        ("Mixtral", {"num_hidden_layers": 3}, ["# × 3: model.layers.{0…2}"]),
        ("Gemma2", {"num_hidden_layers": 8}, ["# × 4: model.layers.{0…7}, 2 layers each, values named as in layer 0"]),
        (
            "T5",
            {"num_layers": 4, "num_decoder_layers": 4},
            ["# × 3: encoder.block.{1…3}", "# × 3: decoder.block.{1…3}"],
        ),
    ],
)
def test_deep_families_fold_and_unfold(name: str, sizes: dict[str, Any], heads: list[str]) -> None:
    program = deep(name, **sizes)
    text = str(program)
    for head in heads:
        assert head in text
    assert_unfolds(program)


def test_two_layers_print_as_before() -> None:
    assert_unfolds(sparsify.analyse(tiny.llama()), folds=False)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        Plan([PaCA(match="*.q_proj", rank=3), LoRA(match="*.down_proj", rank=2)]),
        Plan([RoSA(match="*_proj", rank={"*.1.*": 3, "*": 2}, mask="random")]),
        Plan([Prune(match="*.layers.[01].*", method="magnitude"), Prune(method="magnitude", sparsity=0.25)]),
    ],
    ids=["S2FT", "PaCA and LoRA", "RoSA", "Prune"],
)
def test_compiled_programs_unfold(plan: Plan) -> None:
    host: Any = sparsify.compile(tiny.llama(num_hidden_layers=5), plan, progress=False)
    assert_unfolds(host.sparsify.program)


def test_chosen_units_are_listed_by_layer() -> None:
    host: Any = sparsify.compile(tiny.llama(num_hidden_layers=4), PLAN, progress=False)
    text = str(host.sparsify.program)
    choices = {c.structure: c for c in host.sparsify.program.choices}
    assert "  model.layers.{0…3}.mlp by rule 0 (random), 4 of 44 channels: ⟨…⟩  × 4\n" in text
    chosen = text[text.index("  model.layers.{0…3}.mlp by") :]
    for line in chosen.split("\n")[1:5]:
        where, _, ids = line.strip().partition(": ")
        for index in numbers(where):
            assert ids == ", ".join(map(str, choices[f"model.layers.{index}.mlp"].consumers))


def test_a_layer_of_another_rank_stands_for_itself() -> None:
    rule = LoRA(match="*.q_proj", rank={"*.layers.3.*": 5, "*": 2}, alpha=4)
    host: Any = sparsify.compile(tiny.llama(num_hidden_layers=7), Plan([rule]), progress=False)
    text = str(host.sparsify.program)
    assert "  @model.layers.{0…2, 4…6}.self_attn.q_proj.weight + 2·BA (rank 2)  × 6\n" in text
    assert "  @model.layers.3.self_attn.q_proj.weight + 0.8·BA (rank 5)\n" in text
    assert "    # × 3: model.layers.{0…2}, " in text
    assert "    # model.layers.3.input_layernorm\n" in text
    assert "    # × 3: model.layers.{4…6}, " in text


def test_a_layer_of_another_sparsity_is_named() -> None:
    plan = Plan(
        [Prune(match="*.layers.2.*", method="magnitude", sparsity=0.25), Prune(method="magnitude", sparsity=0.5)]
    )
    host: Any = sparsify.compile(tiny.llama(num_hidden_layers=4), plan, progress=False)
    text = str(host.sparsify.program)
    line = text[text.index("  @model.layers.{0…3}.mlp.up_proj.weight: ⟨…⟩") :].split("\n")
    assert any(re.match(r"    2: 25\.0% \| ", own) for own in line[1:5])
    assert sum(bool(re.match(r"    [013]: 50\.0% \| ", own)) for own in line[1:5]) == 3


def test_a_declined_layer_is_not_folded_away() -> None:
    from sparsify.program.structure import Declined

    program = sparsify.analyse(tiny.llama(num_hidden_layers=5))
    kept = tuple(s for s in program.structures if s.name != "model.layers.2.mlp")
    reason = "Its 44 channels must keep their order, because model.layers.2.mlp shows them."
    program = program.evolve("by hand", structures=kept, declined=(Declined("model.layers.2.mlp", "ffn", reason),))
    text = str(program)
    assert "  ffn model.layers.{0, 1, 3, 4}.mlp: 44 channels" in text
    assert f"  ffn model.layers.2.mlp: {reason}\n" in text
    assert_unfolds(program)


# --- property: random stacks ---


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(6, 8 if kind != "wide" else 10), nn.Linear(8 if kind != "wide" else 10, 6)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        h = self.up(x if self.kind != "side" else x + side)
        return x + self.down(h.tanh() if self.kind == "tanh" else h.relu())


class Stack(nn.Module):
    """Layers of kinds in any order; `skip` reads the input of a layer again behind the stack."""

    def __init__(self, kinds: list[str], skip: int, container: str) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer(kind) for kind in kinds)
        self.skip, self.container = skip, container
        if container:
            self.add_module(container, layers)
        else:
            for number, layer in enumerate(layers):
                self.add_module(str(number), layer)
        self.number, self.head = len(kinds), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        side, kept = x * 2, x
        for number in range(self.number):
            x = self.get_submodule(f"{self.container}.{number}" if self.container else str(number))(x, side)
            kept = x if number == self.skip else kept
        return self.head(x + kept)


KINDS = st.sampled_from(["plain", "tanh", "side", "wide"])
PATTERNS = st.one_of(
    st.lists(KINDS, min_size=1, max_size=7),
    st.tuples(KINDS, st.integers(3, 9)).map(lambda drawn: [drawn[0]] * drawn[1]),
    st.tuples(st.lists(KINDS, min_size=1, max_size=3), st.integers(2, 4), st.lists(KINDS, max_size=2)).map(
        lambda drawn: drawn[0] * drawn[1] + drawn[2]
    ),
)


@settings(max_examples=12)
@given(PATTERNS, st.integers(-1, 8), st.sampled_from(["layers", "a.b", ""]))
def test_random_stacks_unfold(kinds: list[str], skip: int, container: str) -> None:
    program = sparsify.analyse(Stack(kinds, skip, container.replace(".", "_")), (torch.randn(2, 6),))
    text = program.text()
    found, expected = (
        [plain(line) for line in unfold(text)],
        [plain(line) for line in program.text(fold=False).split("\n")],
    )
    start = next(i for i, line in enumerate(expected) if line.startswith("graph("))
    assert found[start:] == expected[start:]
    assert sorted(found) == sorted(expected)
    if len(kinds) >= 4 and len(set(kinds)) == 1:
        assert "# × " in text
    repeats = any(
        kinds[at : at + 3 * period] == 3 * kinds[at : at + period]
        for period in range(1, len(kinds) // 3 + 1)
        for at in range(len(kinds) - 3 * period + 1)
    )
    assert repeats or "# × " not in text


# --- pieces ---


def test_layers_of_names() -> None:
    assert layer_of("model.layers.3.mlp") == ("model.layers", 3)
    assert layer_of("model.layers.3.experts.11.up", 1) == ("model.layers.3.experts", 11)
    assert layer_of("0.weight") == ("", 0)
    assert layer_of("model.norm") is None
    assert layer_of("model.layers.²") is None
    assert numbers_text([5, 0, 1, 2, 7, 8]) == "0…2, 5, 7, 8"
    assert replace_layer("@a.1.w, b.a.1.w, a.10, a.1", "a", 1, "{}") == "@a.{}.w, b.a.1.w, a.10, a.{}"
    assert replace_layer("@1.w [1, 2] 1.0", "", 1, "{}") == "@{}.w [1, 2] 1.0"


def test_lines_fold_when_only_their_own_text_differs() -> None:
    def line(i: int, shared: str, own: str) -> Line:
        return Line.about(f"h.{i}.mlp", f"h.{i}.mlp {shared} ", own, "!")

    lines = [line(0, "a", "1"), line(1, "a", "2"), line(2, "b", "1"), "plain", line(3, "a", "1"), line(4, "b", "1")]
    assert fold_lines(lines) == [
        "h.{0, 1, 3}.mlp a ⟨…⟩!  × 3",
        "  0, 3: 1",
        "  1: 2",
        *map(str, [lines[2], "plain", lines[5]]),
    ]
    assert fold_lines(lines[:2]) == list(map(str, lines[:2]))
    same = [line(i, "a", "1") for i in range(3)]
    assert fold_lines(same) == ["h.{0…2}.mlp a 1!  × 3"]
    twice = [line(i, "a", str(n)) for i in range(3) for n in (1, 2)]
    assert fold_lines(twice) == ["h.{0…2}.mlp a 1!  × 3", "h.{0…2}.mlp a 2!  × 3"]


def test_a_name_cannot_break_the_line() -> None:
    line = Line.about("h.0\n.x", "h.0\n.x: ", "1\n2")
    assert "\n" not in line
    assert str(line) == "".join(line.pieces)

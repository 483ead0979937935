"""The report: parameters of packed and pruned models, and units in the words that the program's text and the picture use."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from torch import nn

import sparsify
from sparsify import S2FT, CpuOptions, LoRA, PaCA, Plan, Prune, Quantize
from sparsify.program.structure import Site, Structure
from sparsify.show.report import backward_bytes, human


def dense_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "family",
    ["Llama", "GPT-2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("T5 (gated)", "BERT"))],
)
@pytest.mark.parametrize("quantize", [[], [Quantize(format="int8")]], ids=["values", "int8"])
def test_a_packed_model_has_the_parameters_of_the_dense_one(family: str, quantize: list[Any]) -> None:
    model = tiny.build(family)
    plan = Plan([Prune(method="magnitude", sparsity=0.75), *quantize], target="cpu")
    host: Any = sparsify.compile(model, plan, progress=False, cpu=CpuOptions(mode="small"))
    report = host.sparsify.report
    assert host.sparsify.cpu.lowered, "nothing was packed, so nothing is tested"
    assert report.total == dense_count(model)
    assert (report.trainable, report.pruned) == (0, 0)
    assert host.sparsify.count_parameters() == (0, dense_count(model))
    assert f"trainable  0 of {dense_count(model):,} parameters (0.0000 %)\n" in f"{report}\n"


@pytest.mark.parametrize(
    "rule",
    [
        S2FT(structure="ffn", units=2),
        pytest.param(PaCA(match="*.down_proj", rank=2), marks=pytest.mark.slow),
        pytest.param(LoRA(match="*.q_proj", rank=2), marks=pytest.mark.slow),
    ],
)
def test_a_quantised_base_counts_in_full(rule: Any) -> None:
    model = tiny.llama()
    host: Any = tiny.lower(
        model, rule, Quantize(match="*.up_proj", format="int8"), Quantize(match="*.down_proj", format="nf4")
    )
    plain: Any = tiny.lower(tiny.llama(), rule)
    added = sum(p.numel() for n, p in host.named_parameters() if "lora_" in n)
    assert host.sparsify.report.total == dense_count(model) + added == plain.sparsify.report.total
    assert host.sparsify.report.trainable == plain.sparsify.report.trainable == host.sparsify.count_parameters()[0]


@pytest.mark.parametrize("sparsity", [pytest.param(0.5, marks=pytest.mark.slow), 0.75])
def test_a_student_trains_its_survivors(sparsity: float) -> None:
    model = tiny.llama()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    host: Any = tiny.lower(model, Prune(method="magnitude", sparsity=sparsity))
    report = host.sparsify.report
    zeros = sum(int((~mask).sum()) for mask in host.sparsify.program.masks.values())
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    assert zeros > 0
    assert (report.trainable, report.pruned, report.total) == (trained - zeros, zeros, dense_count(model))
    share = 100 * (trained - zeros) / dense_count(model)
    assert (
        f"trainable  {trained - zeros:,} of {dense_count(model):,} parameters ({share:.4f} %): the survivors; {zeros:,} pruned entries "
        "stay zero" in str(report)
    )
    assert "(100.0000 %)" not in str(report)
    for name, parameter in host.named_parameters():
        if name.endswith("down_proj.weight"):
            parameter.requires_grad_(False)  # what does not train is no entry that stays zero while it does
    frozen = sum(int((~m).sum()) for n, m in host.sparsify.program.masks.items() if n.endswith("down_proj.weight"))
    assert host.sparsify.report.pruned == zeros - frozen


def test_a_slice_of_a_pruned_weight_trains_its_survivors() -> None:
    host: Any = tiny.lower(
        tiny.llama(), Prune(match="*.down_proj", method="magnitude", sparsity=0.5), S2FT(structure="ffn", units=4)
    )
    report, found = host.sparsify.report, 0
    for module in host.modules():
        if "weight_slice" in module._parameters:
            found += int((module.weight_slice == 0).sum())
    assert found > 0
    assert report.pruned == found
    assert report.trainable == sum(p.numel() for p in tiny.trainable(host)) - found


def test_without_a_mask_nothing_is_said_of_survivors() -> None:
    assert "survivors" not in str(tiny.lower(tiny.llama(), S2FT(units=2)).sparsify.report)


# --- units ---


def test_units_have_one_word_everywhere() -> None:
    host: Any = tiny.lower(
        tiny.llama(), S2FT(structure="attention", units=1, producer_fraction=0.5), S2FT(structure="ffn", units=4)
    )
    program, report = host.sparsify.program, str(host.sparsify.report)
    attention = next(s for s in program.structures if s.kind == "attention")
    groups, heads = attention.units, attention.inner.units
    assert (groups, heads) == (2, 3)
    assert f"model.layers.0.self_attn: 1 of {groups * heads} heads, 1 of {groups} KV groups (" in report
    assert "model.layers.0.mlp: 4 of 44 channels (" in report
    assert f"attention model.layers.0.self_attn: {groups} KV groups of {heads} heads | " in str(program)
    assert f"1 of {groups * heads} heads: " in str(program)
    assert f"1 of {groups} KV groups: " in str(program)
    assert "4 of 44 channels: " in str(program)
    picture = program.svg()
    assert f"1 of {groups * heads} heads of O, 1 of {groups} KV groups of V" in picture
    assert "4 of 44 channels of Down" in picture
    assert f"{groups} KV groups of {heads} heads" in str(attention)
    for text in (report, str(program), picture, str(attention)):
        lines = [
            line for line in text.split("\n") if "select: " not in line
        ]  # the pass counts heads and channels together
        assert " units" not in "\n".join(lines)


def test_a_deep_model_is_one_layer_and_what_differs() -> None:
    rules = S2FT(structure="attention", units=2), LoRA(match="*.down_proj", rank={"*.2.*": 3, "*": 2}, alpha=4)
    report = tiny.lower(tiny.llama(num_hidden_layers=6), *rules).sparsify.report
    text, whole = str(report), report.text(fold=False)
    assert (
        "chosen     model.layers.{0…5}.self_attn: 2 of 6 heads (random, rule 0) → model.layers.{0…5}.self_attn.o_proj"
        in text
    )
    assert "o_proj.weight[columns ⟨…⟩]; in place: heads are blocks as they lie" in text
    assert "           model.layers.{0, 1, 3…5}.mlp.down_proj.weight: rank 2, scale 2 (rule 1)  × 5\n" in text
    assert "           model.layers.2.mlp.down_proj.weight: rank 3, scale 1.33333 (rule 1)\n" in text
    for index, line in enumerate(report.chosen[:6]):
        spans = line.partition("[columns ")[2].partition("]")[0]
        (own,) = [t for t in text.split("\n") if t.startswith(" " * 13) and t.endswith(f": {spans}")]
        assert str(index) in own or "…" in own
    assert all(line in whole for line in report.chosen)
    assert "×" not in whole.partition("\n")[2]
    assert len(report.chosen) == 12


@pytest.mark.parametrize(
    ("kind", "units", "inner", "size", "chosen"),
    [
        ("attention", 4, 0, "4 heads", ("1 of 4 heads", "2 of 4 heads")),
        ("attention", 1, 0, "1 head", ("1 of 1 head", "2 of 1 head")),
        ("attention", 3, 3, "3 KV groups of 3 heads", ("1 of 9 heads", "2 of 3 KV groups")),
        ("attention", 1, 6, "1 KV group of 6 heads", ("1 of 6 heads", "2 of 1 KV group")),
        ("attention", 2, 1, "2 KV groups of 1 head", ("1 of 2 heads", "2 of 2 KV groups")),
        ("ffn", 44, 0, "44 channels", ("1 of 44 channels", "2 of 44 channels")),
        ("other", 5, 0, "5 units", ("1 of 5 units", "2 of 5 units")),
    ],
)
def test_words_for_units(kind: Any, units: int, inner: int, size: str, chosen: tuple[str, str]) -> None:
    site = (Site("w", 1, 1),)
    structure = Structure("s", kind, units, site, Structure("s", kind, inner, site) if inner else None)
    assert structure.size_text() == size
    assert structure.chosen_text(1, 2) == chosen
    assert structure.chosen_text(0, 0) == ("", "")


# --- kernels in the program's text ---

PLANS: dict[str, Plan] = {
    "slices": Plan([S2FT(structure="ffn", units=2)]),
    "scattered": Plan([PaCA(match="*.q_proj", rank=2)]),
    "low rank": Plan([LoRA(match="*.q_proj", rank=2)]),
    "masks": Plan([Prune(method="magnitude")]),
    "quantised": Plan([Quantize(match="*.up_proj", format="int8")]),
    "cpu": Plan([Prune(method="magnitude")], target="cpu"),
    "cpu int8": Plan([Prune(method="magnitude"), Quantize(format="int8")], target="cpu"),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_lowered_operator_says_its_kernel(name: str) -> None:
    options = {"cpu": CpuOptions(mode="small")} if PLANS[name].target == "cpu" else {}
    host: Any = sparsify.compile(tiny.llama(), PLANS[name], progress=False, **options)
    program = host.sparsify.program
    lowered = [node for node in program.graph.nodes if node.meta.get("kernel")]
    assert lowered
    lines = str(program).split("\n")
    for node in lowered:
        (line,) = [line for line in lines if f" %{node.name}: " in line]
        assert line.endswith(f"  # {node.meta['kernel']}")
    ours = [line for line in lines if line.startswith("  »")]
    assert len(ours) == len(lowered)


def test_the_first_line_says_it_all() -> None:
    """Share, bytes at 8 × 1024 tokens (of those on the example, which has another number of them), the adapter as its file holds it."""
    model: Any = tiny.llama()
    host: Any = tiny.lower(model, S2FT(structure="ffn", units=2))
    report = host.sparsify.report
    read = 0  # q, k and v read one input, up and gate one
    for layer in model.model.layers:
        read += layer.self_attn.q_proj.in_features + layer.self_attn.o_proj.in_features
        read += layer.mlp.up_proj.in_features + layer.mlp.down_proj.in_features
    kept = sum(2 for _ in model.model.layers)
    head = model.lm_head.in_features
    less = 8 * 1024 * 4 * (read + head - kept)
    numbers = sum(p.numel() for p in host.parameters() if p.requires_grad)
    adapter = 4 * numbers + 8 * kept
    share = 100 * numbers / dense_count(model)
    expected = f"trains {share:.3g} %, keeps {human(less)} less for the backward than full fine-tuning at 8 × 1024 tokens, adapter {human(adapter)}"
    assert report.headline == expected
    assert str(report).splitlines()[0] == f"sparsify report: LlamaForCausalLM: {expected}"


def test_the_first_line_of_other_models() -> None:
    vision: Any = tiny.lower(tiny.build("ViT"), S2FT(structure="ffn", units=2))
    assert "on the captured example, adapter" in vision.sparsify.report.headline
    conv1d: Any = tiny.lower(
        tiny.build("GPT-2"), S2FT(structure="ffn", units=2)
    )  # whose weights are turned in the graph
    assert "less for the backward than full fine-tuning at 8 × 1024 tokens" in conv1d.sparsify.report.headline
    pruned: Any = tiny.lower(tiny.llama(), Prune(method="magnitude", sparsity=0.5))
    assert "adapter" not in pruned.sparsify.report.headline


def test_an_input_that_several_parts_keep_whole_counts_once() -> None:
    """q, k and v read one input, gate and up another; each low-rank part needs all of it."""
    model: Any = tiny.llama()
    one, three = (
        backward_bytes(tiny.lower(model, LoRA(rank=2, match=match)).sparsify.program)[0]
        for match in (["q_proj"], ["q_proj", "k_proj", "v_proj"])
    )
    assert one == three > 0
    assert backward_bytes(tiny.lower(model, LoRA(rank=2, match=["q_proj", "up_proj"])).sparsify.program)[0] > one

"""Detection over the zoo: the right number of structures in every family, each of them exact and complete."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import zoo

from sparsify.passes.detect.find_structures import Detection, find_structures
from sparsify.program.structure import Structure
from sparsify.testing import check_structure, perturbed

#: families whose attention is looked for in both forms; the others have one of these layouts, and one form in the default run
BOTH = (
    "Llama",
    "Phi-3",
    "GPT-2",
    "GPT-NeoX",
    "Falcon (multi-query)",
    "Falcon (grouped)",
    "T5",
    "BART",
    "BERT",
    "ViT",
    "CLIP",
)


def cases() -> list[Any]:
    found: list[Any] = []
    for family in zoo.FAMILIES:
        for form in family.implementations if family.named else family.implementations[:1]:
            second = family.named and family.name not in BOTH and form != family.implementations[-1]
            marks = [pytest.mark.slow] if second else []
            found.append(pytest.param(family, form, id=f"{family.name}-{form}", marks=marks))
    return found


BY_NAME = {family.name: family for family in zoo.FAMILIES}


def detect(name: str, implementation: str | None = None) -> Detection:
    family = BY_NAME[name]
    if not zoo.available(family):
        pytest.skip(f"this transformers has no {family.model}")
    return detected(name, implementation or family.implementations[-1])


@functools.cache
def detected(name: str, implementation: str) -> Detection:
    return find_structures(*zoo.lift(*zoo.build(BY_NAME[name], implementation)))


def of_kind(detection: Detection, kind: str) -> list[Structure]:
    return [s for s in detection.structures if s.kind == kind]


def text(structure: Structure) -> str:
    return str(structure)


@pytest.mark.parametrize(("family", "implementation"), cases())
def test_family(family: zoo.Family, implementation: str) -> None:
    if not zoo.available(family):
        pytest.skip(f"this transformers has no {family.model}")
    model, example = zoo.build(family, implementation)
    detection = detect(family.name, implementation)
    controlled: set[str] = set()
    if (
        family.named and implementation != family.implementations[-1]
    ):  # the same function: its controls run in the other case
        other = detect(family.name)
        controlled = {text(s) for s in (*other.structures, *other.others)}
    refused = [d.kind for d in detection.declined]
    assert len(of_kind(detection, "ffn")) == family.ffn
    assert len(of_kind(detection, "attention")) == family.attention
    assert refused.count("ffn") == family.refused_ffn
    assert refused.count("attention") == family.refused_attention
    names = [s.name for s in (*detection.structures, *detection.declined, *detection.others)]
    assert len(set(names)) == len(names)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    twin = perturbed(model, example)
    for structure in (*detection.structures, *detection.others):
        assert all(site.param in parameters for site in structure.sites)
        if structure.kind == "ffn":
            assert structure.with_role("up")
            assert structure.with_role("down")
        elif structure.kind == "attention":
            assert all(structure.with_role(role) for role in ("q", "k", "v", "o"))
        if text(structure) not in controlled:
            check_structure(twin, example, structure, prepared=True)


def test_grouped_query_attention_moves_groups_and_the_heads_inside() -> None:
    attention = of_kind(detect("Llama"), "attention")[0]
    assert text(attention) == (
        "attention model.layers.0.self_attn: 2 KV groups of 3 heads\n"
        "  model.layers.0.self_attn.q_proj.weight[axis 0, block 24] q\n"
        "  model.layers.0.self_attn.k_proj.weight[axis 0, block 8] k\n"
        "  model.layers.0.self_attn.v_proj.weight[axis 0, block 8] v\n"
        "  model.layers.0.self_attn.o_proj.weight[axis 1, block 24] o\n"
        "  attention model.layers.0.self_attn.heads: 3 heads\n"
        "    model.layers.0.self_attn.q_proj.weight[axis 0, block 8, outer 2@24] q\n"
        "    model.layers.0.self_attn.o_proj.weight[axis 1, block 8, outer 2@24] o"
    )


def test_gated_network_names_its_gate() -> None:
    assert text(of_kind(detect("Llama"), "ffn")[1]) == (
        "ffn model.layers.1.mlp: 44 channels\n"
        "  model.layers.1.mlp.gate_proj.weight[axis 0, block 1] gate\n"
        "  model.layers.1.mlp.up_proj.weight[axis 0, block 1] up\n"
        "  model.layers.1.mlp.down_proj.weight[axis 1, block 1] down"
    )


def test_biases_move_along() -> None:
    attention = of_kind(detect("Qwen2"), "attention")[0]
    assert {s.param.split("self_attn.")[1] for s in attention.with_role("vector")} == {
        "q_proj.bias",
        "k_proj.bias",
        "v_proj.bias",
    }
    assert attention.inner is not None
    assert [s.param.split("self_attn.")[1] for s in attention.inner.with_role("vector")] == ["q_proj.bias"]


def test_packed_projections_are_several_sites_of_one_parameter() -> None:
    detection = detect("Phi-3")
    attention, network = of_kind(detection, "attention")[0], of_kind(detection, "ffn")[0]
    packed = [(s.role, s.block, s.offset) for s in attention.sites if "qkv" in s.param]
    assert packed == [("q", 24, 0), ("k", 8, 48), ("v", 8, 64)]
    assert [(s.role, s.offset) for s in network.sites if "gate_up" in s.param] == [("gate", 0), ("up", 44)]


def test_conv1d_has_its_axes_swapped() -> None:
    detection = detect("GPT-2")
    attention, network = of_kind(detection, "attention")[0], of_kind(detection, "ffn")[0]
    assert [(s.role, s.axis, s.block, s.offset) for s in attention.producers] == [
        ("q", 1, 12, 0),
        ("k", 1, 12, 36),
        ("v", 1, 12, 72),
    ]
    assert [(s.role, s.axis) for s in (*attention.consumers, *network.consumers)] == [("o", 0), ("down", 0)]


def test_interleaved_projection_steps_over_whole_heads() -> None:
    attention = of_kind(detect("GPT-NeoX"), "attention")[0]
    assert [(s.role, s.block, s.offset, s.stride) for s in attention.producers] == [
        ("q", 12, 0, 36),
        ("k", 12, 12, 36),
        ("v", 12, 24, 36),
    ]


def test_interleaved_groups() -> None:
    attention = of_kind(detect("Falcon (grouped)"), "attention")[0]
    assert (attention.units, attention.inner and attention.inner.units) == (2, 3)
    assert [(s.role, s.block, s.offset, s.stride) for s in attention.producers] == [
        ("q", 24, 0, 40),
        ("k", 8, 24, 40),
        ("v", 8, 32, 40),
    ]


@pytest.mark.parametrize("name", ["Falcon (multi-query)", "GPT-BigCode"])
def test_multi_query_attention_is_one_group(name: str) -> None:
    attention = of_kind(detect(name), "attention")[0]
    assert attention.units == 1
    assert [(s.role, s.block, s.offset) for s in attention.producers] == [("q", 36, 0), ("k", 12, 36), ("v", 12, 48)]
    assert attention.inner is not None
    assert attention.inner.units == 3
    assert {s.role for s in attention.inner.sites} >= {"q", "o"}
    assert all(s.outer[0][0] == 1 for s in attention.inner.sites)


def test_packed_experts_move_their_channels_jointly() -> None:
    network = of_kind(detect("Mixtral"), "ffn")[0]
    assert [(s.param.split("experts.")[1], s.axis, s.offset, s.role) for s in network.sites] == [
        ("gate_up_proj", 1, 0, "gate"),
        ("gate_up_proj", 1, 44, "up"),
        ("down_proj", 2, 0, "down"),
    ]


def test_alternating_gate_and_up() -> None:
    detection = detect("GPT-OSS")
    network = of_kind(detection, "ffn")[0]
    packed = [(s.role, s.axis, s.offset, s.stride) for s in network.sites if s.param.endswith("gate_up_proj")]
    assert packed == [("gate", 2, 0, 2), ("up", 2, 1, 2)]
    sinks = [s for s in of_kind(detection, "attention")[0].sites if s.param.endswith("sinks")]
    assert [(s.role, s.block) for s in sinks] == [("vector", 3)]


def test_shared_relative_bias_ties_the_layers_together() -> None:
    detection = detect("T5")
    shared = [s for s in of_kind(detection, "attention") if any("relative_attention_bias" in x.param for x in s.sites)]
    assert [s.name for s in shared] == ["encoder.block", "decoder.block"]
    assert all(len(s.with_role("o")) == zoo.LAYERS for s in shared)
    table = next(x for x in shared[0].sites if "relative_attention_bias" in x.param)
    assert (table.axis, table.block, table.role) == (1, 1, "vector")
    crossed = [s for s in of_kind(detection, "attention") if s not in shared]
    assert [s.name for s in crossed] == [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(zoo.LAYERS)]


def test_latent_attention_shares_one_key_among_heads() -> None:
    attention = of_kind(detect("DeepSeek-V3"), "attention")[0]
    roles = {(s.param.split("self_attn.")[1], s.role, s.block, s.offset, s.stride) for s in attention.sites}
    assert roles == {
        ("q_b_proj.weight", "q", 10, 0, 0),
        ("kv_b_proj.weight", "k", 6, 0, 16),
        ("kv_b_proj.weight", "v", 10, 6, 16),
        ("o_proj.weight", "o", 10, 0, 0),
    }


def test_shared_layers_are_one_structure() -> None:
    detection = detect("ALBERT")
    assert len(detection.structures) == 2
    assert all(len(set(s.params())) == len(list(s.params())) for s in detection.structures)


@pytest.mark.parametrize("name", ["Bloom", "MPT"])
def test_position_slopes_refuse_heads_and_keep_networks(name: str) -> None:
    detection = detect(name)
    assert len(of_kind(detection, "ffn")) == zoo.LAYERS
    for declined in detection.declined:
        assert declined.kind == "attention"
        assert "arange" in declined.reason
        assert declined.reason.endswith(".")


def test_gather_refuses_heads() -> None:
    for declined in detect("DeBERTa-v2").declined:
        assert "aten::gather" in declined.reason
        assert {site.role for site in declined.sites} >= {"q", "o"}
        assert declined.name.startswith("deberta.encoder.layer.")


def test_reads_structures_in_the_order_of_the_model() -> None:
    assert [s.name for s in detect("BERT").structures] == [
        "bert.encoder.layer.0.attention",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1.attention",
        "bert.encoder.layer.1",
    ]


def test_time_grows_with_the_graph_and_not_with_its_square() -> None:
    """Eight times the layers in about eight times the steps: counted, not timed."""
    import sys

    import transformers

    def steps(layers: int) -> int:
        family = BY_NAME["Llama"]
        config = transformers.LlamaConfig(**{**family.sizes, "num_hidden_layers": layers})
        model = transformers.LlamaForCausalLM(config).eval()
        graph, named = zoo.lift(model, zoo.example(family, model))
        find_structures(graph, named)
        count = 0

        def tick(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(tick)
        try:
            assert len(find_structures(graph, named).structures) == 2 * layers
        finally:
            sys.setprofile(None)
        return count

    assert steps(16) < 9 * steps(2)

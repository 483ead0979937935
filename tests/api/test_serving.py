"""`sparsify.serve`: every row of a batch computes with its own adapter, over a base that is never written to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from serving_bench import BASE, GREEDY, PLANS, Bench, shared, write_random
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, AdapterError, LoRA, Plan, Prune, Quantize, SparsifyError


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return shared(tmp_path_factory)


def test_every_row_computes_with_its_own_adapter(bench):
    host = bench.host()
    before = tiny.snapshot(bench.model)
    names = ["s2ft", BASE, "rosa", "lora", "mixed", "paca", "s2ft"]
    batch = {"input_ids": tiny.tokens(len(names), 9)}
    with torch.no_grad():
        bench.check_rows(host(**batch, adapter_names=names).logits, names, batch)
        assert torch.equal(host(**batch).logits, bench.model(**batch).logits)
        assert torch.equal(host(**batch, adapter_names=BASE).logits, bench.model(**batch).logits)
        bench.check_rows(host(**batch, adapter_names="rosa").logits, ["rosa"] * len(names), batch)
    tiny.assert_same(tiny.snapshot(bench.model), before)
    assert isinstance(host, type(bench.model))
    assert (
        host.model.layers[0].mlp.down_proj.weight.data_ptr()
        == bench.model.model.layers[0].mlp.down_proj.weight.data_ptr()
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_with_padding_gives_each_prompt_its_adapters_tokens(bench, side):
    host = bench.host()
    names = ["lora", BASE, "s2ft", "rosa", "paca"]
    lengths = [5, 8, 3, 8, 6]
    ids, mask = torch.zeros(5, 8, dtype=torch.long), torch.zeros(5, 8, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(8 - length, 8) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = tiny.tokens(1, length, seed=row)[0], 1
    found = host.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **GREEDY)
    for row, name in enumerate(names):
        own = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        assert torch.equal(found[row], bench.alone[name].generate(**own, **GREEDY)[0]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        pytest.param(
            {"num_beams": 3, "num_return_sequences": 3, "cache_implementation": "static"}, marks=pytest.mark.slow
        ),
    ],
)
def test_beams_sequences_and_caches(bench, settings):
    host = bench.host()
    names = ["s2ft", "lora", BASE]
    ids = tiny.tokens(3, 5)
    found = host.generate(input_ids=ids, adapter_names=names, **GREEDY, **settings)
    each = settings.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        wanted = bench.alone[name].generate(input_ids=ids[row : row + 1], **GREEDY, **settings)
        assert torch.equal(found[row * each : (row + 1) * each], wanted), name


def test_sampled_sequences_follow_their_prompts_adapter(bench):
    host = bench.host()
    ids = tiny.tokens(2, 5)
    torch.manual_seed(3)
    sampling = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
    found = host.generate(input_ids=ids, adapter_names=["rosa", "rosa"], **sampling)
    torch.manual_seed(3)
    assert torch.equal(found, bench.alone["rosa"].generate(input_ids=ids, **sampling))


def test_rows_that_get_lost_are_noticed(bench):
    """Half of four rows has as many tokens as a multiple of four: the wrong adapter for each of them, if nobody looked."""
    host = bench.host()
    ids = torch.arange(3, 27).view(4, 6)
    with torch.no_grad(), host.sparsify.using(["lora", "s2ft", BASE, "rosa"]):
        for rows in (1, 2, 3, 6):
            with pytest.raises(
                AdapterError, match=f"gets {rows} rows, and adapters are named for 4: rows were dropped"
            ):
                host(input_ids=ids.repeat(2, 1)[:rows])
        host(input_ids=ids.repeat_interleave(2, 0))  # beams
    with torch.no_grad(), host.sparsify.using("lora"):  # one for all: whatever becomes of the rows
        found = host(input_ids=ids[:3]).logits
    bench.check_rows(found, ["lora"] * 3, {"input_ids": ids[:3]})


def test_tokens_of_one_row_are_told_from_rows_that_were_joined(bench):
    host = bench.host()
    ids = torch.arange(3, 9)[None]
    with host.sparsify.lease(["lora", "rosa"]) as lease, torch.no_grad():
        with host.sparsify.using_slots([lease.slots[0]] * 6, lease):
            packed = host(input_ids=ids).logits
        bench.check_rows(packed, ["lora"], {"input_ids": ids})
        with host.sparsify.using(["lora", BASE, "rosa", BASE, BASE, BASE]), pytest.raises(AdapterError, match="1 rows"):
            host(input_ids=ids)


def test_names_that_are_wrong_are_refused_by_what_is_wrong(bench):
    host = bench.host()
    batch = {"input_ids": tiny.tokens(2, 4)}
    with pytest.raises(AdapterError, match="no adapter is called 'lara'; did you mean 'lora'"):
        host(**batch, adapter_names=["lara", BASE])
    with pytest.raises(AdapterError, match="3 names for 2 rows of the batch"):
        host.generate(**batch, adapter_names=["lora"] * 3, **GREEDY)
    with pytest.raises(AdapterError, match="7 is no name; write '__base__'"):
        host(**batch, adapter_names=["lora", 7])
    with pytest.raises(AdapterError, match="expected a list with one name a row"):
        host(**batch, adapter_names=3)
    with pytest.raises(AdapterError, match="'__base__' is the name of the base"):
        host.sparsify.add(BASE, bench.folder / "lora")
    with pytest.raises(AdapterError, match="'lora' is taken"):
        host.sparsify.add("lora", bench.folder / "lora")
    with pytest.raises(AdapterError, match="is no folder on this machine"):
        host.sparsify.add("gone", bench.folder / "gone")
    with pytest.raises(SparsifyError, match="is a serving host already"):
        sparsify.serve(host)
    for wrong, words in (({"slots": 0}, "from 1 to 4096"), ({"timeout": -1}, "expected seconds"), ({"dtype": torch.int8}, "expected one of"),
                         ({"budget": "much"}, "expected bytes"), ({"folder": "/nowhere"}, "is no folder")):  # fmt: skip
        with pytest.raises(SparsifyError, match=words):
            bench.host(**wrong)
    assert sparsify.serve(bench.model, [bench.folder / "lora"], budget="1MiB").sparsify.names == ["lora"]
    assert host.sparsify.status()["held"] == 0


def test_what_is_no_addend_refuses_that_adapter_alone(bench, tmp_path):
    host = bench.host()
    trained = tiny.lower(copy.deepcopy(bench.model), LoRA(4, match="*q_proj"), train=["*norm*"])
    tiny.disturb(trained)
    trained.sparsify.save_adapter(tmp_path / "full")
    host.sparsify.add("full", tmp_path / "full")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    host.sparsify.add("broken", tmp_path / "broken")
    other = tiny.lower(tiny.build("Llama", seed=3), LoRA(4))
    tiny.disturb(other)
    other.sparsify.save_adapter(tmp_path / "other")
    host.sparsify.add("other", tmp_path / "other")
    batch = {"input_ids": tiny.tokens(2, 4)}
    with pytest.raises(AdapterError, match="norm.weight trained in full, which is no addend per token"):
        host(**batch, adapter_names=["full", "lora"])
    with pytest.raises(AdapterError, match="broken"):
        host(**batch, adapter_names=["lora", "broken"])
    with pytest.raises(AdapterError, match="is not the base that the adapter was trained on"):
        host(**batch, adapter_names=["lora", "other"])
    with torch.no_grad():
        bench.check_rows(host(**batch, adapter_names=["lora", BASE]).logits, ["lora", BASE], batch)
    loose = bench.host(strict=False)
    loose.sparsify.add("other", tmp_path / "other")
    loose(**batch, adapter_names=["other", "other"])


def test_adapters_come_and_go_and_one_graph_serves_every_layout(bench):
    host = bench.host(slots=2)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    host.compile(backend=backend, fullgraph=True, dynamic=False)
    batch = {"input_ids": tiny.tokens(3, 6), "use_cache": False}
    with torch.no_grad():
        for names in (
            ["lora", BASE, "lora"], ["s2ft", "rosa", "rosa"], [BASE] * 3, ["mixed"] * 3, ["paca", "lora", BASE],
        ):  # fmt: skip
            rows = {"input_ids": batch["input_ids"]}
            bench.check_rows(host(**batch, adapter_names=names).logits, names, rows)
    assert len(graphs) == 1
    assert host.sparsify.counts.evictions >= 3


@pytest.mark.slow  # the graph is the one of the test before
def test_a_graph_around_the_host_follows_the_names_outside(bench):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    batch = {"input_ids": tiny.tokens(3, 6), "use_cache": False}
    other = bench.host()
    compiled = torch.compile(other, backend=backend, fullgraph=True, dynamic=False)
    for names in (["lora", BASE, "lora"], ["s2ft", "rosa", "rosa"]):
        with torch.no_grad(), other.sparsify.using(names):
            bench.check_rows(compiled(**batch).logits, names, {"input_ids": batch["input_ids"]})
    assert len(graphs) == 1


def test_nothing_is_loaded_into_tensors_that_are_the_models(bench):
    host = bench.host()
    assert list(host.state_dict()) == list(bench.model.state_dict())
    with pytest.raises(sparsify.StateError, match="load the state into that model, then serve it"):
        host.load_state_dict(host.state_dict())
    with pytest.raises(sparsify.StateError, match="shares its tensors"):
        host.lm_head.load_state_dict(host.lm_head.state_dict())
    host.half()
    assert bench.model.lm_head.weight.dtype == torch.float32


def test_a_trained_bias_is_an_addend(tmp_path):
    bench = Bench(tmp_path, "GPT-2", {"lora": [LoRA(2, match="*c_attn")]})
    trained = tiny.lower(copy.deepcopy(bench.model), LoRA(2, match="*c_attn"), train=["*.c_fc.bias", "*.c_proj.bias"])
    tiny.disturb(trained)
    trained.sparsify.save_adapter(tmp_path / "bias")
    bench.alone["bias"] = trained.sparsify.plain().eval()
    host = bench.host()
    names, batch = ["bias", BASE, "lora"], {"input_ids": tiny.tokens(3, 5)}
    with torch.no_grad():
        bench.check_rows(host(**batch, adapter_names=names).logits, names, batch)
    assert any(kind == "bias" for _, kind in host.sparsify.store.entries["bias"].image.entries)


# the others repeat what GPT-2 and T5 say of packed projections
@pytest.mark.parametrize(
    "family",
    [
        "GPT-2",
        "T5 (gated)",
        *(pytest.param(family, marks=pytest.mark.slow) for family in ("Phi-3", "GPT-NeoX", "Qwen2")),
    ],
)
def test_packed_projections_conv1d_and_encoder_decoders(family, tmp_path):
    model: Any = tiny.build(family)
    kinds = ("column", "row", "sparse", "lora")
    alone: dict[str, Any] = {kind: write_random(model, tmp_path / kind, kind, seed) for seed, kind in enumerate(kinds)}
    host: Any = sparsify.serve(model, {kind: tmp_path / kind for kind in kinds}, budget="4MiB")
    alone[BASE] = model
    names = ["sparse", BASE, "column", "row", "lora"]
    ids = tiny.tokens(5, 6)
    found = host.generate(input_ids=ids, adapter_names=names, num_beams=2, **GREEDY)
    for row, name in enumerate(names):
        wanted = alone[name].generate(input_ids=ids[row : row + 1], num_beams=2, **GREEDY)
        assert torch.equal(found[row], wanted[0]), name
        if name != BASE:
            own = tiny.inputs_of(model, family)
            with torch.no_grad():
                assert float((alone[name](**own).logits - model(**own).logits).abs().max()) > 1e-3


def test_a_plan_host_is_refused_with_what_to_pass_instead(bench):
    trained = sparsify.compile(bench.model, Plan([LoRA(2)]))
    with pytest.raises(SparsifyError, match=r"compiled to train, .* pass the model that went into sparsify.compile"):
        sparsify.serve(trained)


def check_over(base: nn.Module, served: nn.Module, folder: Path, rules: Any = (), **settings: Any) -> Any:
    """Rows of adapters over `base` against a host over `served`: with `rules`, trained beside them, else random ones."""
    alone: dict[str, Any] = {}
    if rules:
        for name in ("rosa", "lora"):
            alone[name] = trained = tiny.lower(copy.deepcopy(base), *PLANS[name], *rules)
            tiny.disturb(trained)
            trained.sparsify.save_adapter(folder / name)
    else:
        for seed, name in enumerate(("column", "row", "sparse", "lora")):
            alone[name] = write_random(base, folder / name, name, seed)
    names = [next(iter(alone)), BASE, *list(alone)[1:]]
    host: Any = sparsify.serve(served, {name: folder / name for name in alone}, slots=4, budget="8MiB", **settings)
    batch = {"input_ids": tiny.tokens(len(names), 7)}
    with torch.no_grad():
        found, plain = host(**batch, adapter_names=names).logits, served(**batch).logits
        assert torch.equal(host(**batch).logits, plain)
        for row, name in enumerate(names):
            own = {"input_ids": batch["input_ids"][row : row + 1]}
            wanted = plain[row] if name == BASE else alone[name].eval()(**own).logits[0]
            torch.testing.assert_close(found[row], wanted, rtol=2e-6, atol=2e-6)
            assert (name == BASE) == bool(float((found[row] - plain[row]).abs().max()) < 1e-4)
    return host


def test_over_a_packed_base(bench, tmp_path):
    packed = sparsify.compile(bench.model, Plan([Quantize("nf4")]))
    host = check_over(bench.model, packed, tmp_path, [Quantize("nf4")])
    own = host.model.layers[0].mlp.down_proj.packed_0
    assert own.data_ptr() == packed.model.layers[0].mlp.down_proj.packed_0.data_ptr()
    host.sparsify.add("dense", bench.folder / "lora")
    with pytest.raises(AdapterError, match=r"was trained over the dense base, and this one is packed \(nf4\)"):
        host(input_ids=tiny.tokens(1, 4), adapter_names=["dense"])
    dense = bench.host()
    dense.sparsify.add("packed", tmp_path / "lora")
    with pytest.raises(AdapterError, match=r"was trained over a packed base \(Quantize.*this one is dense"):
        dense(input_ids=tiny.tokens(1, 4), adapter_names=["packed"])


def test_what_was_reordered_before_it_was_packed_is_refused(bench, tmp_path):
    """S2FT brings its units together, and blocks of other neighbours round to other values: not the base that is served."""
    packed = sparsify.compile(bench.model, Plan([Quantize("nf4")]))
    host: Any = sparsify.serve(packed, budget="1MiB")
    for name, permute in (("moved", True), ("stays", False)):
        trained = tiny.lower(copy.deepcopy(bench.model), S2FT(0.3, permute=permute), Quantize("nf4"))
        tiny.disturb(trained)
        trained.sparsify.save_adapter(tmp_path / name)
        host.sparsify.add(name, tmp_path / name)
    batch = {"input_ids": tiny.tokens(2, 5)}
    with torch.no_grad():
        found = host(**batch, adapter_names=["stays", BASE]).logits
        torch.testing.assert_close(found[0], trained.eval()(**batch).logits[0], rtol=2e-6, atol=2e-6)
    with pytest.raises(
        AdapterError, match=r"down_proj.weight was reordered before it was packed \(nf4\).* permute=False"
    ):
        host(**batch, adapter_names="moved")
    loose: Any = sparsify.serve(packed, {"moved": tmp_path / "moved"}, budget="1MiB", strict=False)
    loose(**batch, adapter_names="moved")


@pytest.mark.parametrize("family", ["Llama", pytest.param("GPT-2", marks=pytest.mark.slow)])
def test_over_a_pruned_base_on_cpu_kernels_with_fused_activations(family, tmp_path):
    small = sparsify.CpuOptions(mode="small")
    plan = Plan([Prune(sparsity=0.75, method="magnitude")], target="cpu")
    lowered: Any = sparsify.compile(tiny.build(family), plan, cpu=small)
    kinds = {type(module).__name__ for module in lowered.modules()}
    assert "GatedLinear" in kinds if family == "Llama" else "MovedActivation" in kinds
    assert not isinstance(lowered.sparsify.cpu.native, sparsify.Refusal)
    host = check_over(lowered.sparsify.plain(), lowered, tmp_path)
    assert "native step: declined: it computes a token in one call" in str(host.sparsify.report)
    ids = tiny.tokens(2, 5)
    found = host.generate(input_ids=ids, adapter_names=["lora", BASE], **GREEDY)
    assert torch.equal(found[1:], lowered.generate(input_ids=ids[1:], **GREEDY))


@pytest.mark.slow
def test_over_a_base_that_was_rounded_to_int8_the_user_must_say_so(tmp_path):
    lowered: Any = sparsify.compile(
        tiny.build("Llama"), Plan([Quantize("int8")], target="cpu"), cpu=sparsify.CpuOptions(mode="small")
    )
    plain = lowered.sparsify.plain()
    with pytest.raises(AdapterError, match="was rounded to int8 when the base was lowered"):
        check_over(plain, lowered, tmp_path)
    check_over(plain, lowered, tmp_path / "loose", strict=False)


class Sorted(nn.Module):
    """Linears that do not see the rows of a batch one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.routed, self.turned = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.places, self.unread, self.read = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(x)
        order = y.flatten(0, 1)[:, 0].argsort()
        y = y.flatten(0, 1).index_copy(0, order, self.routed(y.flatten(0, 1)[order])).view(y.shape)
        y = self.turned(y.transpose(0, 1)).transpose(0, 1) + self.places(torch.ones(y.shape[1], 6))
        return torch.nn.functional.linear(y, self.unread.weight) + self.read(y)


def test_linears_that_do_not_see_row_after_row_take_no_addends(tmp_path):
    torch.manual_seed(0)
    model, x = Sorted().eval(), torch.randn(2, 4, 6)
    host: Any = sparsify.serve(model, example=x, budget="1MiB")
    declined = {refusal.where: refusal.reason for refusal in host.sparsify.declined}
    assert set(declined) == {f"{name}.weight" for name in ("routed", "turned", "places", "unread")}
    assert "not those of one row after another" in declined["routed.weight"]
    assert "may be read in another way" in declined["unread.weight"]
    for name in ("routed", "read"):
        trained: Any = sparsify.compile(model, Plan([LoRA(2, match=name)]), example=x)
        tiny.disturb(trained)
        trained.sparsify.save_adapter(tmp_path / name)
        host.sparsify.add(name, tmp_path / name)
    with pytest.raises(AdapterError, match="routed.weight takes no addend: its tokens are not those"):
        host(x, adapter_names=["routed", BASE])
    with torch.no_grad():
        wanted = torch.stack([trained(x)[0], model(x)[1]])  # of rows of six, whose sums depend on where they lie
        torch.testing.assert_close(host(x, adapter_names=["read", BASE]), wanted, rtol=1e-5, atol=1e-6)
        assert float((wanted - model(x))[0].abs().max()) > 1e-3
    unknown: Any = sparsify.serve(model, {"read": tmp_path / "read"}, budget="1MiB")
    with pytest.raises(AdapterError, match=r"that was not checked: .* pass example="):
        unknown(x, adapter_names=["read", BASE])
    with torch.no_grad():
        torch.testing.assert_close(unknown(x, adapter_names="read"), trained(x), rtol=1e-5, atol=1e-6)
        trusting: Any = sparsify.serve(model, {"read": tmp_path / "read"}, budget="1MiB", check=False)
        torch.testing.assert_close(trusting(x, adapter_names=["read", BASE]), wanted, rtol=1e-5, atol=1e-6)

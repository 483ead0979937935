"""Plans from outside: hostile JSON and odd Python values are PlanErrors; PEFT's words, lists, bare names and positions are taken."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from typing import Any

import pytest
import tiny
import torch

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, PlanError, Prune, Quantize, RefusedError, RoSA

LORA = '{"rules": [{"rule": "LoRA", %s}]}'

HOSTILE: list[tuple[Any, str]] = [
    (None, "expected a string, got NoneType"), (b"{}", "got bytes"), (bytearray(b"{}"), "got bytearray"), (3, "got int"), ({}, "got dict"),
    ("", "not JSON"), ("{", "not JSON"), ("\ufeff{}", "not JSON"), ("[" * 100000, "nested too deeply"), ('{"a":' * 50000, "nested too deeply"),
    (LORA % ('"rank": ' + "[" * 40 + "1" + "]" * 40), "nested too deeply"), ("null", "JSON object"), ("[]", "JSON object"),
    (LORA % ('"rank": ' + "9" * 5000), "5000 digits"), (LORA % ('"alpha": ' + "9" * 400), "400 digits"), (LORA % '"alpha": 1e999', "no float"),
    (LORA % '"alpha": NaN', "NaN"), (LORA % '"alpha": -Infinity', "Infinity"), (LORA % '"alpha": 1e12', "at most 1e9"),
    (LORA % '"rank": 1000000000000', "out of range"), (LORA % '"rank": 9223372036854775808', "out of range"), (LORA % '"rank": -1', "out of range"),
    (LORA % '"rank": 1.5', "rank=1.5"), (LORA % '"rank": true', "rank=True"), (LORA % '"rank": null', "rank=None"),
    (LORA % '"rank": {"a": {"b": 1}}', "rank="), (LORA % '"rank": {}', "empty table"), (LORA % '"rank": {"": 3}', "empty pattern"),
    (LORA % '"rank": 1, "rank": 2', "'rank' stands twice"), ('{"rules": [], "rules": []}', "'rules' stands twice"),
    (LORA % '"rank": 1, "r": 2', "rank is given twice"), (LORA % '"match": {"a": 1}', "match="), (LORA % '"match": [1]', "match="),
    (LORA % '"match": []', "empty pattern"), (LORA % '"match": [""]', "empty pattern"), (LORA % '"match": "re:("', "unbalanced"),
    (LORA % r'"match": "re:(.)\\1"', "back-reference"), (LORA % r'"match": "\ud800"', "surrogate"), (LORA % ('"match": "%s"' % ("*a" * 1500)), "at most 2,000"),
    (LORA % '"exclude": 3', "exclude=3"), (LORA % '"exclude": [3]', "exclude="), (LORA % '"": 1', "unknown field ''"),
    (LORA % '"seed": 1', "the seed is the plan's"), (LORA % '"ranc": 1', "did you mean 'rank'"), (LORA % '"dropout": "0"', "dropout='0'"),
    ('{"rules": [{"rule": ["LoRA"]}]}', r"rules\[0\]"), ('{"rules": [{"rule": "LoRA"}, null]}', r"rules\[1\]"),
    ('{"rules": [{"rule": "LoRa"}]}', "did you mean 'LoRA'"), ('{"rules": {"rule": "LoRA"}}', "list"),
    ('{"rules": [{"rule": "Prune", "sparsity": [["a"]]}]}', "Prune"), ('{"rules": [{"rule": "Prune", "sparsity": [[1, 2, 3]]}]}', "Prune"),
    ('{"rules": [{"rule": "Prune", "pattern": "%s:4"}]}' % ("9" * 4400), "unknown sparsity pattern"),
    ('{"rules": [{"rule": "S2FT", "units": %s}]}' % ("9" * 39), "S2FT"), (LORA[:-1] % '"rank": 1' + ', "train": null}', "train=None"),
    (LORA[:-1] % '"rank": 1' + ', "train": 3}', "train=3"), (LORA[:-1] % '"rank": 1' + ', "train": [1]}', r"train=\[1\]"),
    (LORA[:-1] % '"rank": 1' + ', "train": {"a": 1}}', "train="), (LORA[:-1] % '"rank": 1' + ', "trian": []}', "did you mean 'train'"),
    (LORA[:-1] % '"rank": 1' + ', "seed": 1.5}', "seed=1.5"), (LORA[:-1] % '"rank": 1' + ', "seed": 9%s}' % ("9" * 39), "seed="),
]  # fmt: skip


@pytest.mark.parametrize(("text", "word"), HOSTILE, ids=[f"{i} {w}" for i, (_, w) in enumerate(HOSTILE)])
def test_hostile_json_is_a_plan_error(text, word):
    with pytest.raises(PlanError, match=word) as caught:
        Plan.from_json(text)
    assert len(str(caught.value)) < 6000


ODD: list[Any] = [None, 3, "LoRA", b"LoRA", {}, {"rule": "LoRA"}, [None], [LoRA], object(), iter([3])]


@pytest.mark.parametrize("rules", ODD, ids=lambda v: repr(v)[:20])
def test_odd_rules_in_python(rules):
    with pytest.raises(PlanError, match="^Plan"):
        Plan(rules)


def test_odd_values_in_python():
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    wrong = [
        lambda: LoRA(rank=10**5000), lambda: LoRA(rank=10**400), lambda: LoRA(rank=-(10**400)), lambda: LoRA(alpha=10**5000), lambda: LoRA(alpha=10**400),
        lambda: LoRA(alpha=float("nan")), lambda: LoRA(rank=Mute()), lambda: LoRA(match=Mute()), lambda: LoRA(match=b"q"), lambda: LoRA(match=("a", b"q")),
        lambda: LoRA(rank={3: 4}), lambda: LoRA(rank={"*": 10**400}), lambda: RoSA(density={"*": 10**400}), lambda: RoSA(rank=2**64), lambda: PaCA(2**64),
        lambda: S2FT(units=10**400), lambda: S2FT(10**400), lambda: Prune(10**400), lambda: Prune(0.5, damping=10**400), lambda: Prune(pattern="²:4"),
        lambda: Plan([LoRA()], seed=10**5000), lambda: Plan([LoRA()], train=None), lambda: Plan([LoRA()], train=Mute()), lambda: Plan([LoRA()], train=[Mute()]),
        lambda: Plan([Mute()]), lambda: Plan(), lambda: Plan([LoRA()], trian=["x"]), lambda: Plan([LoRA()], ["x"]), lambda: Plan([LoRA()], train=["re:("]),
        lambda: Plan(itertools.repeat(LoRA())), lambda: Plan([LoRA()], train=[""] * 20000), lambda: LoRA(match=["a"] * 20000),
    ]  # fmt: skip
    for number, make in enumerate(wrong):
        with pytest.raises(PlanError):
            make()
            raise AssertionError(number)


def test_damaged_json_is_read_or_refused_never_anything_else():
    text = (
        Plan([LoRA(match=["q_proj"], rank={"a": 1}), Prune({"a": 0.5}), S2FT(0.1), RoSA(4)], train=["x"])
        .to_json()
        .encode()
    )
    draw, refused = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(text)
        for _ in range(draw.choice([1, 1, 2, 5])):
            place, kind = draw.randrange(len(damaged)), draw.random()
            if kind < 0.4:
                damaged[place] ^= 1 << draw.randrange(7)
            elif kind < 0.7:
                del damaged[place : place + draw.randrange(20)]
            else:
                damaged[place:place] = draw.choice(
                    [b"9" * 500, b"[", b"null", b"-1", b"1e99", b"true", b'"x"', b"{}", b"0."]
                )
        try:
            Plan.from_json(damaged.decode(errors="replace"))
        except PlanError:
            refused += 1
    assert 200 < refused < 400


def test_a_table_stays_as_it_is():
    rule = LoRA(rank={"q_proj": 3, "*": 2})
    for change in (
        lambda t: t.update(a=1), lambda t: t.clear(), lambda t: t.pop("*"), lambda t: t.setdefault("a", 1), lambda t: t.__delitem__("*"),
        lambda t: t.__ior__({"a": 1}), lambda t: t.popitem(),
    ):  # fmt: skip
        with pytest.raises(PlanError, match="a plan is frozen"):
            change(rule.rank)
    plan = Plan([rule])
    for same in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), Plan.from_json(plan.to_json())):
        assert same == plan
        assert hash(same) == hash(plan)


# --- habits --------------------------------------------------------------------------------------------------------------

SAME = [
    (LoRA(8), LoRA(rank=8)), (RoSA(16), RoSA(rank=16)), (PaCA(16), PaCA(rank=16)), (S2FT(0.03), S2FT(fraction=0.03)),
    (Prune(0.5), Prune(sparsity=0.5)), (Quantize("int8"), Quantize(format="int8")), (Plan(rules=[LoRA()]), Plan([LoRA()])),
    (
        LoRA(r=8, lora_alpha=16, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj", "v_proj"], exclude_modules=["lm_head"]),
        LoRA(rank=8, alpha=16, dropout=0.1, rslora=True, match=["q_proj", "v_proj"], exclude=("lm_head",)),
    ),
    (RoSA(r=4, lora_alpha=8, target_modules={"q_proj"}), RoSA(rank=4, alpha=8, match=["q_proj"])), (PaCA(r=4), PaCA(4)),
    (LoRA(target_modules="all-linear"), LoRA(match="*")), (LoRA(target_modules=r".*\.(q|v)_proj"), LoRA(match=r"re:.*\.(q|v)_proj")),
    (LoRA(target_modules="q_proj"), LoRA(match="q_proj")), (LoRA(exclude="lm_head"), LoRA(exclude=("lm_head",))),
    (S2FT(0.1, target_modules=["mlp"]), S2FT(0.1, match=["mlp"])), (Quantize(target_modules=["mlp"]), Quantize(match=["mlp"])),
]  # fmt: skip


@pytest.mark.parametrize(("written", "meant"), SAME, ids=lambda v: str(v)[:60])
def test_words_of_other_tools(written, meant):
    assert written == meant
    if not isinstance(written, Plan):
        plan = Plan([written])
        assert Plan.from_json(plan.to_json()) == plan
        assert '"r"' not in plan.to_json()


def test_json_takes_the_words_too():
    text = '{"rules": [{"rule": "LoRA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}]}'
    assert Plan.from_json(text) == Plan([LoRA(4, alpha=8, match=["q_proj", "v_proj"])])


ANSWERS = [
    (lambda: LoRA(ranc=8), r"LoRA: unknown field 'ranc'; did you mean 'rank'.*its fields are match, exclude, rank, alpha, dropout, rslora"),
    (lambda: LoRA(modules_to_save=["head"]), r"write Plan\(\[…\], train=\[…\]\)"), (lambda: LoRA(bias="all"), r"train=\['\*\.bias'\]"),
    (lambda: LoRA(use_dora=True), "DoRA is a method from outside"), (lambda: LoRA(rank_pattern={"q_proj": 2}), r"write rank=\{"),
    (lambda: LoRA(8, 16), "takes 1 value by position"), (lambda: LoRA(8, r=8), "rank is given twice"),
    (lambda: LoRA(target_modules=["a"], match="b"), "match is given twice"), (lambda: S2FT(r=8), r"S2FT: unknown field 'r'; write fraction=… .* or units=…"),
    (lambda: S2FT(lora_alpha=8), "S2FT has no alpha"), (lambda: Quantize(bits=4), "write format="),
    (lambda: Prune(amount=0.5), "write sparsity="), (lambda: PaCA(lora_dropout=0.1), "PaCA has no dropout"), (lambda: Plan([LoRA()], sed=3), "did you mean 'seed'"),
    (lambda: RoSA(sparsity=0.5), "density="), (lambda: Plan(), "rules is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "word"), ANSWERS, ids=[w[:40] for _, w in ANSWERS])
def test_unknown_words_are_answered(make, word):
    with pytest.raises(PlanError, match=word):
        make()


Q = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
V = {name.replace("q_proj", "v_proj") for name in Q}
CHOSEN: list[tuple[Any, set[str]]] = [
    ("q_proj", Q),
    ("self_attn.q_proj", Q),
    (["q_proj", "v_proj"], Q | V),
    ("model.layers.0.self_attn.q_proj", {"model.layers.0.self_attn.q_proj"}),
    (r"re:.*\.1\..*(q|v)_proj", {n for n in Q | V if ".1." in n}),
    (["*.0.*.q_proj", r"re:.*1.*v_proj"], {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}),
]


@pytest.mark.parametrize(("match", "expected"), CHOSEN, ids=[str(m)[:40] for m, _ in CHOSEN])
def test_names_lists_and_expressions_match_modules(match, expected):
    names = [name for name, _ in tiny.llama().named_modules()]
    assert {name for name in names if LoRA(match=match).matches(name)} == expected
    assert {name for name in names if not LoRA(exclude=match).matches(name)} - {"lm_head"} == expected
    assert {
        name
        for name in names
        if Prune({match: 0.3, "*": 0.5} if isinstance(match, str) else 0.3, match=match).matches(name)
    } == expected


def test_a_list_is_served():
    model = tiny.llama()
    host: Any = tiny.lower(
        model, LoRA(match=["q_proj", "v_proj"], rank={"q_proj": 3, "*": 2}), S2FT(0.2, match=["mlp"])
    )
    ranks = {p.param.rpartition(".")[0]: p.rank for p in host.sparsify.program.lowranks}
    assert ranks == {**dict.fromkeys(Q, 3), **dict.fromkeys(V, 2)}
    assert {s.param for s in host.sparsify.program.slices} == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}


def test_a_pattern_of_a_list_that_matches_nothing_is_said():
    with pytest.warns(UserWarning, match="v_prj: this pattern of rule 0, LoRA, matches nothing; did you mean .*v_proj"):
        host = tiny.lower(tiny.llama(), LoRA(2, match=["q_proj", "v_prj"]))
    assert any(r.where == "v_prj" for r in host.sparsify.report.declined)
    with pytest.warns(UserWarning, match="mpl: this pattern of rule 0, S2FT"):
        tiny.lower(tiny.llama(), S2FT(0.2, match=["mlp", "mpl"]))


def test_ranks_beyond_the_weight_are_declined_before_anything_is_made():
    with pytest.raises(RefusedError, match="rank 1000000 is more than the larger side"):
        tiny.lower(tiny.llama(), LoRA(1_000_000, match="model.layers.0.self_attn.q_proj"))
    with pytest.raises(PlanError, match="rank 1000000 is more than the larger side"):
        tiny.lower(tiny.llama(num_hidden_layers=1), RoSA(1_000_000, match="q_proj", mask="random"))


def test_tied_weights_train_under_each_of_their_names():
    for name, rule in (("lm_head", S2FT(0.3)), ("embed_tokens.weight", LoRA(2, match="q_proj"))):
        host: Any = tiny.lower(tiny.llama(tie_word_embeddings=True), rule, train=[name])
        assert host.sparsify.train == ("model.embed_tokens.weight",)
        assert host.lm_head.weight is host.model.embed_tokens.weight
        assert host.lm_head.weight.requires_grad
    with pytest.raises(PlanError, match=r"matches no parameter or module; did you mean .*lm_head"):
        tiny.lower(tiny.llama(tie_word_embeddings=True), S2FT(0.3), train=["lm_haed"])
    host = tiny.lower(tiny.llama(), S2FT(0.3), train=["post_attention_layernorm"])  # the end of names, as in match
    assert host.sparsify.train == tuple(f"model.layers.{i}.post_attention_layernorm.weight" for i in (0, 1))


def test_tied_weights_train_save_and_load(tmp_path):
    host: Any = tiny.lower(tiny.llama(tie_word_embeddings=True), S2FT(0.3), train=["lm_head"])
    tiny.train(host)
    host.sparsify.save_adapter(tmp_path)
    other = sparsify.load(tiny.llama(tie_word_embeddings=True), tmp_path)
    batch = tiny.inputs_of(host)
    with torch.no_grad():
        torch.testing.assert_close(other(**batch).logits, host.eval()(**batch).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(other.lm_head.weight, host.lm_head.weight)

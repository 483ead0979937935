"""`sparsify.load`: saved adapters are served without a plan, calibration or trace, and nothing trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, AdapterError, LoRA, PaCA, Plan, Prune, Quantize, RoSA

BATCH = {"input_ids": tiny.tokens()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits


PLANS = {
    "S2FT": ([S2FT(0.2, producer_fraction=0.1, budget="structure")], []),
    "S2FT in place": ([S2FT(0.2, permute=False, budget="structure")], []),
    "PaCA": ([PaCA(4)], []),
    "RoSA": ([RoSA(4, mask="random", density=0.03)], []),
    "LoRA": ([LoRA(r=4, lora_alpha=3, target_modules=["q_proj", "down_proj"])], []),
    "train": ([LoRA(4, match="q_proj")], ["model.embed_tokens", "*norm*", "lm_head"]),
    "mixed": ([S2FT(0.2, structure="ffn"), RoSA(match="o_proj", rank=2, mask="magnitude"), PaCA(3, match="q_proj")], ["lm_head"]),
    "LoRA over nf4": ([LoRA(4), Quantize("nf4")], []),
    "S2FT over int8": ([S2FT(0.2, budget="structure"), Quantize("int8", match="*.mlp.*")], []),
}  # fmt: skip


QUICK = ("S2FT", "train", "LoRA over nf4")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PLANS])
def test_a_loaded_adapter_computes_what_was_trained(name, tmp_path):
    rules, train = PLANS[name]
    model = tiny.build("Llama")
    trained = tiny.lower(copy.deepcopy(model), *rules, train=train)
    tiny.disturb(trained)
    trained.sparsify.save_adapter(tmp_path)
    before, flags = tiny.snapshot(model), {n: p.requires_grad for n, p in model.named_parameters()}
    host = sparsify.load(model, tmp_path)
    assert float((logits(trained) - logits(model)).abs().max()) > 1e-3
    torch.testing.assert_close(logits(host), logits(trained), rtol=2e-6, atol=2e-6)
    assert type(host) is type(model)
    assert not host.training
    assert host.sparsify.plan == trained.sparsify.plan
    assert not tiny.trainable(host)
    for param in trained.sparsify.train:
        assert torch.equal(host.get_parameter(param), trained.get_parameter(param))  # bit for bit
    tiny.assert_same(tiny.snapshot(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    host.sparsify.set_adapter(None)
    if not any(isinstance(rule, Quantize) for rule in rules):
        assert torch.equal(logits(host), logits(model))
        host.sparsify.set_adapter("default")
        tiny.assert_same(tiny.snapshot(host.sparsify.restore()), before)
    else:
        with pytest.raises(sparsify.SparsifyError, match="the base was packed by Quantize"):
            host.sparsify.restore()
        with pytest.warns(UserWarning, match="Quantize changed the base"):
            host.sparsify.export_lora(tmp_path / "peft", "default")


class Untraceable(nn.Module):
    """A branch on values: no trace goes through it, and none is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.down(torch.relu(self.up(x)))
        return self.head(y) if bool(y.sum() > 0) or y.shape[0] > 0 else y


class Traceable(Untraceable):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))


def test_no_trace_is_needed(tmp_path):
    model, x = Untraceable(), torch.randn(4, 12)
    twin = Traceable()
    twin.load_state_dict(model.state_dict())
    trained = sparsify.compile(twin, Plan([PaCA(4, match=["up", "down"])], train=["head"]), example=x, progress=False)
    tiny.disturb(trained)
    trained.sparsify.save_adapter(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(sparsify.load(model, tmp_path)(x), trained(x))


def save(directory: Any, *rules: Any, seed: int = 1, **plan: Any) -> nn.Module:
    host = tiny.lower(tiny.build("Llama"), *rules, **plan)
    tiny.disturb(host, seed=seed)
    host.sparsify.save_adapter(directory)
    return host


def test_several_adapters(tmp_path):
    a = save(tmp_path / "a", S2FT(0.2, budget="structure"), train=["lm_head"])
    b = save(tmp_path / "b", LoRA(4, match="q_proj"), seed=2)
    host = sparsify.load(tiny.build("Llama"), [tmp_path / "a", tmp_path / "b"])
    assert set(host.sparsify.adapters) == {"a", "b"}
    torch.testing.assert_close(logits(host), logits(a), rtol=2e-6, atol=2e-6)  # the first
    host.sparsify.set_adapter("b")
    torch.testing.assert_close(logits(host), logits(b), rtol=2e-6, atol=2e-6)  # and a's head is gone
    host = sparsify.load(
        tiny.build("Llama"), {"x": tmp_path / "a", "y": str(tmp_path / "b")}, active={"x": 1.0, "y": 0.5}
    )
    both = logits(host)
    host.sparsify.set_adapter({"x": 1.0, "y": 1.0})
    assert not torch.equal(logits(host), both)
    assert torch.equal(
        logits(sparsify.load(tiny.build("Llama"), tmp_path / "a", active=False)), logits(tiny.build("Llama"))
    )
    host = sparsify.load(tiny.build("Llama"), tmp_path / "b", name="mine", active="mine")
    assert list(host.sparsify.active.weights) == ["mine"]
    host.sparsify.load_adapter(tmp_path / "a", "later")
    host.sparsify.set_adapter("later")
    torch.testing.assert_close(logits(host), logits(a), rtol=2e-6, atol=2e-6)
    assert not tiny.trainable(host)


def test_a_served_host_goes_on(tmp_path):
    """Merged, exported, saved again, made plain: what the other verbs give is what was trained."""
    trained = save(tmp_path / "a", LoRA(4, match=["q_proj", "down_proj"]), train=["model.norm"])
    host = sparsify.load(tiny.build("Llama"), tmp_path / "a")
    want = logits(trained)
    host.sparsify.save_adapter(tmp_path / "again", "default")
    host.sparsify.export_lora(tmp_path / "peft")
    for directory in ("again", "peft"):
        torch.testing.assert_close(
            logits(sparsify.load(tiny.build("Llama"), tmp_path / directory)), want, rtol=2e-6, atol=2e-6
        )
    torch.testing.assert_close(logits(host.sparsify.plain()), want, rtol=2e-6, atol=2e-6)
    assert "not traced" in str(host.sparsify.report)
    assert "not traced" in str(host.sparsify.program)
    assert Plan.from_json(host.sparsify.adapters["default"].info["plan"]) == trained.sparsify.plan


def test_what_cannot_be_served_is_refused(tmp_path):
    trained = save(tmp_path / "a", S2FT(0.2, budget="structure"))
    save(tmp_path / "nf4", LoRA(4), Quantize("nf4"))
    save(tmp_path / "pruned", LoRA(4, match="q_proj"), Prune(0.5, method="magnitude"))
    model = lambda: tiny.build("Llama")  # noqa: E731
    (tmp_path / "empty").mkdir()
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ("owner/adapter", {}, "the model hub did not give it"),
        ("owner/../adapter", {}, "is no folder on this machine$"),
        (tmp_path / "nowhere", {}, "is no folder on this machine"),
        (tmp_path / "empty", {}, "holds no adapter"),
        ("a\0b", {}, "is no folder"),
        ("a" * 5000, {}, "is no folder"),
        ([], {}, "no adapter is named"),
        (3, {}, "expected a folder"),
        ([3], {}, "expected a name and a folder"),
        ([tmp_path / "a", tmp_path / "a"], {}, "two adapters would be called 'a'"),
        ([tmp_path / "a"], {"name": "b"}, "belongs to one adapter"),
        (tmp_path / "a", {"active": "b"}, "no adapter is called 'b'"),
        ([tmp_path / "a", tmp_path / "nf4"], {}, "differently quantised bases"),
        (tmp_path / "pruned", {}, "plan prunes the base .* this model is not pruned"),
    ]
    for path, options, word in wrong:
        with pytest.raises(AdapterError, match=word):
            sparsify.load(model(), path, **options)
    with pytest.raises(AdapterError, match="is not the base that the adapter was trained on"):
        sparsify.load(tiny.build("Llama", seed=3), tmp_path / "a")
    sparsify.load(tiny.build("Llama", seed=3), tmp_path / "a", strict=False)
    with pytest.raises(AdapterError, match=r"compiled already; add adapters with model\.sparsify\.load_adapter"):
        sparsify.load(trained, tmp_path / "a")
    with pytest.raises(AdapterError, match="the model has no parameter"):
        sparsify.load(tiny.build("GPT-2"), tmp_path / "a")


def test_an_adapter_of_a_pruned_base_is_served_over_it(tmp_path):
    trained = save(tmp_path / "a", LoRA(4, match="q_proj"), Prune(0.5, method="magnitude"))
    want = logits(trained)
    trained.sparsify.set_adapter(None)
    pruned = trained.sparsify.plain()
    torch.testing.assert_close(logits(sparsify.load(pruned, tmp_path / "a")), want, rtol=2e-6, atol=2e-6)


def test_a_plan_that_cannot_be_read_is_named(tmp_path):
    host = save(tmp_path / "a", LoRA(4, match="q_proj"))
    adapter = host.sparsify.current()
    for plan in ('{"rules": []}', "[" * 100000, 3, '{"rules": [{"rule": "LoRA", "rank": 1e400}]}'):
        from sparsify.adapters import adapter as files

        files.save(files.Adapter(adapter.deltas, adapter.bases, {"plan": plan}), tmp_path / "b")
        with pytest.raises(AdapterError, match="the plan that the adapter carries cannot be read"):
            sparsify.load(tiny.build("Llama"), tmp_path / "b")


def in_the_cache(cache: Path, repository: str, folder: Path, revision: str = "main") -> None:
    """A folder as the hub's cache keeps it: blobs by hash, a snapshot of links to them, the name of a revision."""
    place, commit = cache / f"models--{repository.replace('/', '--')}", "0" * 39 + str(len(revision) % 10)
    for part in ("blobs", f"snapshots/{commit}", "refs"):
        (place / part).mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        (place / "blobs" / f"{commit}{number}").write_bytes(file.read_bytes())
        (place / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{commit}{number}")
    (place / "refs" / revision).write_text(commit)


def test_names_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `HF_HUB_OFFLINE=1` has them: from the hub's cache."""
    import huggingface_hub.constants

    trained = save(tmp_path / "ours", S2FT(0.2, budget="structure"))
    want = logits(trained)
    trained.sparsify.export_lora(tmp_path / "peft")
    in_the_cache(tmp_path / "cache", "owner/math", tmp_path / "ours")
    in_the_cache(tmp_path / "cache", "owner/law.lora", tmp_path / "peft", "v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tiny.build("Llama")
    host = sparsify.load(model, "owner/math", name="math")
    torch.testing.assert_close(logits(host), want, rtol=2e-6, atol=2e-6)
    host.sparsify.load_adapter("owner/law.lora@v1", "law")
    host.sparsify.set_adapter("law")
    torch.testing.assert_close(logits(host), want, rtol=1e-5, atol=1e-5)
    host = sparsify.load(model, ["owner/math", "owner/law.lora@v1"])
    assert list(host.sparsify.adapters) == ["math", "law.lora@v1"]
    for name in ("owner/nothing", "owner/law.lora", "owner/math@v9"):
        with pytest.raises(
            AdapterError, match=f"{name} is no folder on this machine, and the model hub did not give it"
        ):
            host.sparsify.load_adapter(name, "other")

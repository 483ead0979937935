"""Pruning from one folder to another: the weights of the in-memory run, in the memory of a block, resumable, with refusals."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
import transformers as hf
from methods import batches, model_of
from safetensors import safe_open
from torch import nn

from sparsify import LoRA, Plan, PlanError, Prune, SparsifyError
from sparsify.ops.bits import unpack_bits
from sparsify.pruning import sequential, streaming
from sparsify.pruning.on_disk import prune_on_disk


def saved(folder: Path, family: str = "Llama") -> nn.Module:
    """The shared model of a family, and its checkpoint in `folder`."""
    model: Any = copy.deepcopy(model_of(family))
    model.save_pretrained(folder, save_original_format=False)
    return model


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in index.items():
        with safe_open(folder / file, framework="pt") as opened:
            found[name] = opened.get_tensor(name)
    return found


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("Llama", Prune(sparsity=0.6)),
        ("Llama", Prune(sparsity=0.6, allocation="sensitivity")),
        ("GPT-2", Prune(sparsity=0.5, method="wanda")),
        ("Mixtral", Prune(sparsity=0.5)),
        ("T5 (gated)", Prune(sparsity=0.5)),
        ("Llama", Prune(pattern="1:2", method="magnitude")),
    ],
)
def test_the_written_folder_is_the_pruned_model(family: str, rule: Prune, tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", family)
    data = [tiny.inputs_of(model, family)] if rule.needs_calibration else None
    expected: Any = tiny.lower(model, rule, calibration=data)
    result = prune_on_disk(tmp_path / "dense", tmp_path / "pruned", Plan([rule]), calibration=data, progress=False)
    again = type(model).from_pretrained(tmp_path / "pruned")  # type: ignore[attr-defined]
    tiny.assert_same(dict(again.named_parameters()), dict(expected.named_parameters()))
    masks = expected.sparsify.program.masks
    assert set(result.masks) == set(masks)
    assert all(torch.equal(unpack_bits(result.masks[n], m.shape), m) for n, m in masks.items())
    zeros = sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert result.sparsity == pytest.approx(zeros)
    assert [layer.name for layer in result.layers] == [layer.name for layer in expected.sparsify.program.pruned]
    assert result.refusals == [r for r in expected.sparsify.program.refusals if r in result.refusals]
    assert (tmp_path / "pruned" / "config.json").is_file()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])  # without and with data
def test_memory_is_one_block(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(num_hidden_layers=6)
    model.save_pretrained(tmp_path / "dense")
    peak = 0
    original = streaming.StreamedWeights.load

    def load(self: Any, names: list[str]) -> None:
        nonlocal peak
        original(self, names)
        peak = max(peak, streaming.memory_of(self.host))

    monkeypatch.setattr(streaming.StreamedWeights, "load", load)
    plan = Plan([Prune(sparsity=0.5, method=method)])
    prune_on_disk(tmp_path / "dense", tmp_path / "pruned", plan, calibration=batches(), progress=False)
    block = streaming.memory_of(model.model.layers[0])
    assert peak <= streaming.memory_of(model) - 5 * block + 1024


def prune_and_die(source: str, target: str, layer: int) -> None:
    """Is killed by the operating system while it prunes its `layer`-th weight."""
    torch.set_num_threads(1)
    original, calls = sequential.sparsegpt_prune, 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == layer:
            (Path(target) / "model-rest.safetensors.tmp1").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    sequential.sparsegpt_prune = killed  # type: ignore[assignment]
    prune_on_disk(source, target, Plan([Prune(sparsity=0.6)]), calibration=batches(), progress=False)


def test_a_killed_run_goes_on_with_the_first_missing_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, plan = tmp_path / "dense", tmp_path / "pruned", Plan([Prune(sparsity=0.6)])
    saved(source)
    process = processes.start(prune_and_die, str(source), str(target), 9)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    calls = 0
    original = sequential.sparsegpt_prune

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(sequential, "sparsegpt_prune", counted)
    resumed = prune_on_disk(source, target, plan, calibration=batches(), progress=False)
    assert calls == 7  # the first of two blocks was on disk
    assert not list(target.rglob("*.tmp*"))
    whole = prune_on_disk(source, tmp_path / "whole", plan, calibration=batches(), progress=False)
    tiny.assert_same(weights_of(target), weights_of(tmp_path / "whole"))
    tiny.assert_same(resumed.masks, whole.masks)
    assert [(s.name, s.error) for s in resumed.layers] == [(s.name, s.error) for s in whole.layers]
    calls = 0
    tiny.assert_same(prune_on_disk(source, target, plan, calibration=batches(), progress=False).masks, whole.masks)
    assert calls == 0


def test_what_is_refused(tmp_path: Path) -> None:
    source, plan = tmp_path / "dense", Plan([Prune(sparsity=0.5, method="magnitude")])
    saved(source)
    with pytest.raises(PlanError, match="only Prune rules, not LoRA"):
        prune_on_disk(source, tmp_path / "a", Plan([LoRA(rank=2)]))
    with pytest.raises(PlanError, match="a folder of its own"):
        prune_on_disk(source, source, plan)
    with pytest.raises(PlanError, match="give calibration batches"):
        prune_on_disk(source, tmp_path / "a", Plan([Prune()]))
    with pytest.raises(PlanError, match="serves nothing"):
        prune_on_disk(source, tmp_path / "a", Plan([Prune(match="*.nothing", method="magnitude")]))
    assert not (tmp_path / "a").exists()
    prune_on_disk(source, tmp_path / "a", plan, progress=False)
    before = weights_of(tmp_path / "a")
    with pytest.raises(PlanError, match="another pruning run"):
        prune_on_disk(source, tmp_path / "a", Plan([Prune(sparsity=0.6, method="magnitude")]), progress=False)
    hf.LlamaForCausalLM(model_of().config).save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match="another pruning run"):
        prune_on_disk(tmp_path / "other", tmp_path / "a", plan, progress=False)
    with pytest.raises(PlanError, match="holds a model already"):
        prune_on_disk(source, tmp_path / "other", plan, progress=False)
    tiny.assert_same(weights_of(tmp_path / "a"), before)
    (tmp_path / "a" / "pruning" / "run.json").write_text("{")
    with pytest.raises(PlanError, match="damaged"):
        prune_on_disk(source, tmp_path / "a", plan, progress=False)
    model_of("Mixtral").save_pretrained(tmp_path / "renamed")
    with pytest.raises(SparsifyError, match=r"has no tensor.*save_original_format=False"):
        prune_on_disk(tmp_path / "renamed", tmp_path / "b", plan, progress=False)
    (source / "config.json").unlink()
    with pytest.raises(PlanError, match=r"has no config\.json; pass build="):
        prune_on_disk(source, tmp_path / "b", plan)
    with pytest.raises(SparsifyError, match="has shape"):
        prune_on_disk(source, tmp_path / "c", plan, build=lambda: tiny.llama(intermediate_size=52), progress=False)


def test_a_model_of_ones_own_is_built_by_a_function(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = model_of("Mlp")
    (tmp_path / "dense").mkdir()
    save_file(model.state_dict(), tmp_path / "dense" / "weights.safetensors")
    rule, data = Prune(sparsity=0.5), batches("Mlp")
    expected: Any = tiny.lower(model, rule, calibration=data, example=torch.randn(3, 12))
    options: dict[str, Any] = {"build": tiny.Mlp, "example": torch.randn(3, 12), "calibration": data}
    prune_on_disk(tmp_path / "dense", tmp_path / "pruned", Plan([rule]), progress=False, **options)
    tiny.assert_same(weights_of(tmp_path / "pruned"), expected.state_dict())


def test_compile_sends_a_model_without_memory_to_its_files() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(model_of().config)
    with pytest.raises(PlanError, match=r"no memory \(meta device\).*prune_on_disk"):
        tiny.lower(model, Prune(method="magnitude"))


def test_a_progress_bar_counts_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "dense")
    capsys.readouterr()
    for _ in range(2):  # a finished run too
        prune_on_disk(tmp_path / "dense", tmp_path / "pruned", Plan([Prune(method="magnitude")]))
        assert "14/14" in capsys.readouterr().err

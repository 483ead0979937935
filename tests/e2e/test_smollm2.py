"""The product on a real language model: SmolLM2-135M from its package. Skipped where that is not installed."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

import sparsify
from sparsify import S2FT, CpuOptions, LoRA, Plan, Prune
from sparsify.demo import fresh_process, pretrained, smollm2
from sparsify.demo.language_demo import LanguageSettings, run_language_demo
from sparsify.demo.language_methods import METHODS
from sparsify.demo.language_tasks import SQL, calibration_text, general_text
from sparsify.demo.language_training import encode, score, text_blocks, text_loss, train, training_batches, write
from sparsify.demo.pretrained import why_missing
from sparsify.kernels import cache
from sparsify.train.squarehead import Distiller

pytestmark = pytest.mark.skipif(bool(why_missing()), reason=why_missing() or "installed")
PROMPTS = ["The capital of France is", "Question: count the books?\nSQL:"]
SIZE = 1_831_680
FEW = 4  # blocks of the model that most of this is tried on by default; all thirty with -m slow


def keep_the_first_blocks(folder: Path, count: int) -> None:
    """A cache in `folder` whose checkpoint has the first `count` blocks only, and the user's own kernels."""
    folder.mkdir(mode=0o700)
    for kept in cache.directory().iterdir():
        if kept.name != "models" and not kept.name.startswith("."):
            (shutil.copytree if kept.is_dir() else shutil.copy)(kept, folder / kept.name)
    whole = pretrained.model_folder()

    def save(place: Path) -> None:
        LlamaForCausalLM.from_pretrained(whole, num_hidden_layers=count).save_pretrained(place)
        AutoTokenizer.from_pretrained(whole).save_pretrained(place)

    source = {"layout": pretrained.LAYOUT, "gguf": pretrained.sha256(pretrained.gguf_file())}
    pretrained.ready(folder / "models" / pretrained.NAME, source, save)


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any]:
    model, tokenizer = smollm2()
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def few_blocks(opened: tuple[Any, Any]) -> tuple[Any, Any]:
    """The model's first blocks, with its own weights, and its tokenizer."""
    model, tokenizer = opened
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = FEW
    with torch.device("meta"):
        short = LlamaForCausalLM(config)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in short.state_dict()}
    short.load_state_dict(kept, assign=True)
    short.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    short.tie_weights()
    return short.requires_grad_(False).eval(), tokenizer


@pytest.fixture(scope="module")
def trained(few_blocks: tuple[Any, Any]) -> Any:
    """A host after three steps of S2FT: enough to move every trained block."""
    model, tokenizer = few_blocks
    host = sparsify.compile(model, METHODS["s2ft"].plan(0))
    batches = training_batches(SQL, 3, 4, 0)
    run = train(host, tokenizer, batches, lr=1e-3, name="test")
    assert run.losses[-1] < run.losses[0]
    return host.eval()


@torch.inference_mode()
def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    return model(**inputs, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """To the rounding of sums that are added in another order: 30 blocks, each √width · ε of the largest logit."""
    bound = 30 * 1536**0.5 * torch.finfo(torch.float32).eps * b.abs().max().item()
    assert (a - b).abs().max().item() <= bound


def test_an_ordinary_checkpoint(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert "Paris" in write(model, tokenizer, PROMPTS[:1], 6)[0]
    assert 2.5 < text_loss(model, text_blocks(tokenizer, general_text(), 2, 128)) < 3.6


@pytest.mark.parametrize("blocks", [FEW, 30])
@pytest.mark.parametrize("name", ["s2ft", "lora"])
def test_compiled_it_writes_what_the_base_writes(name: str, blocks: int, request: pytest.FixtureRequest) -> None:
    model, tokenizer = request.getfixturevalue("few_blocks" if blocks == FEW else "opened")
    host = sparsify.compile(model, METHODS[name].plan(3))
    assert sum(p.numel() for p in host.parameters() if p.requires_grad) == SIZE * blocks // 30
    assert write(host, tokenizer, PROMPTS, 8) == write(model, tokenizer, PROMPTS, 8)
    close(logits(host, tokenizer), logits(model, tokenizer))


def test_adapter_opens_on_the_base_and_leaves_it(few_blocks: tuple[Any, Any], trained: Any, tmp_path: Path) -> None:
    model, tokenizer = few_blocks
    trained.sparsify.save_adapter(tmp_path / "sql")
    served = sparsify.load(model, tmp_path / "sql", name="sql")
    expected, base = logits(trained, tokenizer), logits(model, tokenizer)
    close(logits(served, tokenizer), expected)
    assert (expected - base).abs().max() > 0.1
    served.sparsify.set_adapter(None)
    assert torch.equal(logits(served, tokenizer), base)


def test_exported_to_peft_it_computes_the_same(few_blocks: tuple[Any, Any], trained: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = few_blocks
    folder = trained.sparsify.export_lora(tmp_path / "peft")
    other = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    close(logits(other, tokenizer), logits(trained, tokenizer))


def test_packed_for_the_cpu_it_writes_what_the_masked_model_writes(few_blocks: tuple[Any, Any]) -> None:
    model, tokenizer = few_blocks
    rules = [Prune(sparsity=0.3, method="magnitude", match="model.layers.*")]
    pruned = sparsify.compile(model, Plan(rules)).sparsify.plain().eval()
    lowered = sparsify.compile(pruned, Plan([], target="cpu"), cpu=CpuOptions(tokens=(1,), mode="small"))
    assert len(lowered.sparsify.cpu.lowered) >= FEW * 4
    assert write(lowered, tokenizer, PROMPTS, 10) == write(pruned, tokenizer, PROMPTS, 10)
    close(logits(lowered, tokenizer), logits(pruned, tokenizer))


def test_pruned_it_recovers(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    student = sparsify.compile(model, Plan([Prune(sparsity=0.4, method="magnitude")]))
    held_out = text_blocks(tokenizer, general_text(), 2, 64)
    blocks = text_blocks(tokenizer, calibration_text(8000), 8, 64).split(2)
    dense, before = text_loss(model, held_out), text_loss(student, held_out)
    assert before > dense + 0.3  # pruning must have hurt
    distiller = Distiller(student, model, ce=0.0, sq=1.0)
    student.requires_grad_(True)  # the base that it was made from is frozen
    survivors = list(student.parameters())
    optimizer = torch.optim.AdamW(survivors, lr=1e-4, weight_decay=0.0)
    student.train()
    for piece in blocks:
        result = distiller({"input_ids": piece, "attention_mask": torch.ones_like(piece)})
        loss = F.cross_entropy(result.outputs.logits[:, :-1].flatten(0, 1), piece[:, 1:].flatten()) + result.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(survivors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert text_loss(student, held_out) < before - 0.1
    weight = student.model.layers[3].mlp.down_proj.weight
    assert (weight == 0).float().mean().item() == pytest.approx(0.4, abs=1e-3)


def test_labels_stand_on_the_answer(opened: tuple[Any, Any]) -> None:
    """What `encode` asks for and scores is the answer and its end, nothing of the question."""
    model, tokenizer = opened
    rows = SQL.distinct(0, 3)
    inputs, labels = encode(tokenizer, rows)
    for (_, answer), row in zip(rows, labels, strict=True):
        kept = row[row >= 0]
        assert kept[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(kept[:-1]) == answer
    assert model(**inputs).logits.shape[:2] == labels.shape


def test_greedy_text_and_score_agree(opened: tuple[Any, Any]) -> None:
    """A row whose answer is what the model itself writes counts as right, with any other word it does not."""
    model, tokenizer = opened
    written = write(model, tokenizer, PROMPTS[:1], 5)[0]
    inputs, labels = encode(tokenizer, [(PROMPTS[0], written)])
    greedy = model(**inputs).logits.argmax(-1)[0]
    count = int((labels[0] >= 0).sum()) - 1  # less the end, which the model has not written
    at = int((labels[0] >= 0).nonzero()[0])
    assert torch.equal(greedy[at : at + count], labels[0, at : at + count])
    assert score(model, tokenizer, [(PROMPTS[0], " zebra")]).exact == 0.0


def forked(command: list[str], *, input: str, env: dict[str, str], **options: bool) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a Python process, forked from one that has everything loaded."""
    assert command[0] == sys.executable
    assert options == {"capture_output": True, "text": True, "check": False}
    return processes.run_python(*command[1:], input=input, env=env)


@pytest.mark.parametrize("blocks", [2, 30])
def test_every_step_of_the_demo(
    blocks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `python -m sparsify.demo` does, with less of everything."""
    if blocks < 30:
        keep_the_first_blocks(tmp_path / "cache", blocks)
        monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(fresh_process.subprocess, "run", forked)  # a fresh interpreter is what the case of 30 has
    given = {"methods": ("s2ft", "lora"), "seed": 0, "out": tmp_path}
    few = {"steps": 2, "second_steps": 2, "batch": 2, "held_out": 2, "blocks": 1, "calibration": 1}
    run_language_demo(LanguageSettings(**given, **few, tokens=2, shown=2, answer=6, fast=True))  # type: ignore[arg-type]
    results = json.loads((tmp_path / "results.json").read_text())
    s2ft, lora = results["tuned"]
    assert s2ft["trained"] == lora["trained"] == SIZE * blocks // 30
    assert s2ft["run"]["losses"][0] == pytest.approx(lora["run"]["losses"][0], rel=1e-4)  # the same batches
    assert s2ft["score"]["loss"] < results["base"]["loss"]
    assert results["fresh_equal"]
    assert results["off_equal"]
    served = {row["label"]: row for row in results["served"]}
    assert list(served) == ["none", "SQL", "dates", "both, fused"]
    assert served["both, fused"]["scores"]["dates"]["loss"] < served["SQL"]["scores"]["dates"]["loss"]
    dense, half, sparse = results["decoders"]
    assert min(dense["speed"], half["speed"], sparse["speed"]) > 0
    html = (tmp_path / "demo.html").read_text()
    assert "In short" in html
    assert "count the" in html or "SELECT" in html
    assert results["tuned"][0]["label"] in capsys.readouterr().out


def test_plans_are_of_equal_size_and_disjoint_kinds() -> None:
    assert [type(rule) for rule in METHODS["s2ft"].rules] == [S2FT, S2FT]
    assert [type(rule) for rule in METHODS["lora"].rules] == [LoRA]

"""`Prune` through `sparsify.compile`: masks in the host and in the graph, beside the other rules, in Trainer, on disk."""

from __future__ import annotations

import copy
import os
import signal
import warnings
import weakref
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
import transformers as hf
from methods import batches, compiled, logits, model_of
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, PlanError, Prune, Quantize, RefusedError, RoSA, SparsifyError
from sparsify.modules.masked import check_masks, masked_parameters
from sparsify.pruning import sequential
from sparsify.pruning.sequential import prune_model
from sparsify.pruning.sparse_checkpoint import SparseCheckpointError, model_hash, open_sparse
from sparsify.show.html_report import Section, render_html
from sparsify.show.report import human
from sparsify.train.squarehead import Distiller, distillation_trainer

HALF = Prune(sparsity=0.5, method="magnitude")


def pruned(host: Any) -> dict[str, Tensor]:
    """Masks of a compiled host in the coordinates of the user's model."""
    return {name: host.sparsify.mask_original(name, mask) for name, mask in host.sparsify.program.masks.items()}


def nonzero_where_pruned(state: Any, masks: dict[str, Tensor]) -> dict[str, int]:
    """How many pruned entries of each weight are not zero (only those with any)."""
    counts = {name: int((state[name][~mask] != 0).sum()) for name, mask in masks.items()}
    return {name: count for name, count in counts.items() if count}


# --- a plan that only prunes: every survivor trains ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "T5 (gated)", "Whisper", "Mixtral", "Phi-3"])
def test_survivors_train_and_pruned_entries_stay_zero(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    before = tiny.snapshot(model)
    inputs = tiny.inputs_of(model, family)
    host: Any = tiny.lower(model, Prune(sparsity=0.6), calibration=[inputs])
    tiny.assert_same(tiny.snapshot(model), before)
    assert type(host) is type(model)
    assert list(host.state_dict()) == list(model.state_dict())
    masks = pruned(host)
    zeros = sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert zeros == pytest.approx(0.6, abs=0.01)
    assert any("expert" in name for name in masks) == (family == "Mixtral")
    start = {n: p.detach().clone() for n, p in host.named_parameters()}
    tiny.train(host, **inputs)
    check_masks(host)
    assert not nonzero_where_pruned(host.state_dict(), masks)
    for name, mask in masks.items():
        moved = (host.get_parameter(name) != start[name])[mask]
        assert moved.float().mean() > 0.8, name
    plain = host.sparsify.plain()
    assert not list(masked_parameters(plain))
    with torch.no_grad():
        torch.testing.assert_close(tiny.output_of(plain(**inputs)), tiny.output_of(host(**inputs)))
    host.sparsify.save_sparse(tmp_path / "a.sparse")
    found = open_sparse(tmp_path / "a.sparse")
    assert set(found.entries) >= set(masks)
    again = found.load_into(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(tiny.output_of(again(**inputs)), tiny.output_of(host(**inputs)))
    tiny.train(again, **inputs)
    assert not nonzero_where_pruned(again.state_dict(), masks)


def test_the_program_and_the_report_show_the_masks() -> None:
    host = compiled(Prune(sparsity=0.6))
    text = str(host.sparsify.program)
    assert text.count("sparsify.masked_linear") == len(host.sparsify.program.masks) == 14
    report = str(host.sparsify.report)
    assert "14 weights pruned: 60.0% zeros" in report
    assert "model.layers.1.mlp.down_proj.weight: 60.0% unstructured, sparsegpt, error" in report
    assert "output head" in report  # and why it was left dense
    with pytest.raises(SparsifyError, match="restore: Prune replaced the weights"):
        host.sparsify.restore()


@pytest.mark.parametrize(
    "rules", [(), (LoRA(rank=2),), (S2FT(fraction=0.2, budget="structure"),)], ids=["alone", "LoRA", "S2FT"]
)
def test_a_checkpoint_carries_the_hash_of_the_dense_model(rules: tuple[Any, ...], tmp_path: Path) -> None:
    """Recorded at compile, before the dense values are gone; training and merging do not change it."""
    dense = model_of()
    host = compiled(HALF, *rules)
    tiny.train(host)
    if rules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            host.sparsify.merge()
    report = host.sparsify.save_sparse(tmp_path / "a.sparse")
    found = open_sparse(tmp_path / "a.sparse", base=dense)
    assert found.base == model_hash(dense)
    with pytest.raises(SparseCheckpointError, match="another base model"):
        open_sparse(tmp_path / "a.sparse", base=tiny.build("Llama", seed=1))
    with pytest.raises(SparseCheckpointError, match="another base model"):
        open_sparse(tmp_path / "a.sparse", base=host.sparsify.plain())
    found.load_into(tiny.build("Llama", seed=1))
    pruned_weights = set(host.sparsify.program.masks)
    dense_bytes, stored = (sum(report.tensors[n][i] for n in pruned_weights) for i in (0, 1))
    line = next(text for text in host.sparsify.report.chosen if "weights pruned" in text)
    assert line.endswith(f"in a sparse checkpoint {human(stored)} instead of {human(dense_bytes)}")


def test_without_pruning_there_is_no_base_to_record(tmp_path: Path) -> None:
    compiled(LoRA(rank=2)).sparsify.save_sparse(tmp_path / "a.sparse")
    assert open_sparse(tmp_path / "a.sparse").base is None


def test_the_picture_has_a_row_per_weight(tmp_path: Path) -> None:
    host = compiled(Prune(sparsity={"*.mlp.*": 0.75, "*": 0.5}))
    host.sparsify.draw_pruning(tmp_path / "a.svg")
    root = ET.fromstring((tmp_path / "a.svg").read_text())
    rows = [g for g in root.iter() if g.tag.endswith("}g")]
    assert len(rows) == len(host.sparsify.program.pruned) == 14
    for layer, drawn in zip(host.sparsify.program.pruned, rows, strict=True):
        text = list(drawn.itertext())
        assert any(layer.name in t and "sparsegpt" in t for t in text)
        assert f"{layer.sparsity:.1%}" in text
        assert f"{layer.error:.2g}" in text
        widths = [float(r.get("width", "nan")) for r in drawn if r.tag.endswith("rect")]
        assert widths[1] / widths[0] == pytest.approx(layer.sparsity, abs=0.01)
    worst = max(layer.error for layer in host.sparsify.program.pruned)
    bars = [float([r for r in g if r.tag.endswith("rect")][3].get("width", "nan")) for g in rows]
    shares = [layer.error / worst for layer in host.sparsify.program.pruned]
    assert [b / max(bars) for b in bars] == pytest.approx(shares, abs=0.01)
    page = render_html("a title", "a summary", [Section("s", program=host.sparsify.program)])
    assert "relative squared error of the output" in page
    with pytest.raises(SparsifyError, match="pruned nothing"):
        compiled(LoRA(rank=2)).sparsify.draw_pruning(tmp_path / "b.svg")


def test_plans_with_prune_are_values() -> None:
    rule = Prune(sparsity={"*.mlp.*": 0.8, "*": 0.5}, method="wanda", exclude=("*.o_proj",), seed=3)
    plan = Plan([rule, Quantize(format="int8")], target="cpu")
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(plan) == hash(Plan.from_json(plan.to_json()))


def test_errors_at_the_door() -> None:
    model = model_of()
    with pytest.raises(PlanError, match=r"looks at inputs: give calibration batches"):
        tiny.lower(model, Prune())
    with pytest.raises(PlanError, match=r"self_attn\.q_proj\.weight: pattern 2:7 needs groups of 7 inputs"):
        tiny.lower(model, Prune(pattern="2:7", method="magnitude"))
    with pytest.raises(PlanError, match="matches no linear that is still dense"):
        tiny.lower(model, Prune(match="*.donw_proj", method="magnitude"))
    with pytest.raises(PlanError, match="matches no linear that is still dense"):
        tiny.lower(model, HALF, Prune(match="*.mlp.*", method="magnitude"))
    tied = tiny.llama(tie_word_embeddings=True)
    assert not [n for n in pruned(tiny.lower(tied, HALF)) if "embed" in n or "lm_head" in n]
    with pytest.raises((RefusedError, SparsifyError), match=r"lm_head|embed_tokens"):
        tiny.lower(tied, Prune(match="lm_head", method="magnitude", sparsity=0.5))


# --- beside the other rules -------------------------------------------------------------------------------------------------

BESIDE: dict[str, tuple[Any, ...]] = {
    "s2ft": (S2FT(fraction=0.1, producer_fraction=0.1, budget="structure"),),
    "paca": (PaCA(rank=4),),
    "paca in place": (PaCA(rank=4, permute=False),),
    "rosa": (RoSA(rank=2, density=0.05),),
    "rosa, sparse only": (RoSA(rank=0, density=0.05),),
    "lora": (LoRA(rank=2),),
    "int8 + lora": (Quantize(format="int8"), LoRA(rank=2)),
    "int8 + s2ft": (Quantize(format="int8"), S2FT(fraction=0.1, budget="structure")),
    "int8 + rosa": (Quantize(format="int8"), RoSA(rank=2, density=0.05)),
}


@pytest.mark.parametrize("kind", list(BESIDE))
@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_adapters_on_a_sparse_base_keep_the_mask_when_merged(family: str, kind: str) -> None:
    host = compiled(Prune(sparsity=0.6), *BESIDE[kind], name=family)
    masks = pruned(host)
    base = logits(host, family)
    start = host.sparsify.plain().state_dict()
    assert not nonzero_where_pruned(start, masks)
    tiny.train(host, input_ids=tiny.tokens())
    tiny.disturb(host, 0.02)  # noise on everything that trains, as no optimizer would do
    trained = logits(host, family)
    assert not torch.allclose(trained, base, atol=1e-3)
    low_rank = any(getattr(rule, "rank", 0) and not isinstance(rule, PaCA) for rule in BESIDE[kind])
    packed = isinstance(BESIDE[kind][0], Quantize)
    full = host.sparsify.plain().state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host.sparsify.merge()
    assert any("pruned entries" in str(w.message) for w in caught) == low_rank
    merged = host.sparsify.plain().state_dict()
    assert not nonzero_where_pruned(merged, masks)
    for name, mask in masks.items():
        step = 1.5 / 254 * float((full[name] * mask).abs().max()) if packed else 0  # half a step, and fp16 before it
        torch.testing.assert_close(merged[name], full[name] * mask, atol=step + 1e-6, rtol=1e-5)
    assert bool(nonzero_where_pruned(full, masks)) == low_rank
    if not low_rank and not packed:
        torch.testing.assert_close(logits(host, family), trained, atol=1e-5, rtol=1e-4)
    host.sparsify.unmerge()
    torch.testing.assert_close(logits(host, family), trained, atol=0, rtol=0)
    host.sparsify.set_adapter(None)
    torch.testing.assert_close(logits(host, family), base, atol=1e-6, rtol=1e-5)
    tiny.assert_same(host.sparsify.plain().state_dict(), start)


@pytest.mark.parametrize("kind", ["s2ft", "rosa", "lora"])
def test_an_adapter_on_a_sparse_base_is_saved_and_found_again(kind: str, tmp_path: Path) -> None:
    host = compiled(Prune(sparsity=0.6), *BESIDE[kind])
    tiny.train(host, input_ids=tiny.tokens())
    host.sparsify.save_adapter(tmp_path / "a")
    expected = logits(host)
    again = compiled(Prune(sparsity=0.6), *BESIDE[kind])
    again.sparsify.load_adapter(tmp_path / "a", "a")
    again.sparsify.set_adapter("a")
    torch.testing.assert_close(logits(again), expected)
    other = compiled(Prune(sparsity=0.5), *BESIDE[kind])  # another sparse base
    with pytest.raises(sparsify.AdapterError, match=r"base"):
        other.sparsify.load_adapter(tmp_path / "a", "a")


def test_a_student_is_not_saved_as_an_empty_adapter(tmp_path: Path) -> None:
    host = compiled(Prune(sparsity=0.6))
    tiny.train(host, input_ids=tiny.tokens())
    with pytest.raises(sparsify.AdapterError, match=r"save_pretrained .* save_sparse"):
        host.sparsify.save_adapter(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_rosa_chooses_entries_among_the_survivors() -> None:
    host = compiled(Prune(sparsity=0.6), RoSA(rank=0, density=0.05))
    for part in host.sparsify.program.lowranks:
        survivors = host.sparsify.program.masks[part.param].flatten()
        assert bool(survivors[part.index.long()].all()), part.param


def test_int8_keeps_exact_zeros() -> None:
    host = compiled(Prune(sparsity=0.6), Quantize(format="int8"))
    assert not nonzero_where_pruned(host.sparsify.plain().state_dict(), pruned(host))
    dense = compiled(Prune(sparsity=0.6))
    near, exact = logits(host), logits(dense)
    assert 0 < float((near - exact).abs().max() / exact.abs().max()) < 0.1


# --- loops -------------------------------------------------------------------------------------------------------------------


def test_a_gradient_scaler_skips_overflowing_steps_and_keeps_the_masks() -> None:
    host = compiled(HALF).train()
    optimizer = torch.optim.AdamW(host.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    name = "model.layers.0.mlp.up_proj.weight"
    mask = pruned(host)[name]
    start = host.get_parameter(name).detach().clone()
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = host(input_ids=tiny.tokens(), labels=tiny.tokens()).loss
        scaler.scale(loss).backward()
        if step == 0:
            host.get_parameter(name).grad[mask] = float("inf")  # type: ignore[index]
        scaler.unscale_(optimizer)
        assert bool((host.get_parameter(name).grad[~mask] == 0).all())  # type: ignore[index]
        torch.nn.utils.clip_grad_norm_(host.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        check_masks(host)
        if step == 0:
            assert torch.equal(host.get_parameter(name), start)
    assert not torch.equal(host.get_parameter(name), start)


def test_a_compiled_student_with_masks_and_a_teacher() -> None:
    host = compiled(HALF)
    distiller = Distiller(host, model_of(), kl=1.0)
    batch = batches()[1]
    plain = distiller(batch)
    plain.loss.backward()
    expected = {n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None}
    host.zero_grad()
    torch._dynamo.reset()
    result = distiller(batch, model=torch.compile(host, backend="aot_eager", fullgraph=True))
    result.loss.backward()
    torch.testing.assert_close(result.loss, plain.loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(host.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-3)
    for name, mask in pruned(host).items():
        assert bool((host.get_parameter(name).grad[~mask] == 0).all())
    torch._dynamo.reset()


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen rows of tokens with padding of unequal lengths."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = tiny.tokens(16, 8)[i]
        mask = (torch.arange(8) < 8 - i % 4).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def fine_tune(folder: Path, resume: Path | None = None, **options: Any) -> tuple[nn.Module, dict[int, float]]:
    """Six steps of Trainer with SquareHead on a pruned Llama, two micro-batches each; the host and the loss of each step."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 1e-3,
        "logging_steps": 1, "save_steps": 3, "max_grad_norm": 0.1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "seed": 3, "dataloader_pin_memory": False,
    } | options  # fmt: skip
    arguments = hf.TrainingArguments(output_dir=str(folder), **settings)
    host = compiled(Prune(sparsity=0.6))
    distiller = Distiller(host, model_of(), ce=1, kl=0.5, sq=1)
    trainer = distillation_trainer()(model=host, args=arguments, train_dataset=Rows(), distiller=distiller)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return host, {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}


def test_trainer_with_squarehead_resumes_exactly_and_saves_dense_files(tmp_path: Path) -> None:
    host, losses = fine_tune(tmp_path / "a")
    masks = pruned(host)
    check_masks(host)
    assert losses[6] < losses[1]
    resumed, rest = fine_tune(tmp_path / "b", resume=tmp_path / "a" / "checkpoint-3")
    assert [rest[s] for s in (4, 5, 6)] == [losses[s] for s in (4, 5, 6)]
    tiny.assert_same(resumed.state_dict(), host.state_dict())
    dense = hf.LlamaForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-6")
    assert not nonzero_where_pruned(dense.state_dict(), masks)
    tiny.assert_same(dict(dense.named_parameters()), {n: p.data for n, p in host.named_parameters()})


def test_trainer_with_squarehead_in_bf16_and_with_checkpointing(tmp_path: Path) -> None:
    exact, losses = fine_tune(tmp_path / "a", max_steps=2)
    half, near = fine_tune(
        tmp_path / "b", max_steps=2, bf16=True, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    check_masks(half)
    assert near[1] == pytest.approx(losses[1], rel=0.05)
    assert next(half.parameters()).dtype == torch.float32
    del exact


# --- the driver behind it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_one_hessian_is_alive_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also none while the next group is collected: with its factor, two matrices of a layer's width at most."""
    alive: set[int] = set()
    most = 0

    class Counted(sequential.Hessian):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nonlocal most
            super().__init__(*args, **kwargs)
            alive.add(id(self.matrix))
            weakref.finalize(self.matrix.untyped_storage(), alive.discard, id(self.matrix))
            most = max(most, len(alive))

    made = 0
    original = sequential.inverse_factor

    def counted_factor(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(sequential, "Hessian", Counted)
    monkeypatch.setattr(sequential, "inverse_factor", counted_factor)
    model = tiny.build(family)
    program = sparsify.analyse(model)
    names, _ = Prune().targets(program)
    prune_model(
        model, program, [(n, Prune(sparsity=0.5)) for n in names], batches(), progress=False, max_hessian_bytes=1
    )
    groups = 4 if family == "Llama" else 2 + 2 * model.config.num_local_experts
    assert made == 2 * groups
    assert most == 1


def test_a_progress_bar_counts_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    sparsify.compile(model_of(), Plan([HALF]), progress=True)
    shown = capsys.readouterr().err
    assert "pruning" in shown
    assert "14/14" in shown
    sparsify.compile(model_of(), Plan([HALF]), progress=False)
    assert not capsys.readouterr().err


def prune_and_die(folder: str, layer: int) -> None:
    """Prunes as the test below does, and is killed by the operating system in the middle of a layer."""
    torch.set_num_threads(1)
    original, calls = sequential.sparsegpt_prune, 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == layer:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    sequential.sparsegpt_prune = killed  # type: ignore[assignment]
    tiny.lower(model_of(), Prune(sparsity=0.6), calibration=batches(), resume_dir=folder)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = processes.start(prune_and_die, str(tmp_path), 9)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    calls = 0
    original = sequential.sparsegpt_prune

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(sequential, "sparsegpt_prune", counted)
    resumed = tiny.lower(model_of(), Prune(sparsity=0.6), calibration=batches(), resume_dir=tmp_path)
    assert calls == 14 - 7  # q, k, v; o; gate, up; down of the first layer were finished, the ninth weight was not
    whole = compiled(Prune(sparsity=0.6))
    tiny.assert_same(resumed.state_dict(), whole.state_dict())
    with pytest.raises(PlanError, match="another pruning run"):
        tiny.lower(tiny.build("Llama", seed=1), Prune(sparsity=0.6), calibration=batches(), resume_dir=tmp_path)

"""SquareHead, KL, the distiller in loops and Trainer, gradual pruning. One test per known mistake of the release."""

from __future__ import annotations

import copy
import itertools
import os
import socket
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn

from sparsify import Prune
from sparsify.errors import PlanError, SparsifyError
from sparsify.model.blocks import repeated_blocks
from sparsify.modules.masked import check_masks, mask_modules, mask_state
from sparsify.pruning.sparse_checkpoint import open_sparse
from sparsify.train.schedules import CubicSchedule, GradualPruner, cubic_sparsity, gradual_pruning_callback
from sparsify.train.squarehead import Distiller, distillation_trainer, kl_loss, squarehead_loss
from sparsify.train.teacher import Int8Linear, int8_copy


def oracle(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> float:
    """`Σ_l mean((h_s − h_t)²) / mean(h_t²)` in fp64, token by token."""
    total = 0.0
    for own, other in zip(student, teacher, strict=True):
        difference = energy = count = 0.0
        for row, column in mask.nonzero().tolist():
            difference += float((own[row, column].detach().double() - other[row, column].double()).square().sum())
            energy += float(other[row, column].double().square().sum())
            count += own.shape[-1]
        total += (difference / count) / (energy / count)
    return total


def states(layers: int = 3, scale: float = 1.0, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = [torch.randn(2, 5, 7, generator=generator) * scale for _ in range(layers)]
    student = [h + torch.randn(h.shape, generator=generator) * scale * 0.3 for h in teacher]
    return student, teacher, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def disturbed(model: nn.Module, amount: float = 0.1) -> nn.Module:
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1 + amount * torch.randn(p.shape, generator=generator))
    return student


def batch(rows: int = 4, length: int = 9, pads: tuple[int, ...] = (0, 3, 5, 1), seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, tiny.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, length - pad :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def parts(whole: dict[str, Tensor], *cuts: int) -> list[dict[str, Tensor]]:
    edges = [0, *cuts, len(whole["input_ids"])]
    return [{k: v[a:b] for k, v in whole.items()} for a, b in itertools.pairwise(edges)]


# --- the functions -----------------------------------------------------------------------------------------------------------


def test_squarehead_is_its_fp64_oracle() -> None:
    student, teacher, mask = states()
    assert float(squarehead_loss(student, teacher, mask)) == pytest.approx(oracle(student, teacher, mask), rel=1e-4)
    everything = torch.ones_like(mask)
    assert float(squarehead_loss(student, teacher)) == pytest.approx(oracle(student, teacher, everything), rel=1e-4)


def token_oracle(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> float:
    """`Σ_l mean over tokens of mean_h((h_s − h_t)²) / mean_h(h_t²)` in fp64, token by token."""
    total = 0.0
    for own, other in zip(student, teacher, strict=True):
        terms = []
        for row, column in mask.nonzero().tolist():
            h_s, h_t = own[row, column].detach().double(), other[row, column].double()
            terms.append(float((h_s - h_t).square().mean() / h_t.square().mean()))
        total += sum(terms) / len(terms)
    return total


def test_the_variant_per_token_is_its_fp64_oracle() -> None:
    student, teacher, mask = states()
    teacher[0][:, 0] *= 40  # an attention sink
    for kept in (mask, torch.ones_like(mask)):
        found = float(squarehead_loss(student, teacher, kept, normalise="token"))
        assert found == pytest.approx(token_oracle(student, teacher, kept), rel=1e-4)
        assert found != pytest.approx(oracle(student, teacher, kept), rel=0.1), "the paper's is another number"
    assert float(squarehead_loss(student, teacher, mask)) == pytest.approx(oracle(student, teacher, mask), rel=1e-4)
    wanted = [h.double().requires_grad_() for h in student]
    x = [h.clone().requires_grad_() for h in student]
    squarehead_loss(x, teacher, mask, normalise="token").backward()
    kept = mask.bool()
    sum(
        ((a - b).square().mean(-1) / b.square().mean(-1))[kept].mean() for a, b in zip(wanted, teacher, strict=True)
    ).backward()
    for own, right in zip(x, wanted, strict=True):
        assert own.grad is not None
        assert right.grad is not None
        torch.testing.assert_close(own.grad.double(), right.grad, rtol=1e-4, atol=1e-8)


def test_a_token_that_holds_the_energy_hides_the_others_from_the_paper_s_loss_only() -> None:
    """Every token but the first is wrong by its own size: SmolLM2's first token holds 99.4 % of a layer's energy."""
    teacher = torch.ones(1, 8, 4)
    teacher[:, 0] *= 34  # 99.4 %
    student = teacher.clone()
    student[:, 1:] *= 2
    assert float(squarehead_loss([student], [teacher])) < 0.01
    assert float(squarehead_loss([student], [teacher], normalise="token")) == pytest.approx(7 / 8, rel=1e-4)
    zero = torch.zeros(1, 8, 4)
    assert float(squarehead_loss([student], [zero], normalise="token")) == pytest.approx(float(student.square().mean()))
    with pytest.raises(PlanError, match="expected 'layer' .* or 'token'"):
        Distiller(disturbed(tiny.llama()), tiny.llama(), normalise="row")  # type: ignore[arg-type]


@pytest.mark.parametrize("normalise", ["layer", "token"])
def test_padding_does_not_count(normalise: Any) -> None:
    student, teacher, mask = states()
    expected = squarehead_loss(student, teacher, mask, normalise=normalise)
    for h in (*student, *teacher):
        h[mask == 0] = 1e4
    assert torch.allclose(squarehead_loss(student, teacher, mask, normalise=normalise), expected)


def test_epsilon_is_relative() -> None:
    """Known mistake: ε = 0.0078 in the denominator turned the term of a layer with small hidden states from 0.62 into 0.0085."""
    student, teacher, mask = states(1)
    expected = float(squarehead_loss(student, teacher, mask))
    for scale in (1e-3, 1e-6, 1e3):
        found = squarehead_loss([h * scale for h in student], [h * scale for h in teacher], mask)
        assert float(found) == pytest.approx(expected, rel=1e-4)
    small = float(oracle([h * 0.01 for h in student], [h * 0.01 for h in teacher], mask))
    absolute = (
        small * float((teacher[0] * 0.01).square().mean()) / (float((teacher[0] * 0.01).square().mean()) + 0.0078)
    )
    assert absolute < 0.05 * expected  # what the mistake would give


def test_a_layer_of_zeros_gives_no_nan() -> None:
    student, teacher, mask = states(2)
    teacher[0].zero_()
    student[0].requires_grad_()
    loss = squarehead_loss(student, teacher, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student[0].grad).all()  # type: ignore[arg-type]


def test_layers_are_summed_not_averaged() -> None:
    student, teacher, mask = states(3)
    each = [float(squarehead_loss([s], [t], mask)) for s, t in zip(student, teacher, strict=True)]
    assert float(squarehead_loss(student, teacher, mask)) == pytest.approx(sum(each), rel=1e-5)


def test_reductions_are_fp32_in_half_precision_and_under_autocast() -> None:
    student, teacher, mask = ([h * 200 for h in group] if isinstance(group, list) else group for group in states())
    expected = float(
        squarehead_loss([h.bfloat16().float() for h in student], [h.bfloat16().float() for h in teacher], mask)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = squarehead_loss([h.bfloat16() for h in student], [h.bfloat16() for h in teacher], mask)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-5)
    half = squarehead_loss([h.half() * 100 for h in student], [h.half() * 100 for h in teacher], mask)
    assert torch.isfinite(half)  # squares beyond 65 504


def test_kl_is_shifted_once() -> None:
    """Known mistake: the KL mask off by one. Logits at t predict token t + 1, so they count when token t + 1 is a target."""
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 4, 5, -100], [-100, 1, -100, 3, 2]])
    valid = labels != -100
    log_s, log_t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    terms = []
    for row in range(2):
        for t in range(4):
            if labels[row, t + 1] != -100:
                terms.append(float((log_t[row, t].exp() * (log_t[row, t] - log_s[row, t])).sum()))
    assert float(kl_loss(student, teacher, valid)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    # changing logits that predict padding or the prompt, or the last position's, changes nothing
    changed = student.clone()
    changed[0, 0], changed[0, 3], changed[:, 4] = 9.0, 9.0, 9.0
    assert torch.allclose(kl_loss(changed, teacher, valid), kl_loss(student, teacher, valid))
    unshifted = kl_loss(student, teacher, valid, shift=False)
    assert not torch.allclose(unshifted, kl_loss(student, teacher, valid))


def test_kl_temperature_and_classifiers() -> None:
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    soft = (
        torch.nn.functional.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean") * 4
    )
    assert torch.allclose(kl_loss(student, teacher, temperature=2.0), soft, atol=1e-6)
    assert float(kl_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(PlanError, match="logits have shape"):
        kl_loss(student, teacher[:, :3])


def test_shapes_and_depths_must_agree() -> None:
    student, teacher, mask = states()
    with pytest.raises(PlanError, match="3 hidden states and the teacher 2"):
        squarehead_loss(student, teacher[:2], mask)
    with pytest.raises(PlanError, match="hidden state 1"):
        squarehead_loss(student, [teacher[0], teacher[1][..., :5], teacher[2]], mask)


# --- matching by blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "T5 (gated)", "BERT (classifier)", "ViT", "Whisper", "Mixtral"])
def test_blocks_of_every_family_are_found(family: str) -> None:
    model = tiny.build(family)
    stacks = repeated_blocks(model)
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    assert [len(stack) for stack in stacks] == ([2, 2] if seq2seq else [2])


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "T5 (gated)", "Whisper", "BERT (classifier)"])
def test_the_distiller_compares_block_outputs_and_not_embeddings(family: str) -> None:
    teacher = tiny.build(family)
    student = disturbed(teacher)
    inputs = tiny.inputs_of(teacher, family)
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for kind, model in (("student", student), ("teacher", teacher)):
        for stack in repeated_blocks(model):
            for block in stack.modules:
                block.register_forward_hook(
                    lambda _m, _a, out, kind=kind: seen[kind].append(out if isinstance(out, Tensor) else out[0])
                )
    result = Distiller(student, teacher, ce=0, sq=1)(inputs)
    given = inputs.get("attention_mask", torch.empty(0, 0))
    masks = [given if h.shape[:2] == given.shape else None for h in seen["student"]]
    pairs = zip(seen["student"], seen["teacher"], masks, strict=True)
    expected = sum(oracle([s], [t], torch.ones(s.shape[:2]) if m is None else m) for s, t, m in pairs)
    assert len(seen["student"]) == (4 if getattr(student.config, "is_encoder_decoder", False) else 2)
    assert float(result.sq) == pytest.approx(expected, rel=1e-3)
    result.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_encoder_decoder_masks() -> None:
    teacher = tiny.build("T5 (gated)")
    student = disturbed(teacher)
    inputs = batch(3, 7, (0, 2, 4))
    inputs["labels"] = batch(3, 7, (3, 1, 0), seed=4)[
        "labels"
    ]  # same length on both sides: only the graph tells them apart
    distiller = Distiller(student, teacher, ce=1, kl=1, sq=1)
    assert distiller.encoder_blocks == [True, True, False, False]
    reference = distiller(inputs)
    other = copy.deepcopy(inputs)
    other["input_ids"][other["attention_mask"] == 0] = 5  # padding of the encoder
    changed = distiller(other)
    assert float(changed.sq) == pytest.approx(float(reference.sq), rel=1e-4)
    assert float(changed.kl) == pytest.approx(float(reference.kl), rel=1e-3)


def test_other_layer_names_match() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "vocab_size": tiny.VOCABULARY}
    teacher = hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=2, **sizes))
    student = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(num_hidden_layers=2, max_position_embeddings=32, **sizes))
    result = Distiller(student, teacher, sq=1, ce=0)(batch())
    assert torch.isfinite(result.loss)


def test_teachers_that_do_not_fit_are_refused() -> None:
    student = tiny.llama()
    with pytest.raises(PlanError, match=r"another depth: 3 blocks in model\.layers, but the student has 2 blocks"):
        Distiller(student, tiny.llama(num_hidden_layers=3))
    with pytest.raises(PlanError, match="another hidden size"):
        Distiller(student, tiny.llama(hidden_size=48))
    with pytest.raises(PlanError, match="another vocabulary"):
        Distiller(student, tiny.llama(vocab_size=71))
    with pytest.raises(PlanError, match="student itself"):
        Distiller(student, student)
    with pytest.raises(PlanError, match="no repeated blocks"):
        Distiller(nn.Linear(2, 2), nn.Linear(2, 2))

    class Words:
        def __init__(self, words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {w: i for i, w in enumerate(self.words)}

    with pytest.raises(PlanError, match="another tokenizer"):
        Distiller(student, tiny.llama(), tokenizers=(Words("abc"), Words("acb")))
    with pytest.raises(PlanError, match="must be positive"):
        Distiller(student, tiny.llama(), temperature=0)


# --- loops -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", ["layer", "token"])
def test_accumulation_over_uneven_micro_batches_is_the_full_batch(normalise: Any) -> None:
    teacher = tiny.llama()
    student = disturbed(teacher)
    distiller = Distiller(student, teacher, ce=1.0, kl=0.5, sq=2.0, normalise=normalise)
    whole = batch()
    full = distiller(whole)
    full.loss.backward()
    expected = [p.grad.clone() for p in student.parameters()]  # type: ignore[union-attr]
    student.zero_grad()
    micro = parts(whole, 1, 2)
    for keep in (True, False):
        student.zero_grad()
        window = distiller.window(micro, keep=keep)
        total = 0.0
        for part in micro:
            result = distiller(part, window=window)
            result.loss.backward()
            total += result.loss.detach().item()
        assert total == pytest.approx(float(full.loss.detach()), rel=1e-5)
        for p, g in zip(student.parameters(), expected, strict=True):
            assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6)  # type: ignore[arg-type]


def test_checkpointing_autocast_and_reentrant_checkpointing() -> None:
    teacher = tiny.llama()
    student = disturbed(teacher).train()
    distiller = Distiller(student, teacher)
    plain = distiller(batch())
    plain.loss.backward()
    expected = student.model.layers[0].mlp.up_proj.weight.grad.clone()
    student.zero_grad()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    distiller(batch()).loss.backward()
    assert torch.allclose(student.model.layers[0].mlp.up_proj.weight.grad, expected, atol=1e-6)
    assert not distiller.student_outputs.store  # the recomputation leaves nothing behind
    with torch.autocast("cpu", torch.bfloat16):
        half = distiller(batch())
    assert half.sq.dtype == torch.float32
    assert float(half.sq) == pytest.approx(float(plain.sq), rel=0.2)
    half.loss.backward()


def test_compiled_students() -> None:
    teacher = tiny.llama()
    student = disturbed(teacher)
    distiller = Distiller(student, teacher, kl=1.0)
    plain = distiller(batch())
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    result = distiller(batch(), model=compiled)
    assert float(result.loss) == pytest.approx(float(plain.loss), rel=1e-5)
    result.loss.backward()
    assert student.model.embed_tokens.weight.grad is not None


def test_the_teacher_is_eval_inference_and_left_as_it_was() -> None:
    teacher = tiny.llama(attention_dropout=0.5).train()
    student = disturbed(tiny.llama()).eval()
    modes: list[tuple[bool, bool]] = []
    teacher.model.layers[0].register_forward_hook(
        lambda m, _a, _o: modes.append((m.training, torch.is_inference_mode_enabled()))
    )
    distiller = Distiller(student, teacher, ce=0, kl=1)
    one, two = distiller(batch()), distiller(batch())
    assert modes[0] == (False, True)
    assert teacher.training
    assert torch.equal(one.loss, two.loss)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_cached_teacher_runs_once(kind: str, tmp_path: Path) -> None:
    teacher = tiny.llama()
    student = disturbed(teacher)
    distiller = Distiller(student, teacher, kl=1.0, cache="memory" if kind == "memory" else tmp_path)
    calls: list[int] = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    first = distiller(batch())
    second = distiller(batch())
    assert torch.equal(first.loss, second.loss)
    distiller(batch(seed=3))
    assert len(calls) == 2
    assert distiller.cache is not None
    assert distiller.cache.hits == 1


def test_an_int8_teacher_is_near_and_small() -> None:
    teacher = tiny.build("T5 (gated)")
    before = tiny.snapshot(teacher)
    small = int8_copy(teacher)
    assert any(isinstance(m, Int8Linear) for m in small.modules())
    tiny.assert_same(tiny.snapshot(teacher), before)
    inputs = batch(3, 7, (0, 2, 4))
    exact = Distiller(disturbed(teacher), teacher)(inputs)
    near = Distiller(disturbed(teacher), teacher, int8=True)(inputs)
    assert float(near.sq) == pytest.approx(float(exact.sq), rel=0.1)


def test_without_labels_the_cause_is_named() -> None:
    teacher = tiny.llama()
    student = disturbed(teacher)
    data = batch()
    del data["labels"]
    with pytest.raises(SparsifyError, match="put labels in the batch"):
        Distiller(student, teacher)(data)
    assert torch.isfinite(Distiller(student, teacher, ce=0, kl=1)(data).loss)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.data = batch(12, 9, (0, 3, 5, 1, 2, 4, 0, 6, 1, 3, 2, 5))

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {k: v[index] for k, v in self.data.items()}


def arguments(folder: Path, **changes: Any) -> hf.TrainingArguments:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "report_to": [],
        "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "seed": 0, "optim": "sgd", "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "disable_tqdm": True, "dataloader_pin_memory": False,
    } | changes  # fmt: skip
    return hf.TrainingArguments(**settings)


def test_trainer_is_exact_under_accumulation(tmp_path: Path) -> None:
    teacher = tiny.llama()
    found = {}
    for size, steps in ((4, 1), (1, 4)):
        student = disturbed(teacher)
        distiller = Distiller(student, teacher, ce=1, kl=0.3, sq=1)
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trainer = distillation_trainer()(model=student, args=args, train_dataset=Rows(), distiller=distiller)
        trainer.train()
        found[size] = (
            student.model.layers[0].mlp.up_proj.weight.detach().clone(),
            trainer.state.log_history[0]["loss"],
        )
    assert torch.allclose(found[4][0], found[1][0], atol=1e-5)
    assert found[4][1] == pytest.approx(found[1][1], rel=1e-3)
    assert not torch.allclose(found[4][0], disturbed(teacher).model.layers[0].mlp.up_proj.weight, atol=1e-5)  # type: ignore[union-attr]
    metrics = trainer.evaluate(Rows())
    assert torch.isfinite(torch.tensor(metrics["eval_loss"]))


# --- schedules ---------------------------------------------------------------------------------------------------------------------


def test_the_cubic() -> None:
    at = lambda t: cubic_sparsity(t, start=10, end=30, final=0.9, initial=0.1)  # noqa: E731
    assert [at(t) for t in (0, 10, 30, 99)] == pytest.approx([0.1, 0.1, 0.9, 0.9])
    assert at(20) == pytest.approx(0.9 - 0.8 / 8)
    schedule = CubicSchedule(start=10, end=30, final=0.9, initial=0.1, every=7)
    assert [schedule.at(t) for t in (9, 10, 16, 17, 29, 30)] == pytest.approx([0.1, 0.1, 0.1, at(17), at(24), 0.9])
    with pytest.raises(PlanError, match="end must come after start"):
        cubic_sparsity(0, start=3, end=3, final=0.5)
    with pytest.raises(PlanError, match="final=1"):
        CubicSchedule(start=0, end=1, final=1.0)
    with pytest.raises(PlanError, match="every=0"):
        CubicSchedule(start=0, end=1, final=0.5, every=0)


@pytest.mark.parametrize(("pattern", "final"), [("unstructured", 0.8), ("1:4", 0.75), ("4x1", 0.75)])
def test_gradual_pruning_in_a_loop(pattern: str, final: float) -> None:
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    pruner = GradualPruner(
        net, CubicSchedule(start=1, end=6, final=final), names=["0.weight", "2.weight"], pattern=pattern
    )
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    previous = [m.clone() for m in mask_state(net).values()]
    reached = []
    for step in range(8):
        optimizer.zero_grad()
        net(torch.randn(6, 12)).square().sum().backward()
        optimizer.step()
        reached.append(pruner.step(step + 1, optimizer))
        check_masks(net)
        masks = list(mask_state(net).values())
        assert all(
            bool(((new & ~old) == 0).all()) for new, old in zip(masks, previous, strict=True)
        )  # nothing grows back
        previous = [m.clone() for m in masks]
    assert reached == sorted(reached)
    zeros = float((net[0].weight == 0).float().mean())
    assert zeros == pytest.approx(final, abs=0.02)
    state = optimizer.state[net[0].weight]
    assert bool((state["exp_avg"][net[0].weight == 0] == 0).all())


def test_a_schedule_in_epochs_and_a_host_that_is_sparse_already(tmp_path: Path) -> None:
    schedule = CubicSchedule(start=0.5, end=2.5, final=0.8, initial=0.5, every=0.25, unit="epoch")
    assert [schedule.at(t) for t in (0.49, 0.6, 2.5)] == pytest.approx([0.5, 0.5, 0.8])
    assert schedule.at(1.0) == pytest.approx(0.8 - 0.3 * 0.75**3)
    host = tiny.lower(tiny.llama(), Prune(sparsity=0.5, method="magnitude"))
    pruner = GradualPruner(host, schedule)
    args = arguments(tmp_path, num_train_epochs=3)
    hf.Trainer(model=host, args=args, train_dataset=Rows(), callbacks=[gradual_pruning_callback(pruner)]).train()
    check_masks(host)
    assert pruner.sparsity == pytest.approx(0.8)
    report = host.sparsify.save_sparse(tmp_path / "a.sparse")  # with the masks of now, not those of compilation
    saved = open_sparse(tmp_path / "a.sparse")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(saved.mask(name), host.get_parameter(name) != 0)
    assert saved.entries[name].sparsity == pytest.approx(0.8, abs=0.01)
    assert report.sparse < 0.6 * report.dense


def test_regrowth_only_when_asked() -> None:
    net = nn.Sequential(nn.Linear(12, 16))
    pruner = GradualPruner(net, CubicSchedule(start=0, end=2, final=0.5, every=1), names=["0.weight"], regrow=True)
    pruner.prune(0.75)
    pruner.prune(0.25)
    assert float(net[0].mask().float().mean()) == pytest.approx(0.75, abs=0.01)  # type: ignore[operator]
    with pytest.raises(PlanError, match="no masks"):
        GradualPruner(nn.Linear(2, 2), CubicSchedule(start=0, end=2, final=0.5))
    with pytest.raises(PlanError, match="no parameter 'x'"):
        GradualPruner(nn.Linear(2, 2), CubicSchedule(start=0, end=2, final=0.5), names=["x"])


def test_gradual_pruning_in_trainer_and_after_resuming(tmp_path: Path) -> None:
    def run(folder: Path, resume: str | None = None, stop: int | None = None) -> nn.Module:
        model = tiny.llama()
        names = [n for n, p in model.named_parameters() if n.endswith("_proj.weight")]
        pruner = GradualPruner(model, CubicSchedule(start=1, end=5, final=0.8), names=names)
        args = arguments(
            folder, num_train_epochs=2, save_strategy="steps", save_steps=3, optim="adamw_torch", max_steps=6
        )
        callbacks: list[Any] = [gradual_pruning_callback(pruner)]
        if stop is not None:

            class Stop(hf.TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    control.should_training_stop = state.global_step >= stop

            callbacks.append(Stop())
        trainer = hf.Trainer(model=model, args=args, train_dataset=Rows(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        if resume is None:
            assert any("sparsity" in entry for entry in trainer.state.log_history)
        check_masks(model)
        return model

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop=3)
    resumed = run(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-3"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert float((whole.get_parameter(name) == 0).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert torch.allclose(whole.get_parameter(name), resumed.get_parameter(name), atol=1e-5)
    os.remove(tmp_path / "cut" / "checkpoint-3" / "sparsify_masks.safetensors")
    with pytest.raises(PlanError, match="was not saved with this callback"):
        run(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-3"))
    plain = hf.LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")  # dense, with zeros
    assert float((plain.get_parameter(name) == 0).float().mean()) == pytest.approx(0.8, abs=0.01)


# --- two ranks ----------------------------------------------------------------------------------------------------------------------


def two_ranks(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    teacher = tiny.llama()
    student = disturbed(teacher)
    mask_modules(student, {"model.layers.0.mlp.up_proj.weight": masked_like(student)})
    distiller = Distiller(student, teacher, kl=0.5)
    wrapped = nn.parallel.DistributedDataParallel(student)
    own = parts(batch(), 1)[rank]  # one row here, three there
    result = distiller(own, model=wrapped, window=distiller.window([own]))
    result.loss.backward()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    grad = student.model.layers[0].mlp.up_proj.weight.grad.clone()
    optimizer.step()
    check_masks(student)
    if rank == 0:
        torch.save(grad, Path(folder) / "grad.pt")
    torch.distributed.destroy_process_group()


def trainer_on_two_ranks(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    student = trained_by_trainer(Path(folder) / "ddp", **options)
    if rank == 0:
        torch.save(student.state_dict(), Path(folder) / "student.pt")
    torch.distributed.destroy_process_group()


def trained_by_trainer(folder: Path, **changes: Any) -> nn.Module:
    """A masked student after one optimizer step on eight rows, taken in their order."""
    teacher = tiny.llama()
    student = disturbed(teacher)
    mask_modules(student, {"model.layers.0.mlp.up_proj.weight": masked_like(student)})
    args = arguments(folder, max_steps=1, learning_rate=1.0, train_sampling_strategy="sequential", **changes)
    distiller = Distiller(student, teacher, ce=1, kl=0.3, sq=1)
    distillation_trainer()(model=student, args=args, train_dataset=Rows(), distiller=distiller).train()
    check_masks(student)
    return student


@pytest.mark.slow
def test_trainer_on_two_ranks_with_accumulation_is_the_full_batch(tmp_path: Path) -> None:
    processes.spawn(trainer_on_two_ranks, (free_port(), str(tmp_path)), 2)
    found = torch.load(tmp_path / "student.pt")
    single = trained_by_trainer(tmp_path / "one", per_device_train_batch_size=8)
    start = disturbed(tiny.llama()).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    moved = float((single.state_dict()[name] - start[name])[masked_like(single)].abs().max())
    assert moved > 1e-3
    for key, value in single.state_dict().items():
        torch.testing.assert_close(found[key], value, atol=1e-3 * moved, rtol=0)


def masked_like(model: nn.Module) -> Tensor:
    shape = model.get_parameter("model.layers.0.mlp.up_proj.weight").shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_uneven_ranks_give_the_full_batch(tmp_path: Path) -> None:
    processes.spawn(two_ranks, (free_port(), str(tmp_path)), 2)
    teacher = tiny.llama()
    student = disturbed(teacher)
    mask_modules(student, {"model.layers.0.mlp.up_proj.weight": masked_like(student)})
    Distiller(student, teacher, kl=0.5)(batch()).loss.backward()
    expected = student.model.layers[0].mlp.up_proj.weight.grad  # type: ignore[union-attr]
    assert torch.allclose(torch.load(tmp_path / "grad.pt"), expected, rtol=1e-3, atol=1e-6)


def test_a_bias_is_not_pruned() -> None:
    model = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(PlanError, match=r"'0.bias' has shape \(5,\)"):
        GradualPruner(model, CubicSchedule(start=0, end=2, final=0.5), names=(n for n in ["0.bias"]))

"""SquareHead distillation (arXiv 2310.06927): the student's hidden states follow the teacher's, block by block.

    L = ce · CE + kl · KL + sq · SQ            SQ = Σ_l  mean((h_s − h_t)²) / mean(h_t²)

`mean` runs over non-padding tokens (the prompt included) × hidden channels, `l` over the outputs of the repeated blocks; the embedding's
output is not one of them. Reductions are in fp32, also under autocast. ε is *relative* to each layer's own energy, so a layer
with small hidden states counts like any other.

`normalise="token"` is *not* the paper's: SQ = Σ_l mean_t  mean_h((h_s − h_t)²) / mean_h(h_t²), every token relative to its own energy.
Where one token (an attention sink) holds 99 % of a layer's energy, as in SmolLM2, the paper's loss hardly sees the others; this one does.

    distiller = Distiller(student, teacher, ce=1, kl=0, sq=1)
    for batch in loader:                                        # any loop
        result = distiller(batch)                               # result.loss, .ce, .kl, .sq, .outputs
        result.loss.backward(); optimizer.step(); optimizer.zero_grad()

    window = distiller.window(micro_batches)                    # gradient accumulation and DDP, exactly the full batch's loss
    for batch in micro_batches:
        distiller(batch, window=window).loss.backward()

    trainer = distillation_trainer()(model=student, distiller=distiller, args=…)        # transformers.Trainer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sparsify.errors import PlanError, SparsifyError
from sparsify.model.blocks import Stack, repeated_blocks
from sparsify.train.teacher import TeacherCache, TeacherStates, int8_copy

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped
    from transformers import PreTrainedTokenizerBase

    from sparsify.calibration.statistics import Loss

IGNORED = -100


# --- the losses as functions -----------------------------------------------------------------------------------------------------


def token_sums(
    values: Float[Tensor, "*t hidden"], mask: Shaped[Tensor, "*t"] | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`(Σ over tokens and channels, number of tokens)` of `values (…, hidden)` in fp32; `mask (…)` True for tokens."""
    per_token = values.sum(-1)
    if mask is None:
        return per_token.sum(), torch.tensor(per_token.numel(), dtype=torch.float32, device=values.device)
    kept = mask.to(device=values.device, dtype=torch.bool)
    return per_token.masked_fill(~kept, 0).sum(), kept.sum().float()


def hidden_energy(
    hidden: Float[Tensor, "*t hidden"], mask: Shaped[Tensor, "*t"] | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`(Σ h², tokens)` of one layer, fp32 scalars."""
    return token_sums(hidden.float().square(), mask)


def squarehead_loss(
    student: Sequence[Float[Tensor, "batch tokens hidden"]],
    teacher: Sequence[Float[Tensor, "batch tokens hidden"]],
    mask: Shaped[Tensor, "batch tokens"] | Sequence[Shaped[Tensor, "batch tokens"] | None] | None = None,
    *,
    eps: float = 1e-6,
    totals: Sequence[tuple[Float[Tensor, ""], Float[Tensor, ""]]] | None = None,
    normalise: Literal["layer", "token"] = "layer",
) -> Float[Tensor, ""]:
    """`Σ_l mean((h_s − h_t)²) / (mean(h_t²) · (1 + ε))`, an fp32 scalar.

    student, teacher: block outputs, `(batch, tokens, hidden)` each, the embedding's output left out.
    mask: `(batch, tokens)`, True or 1 for tokens and False or 0 for padding; one for all layers or one per layer.
    eps: relative to each layer's own `mean(h_t²)`. A layer whose teacher is exactly zero is divided by 1 instead.
    totals: per layer `(Σ h_t², tokens)` over *all* micro-batches and ranks of the step: then the losses of the micro-batches add up
        to the loss of the full batch, however unevenly the tokens lie.
    normalise: "layer", the paper's; or "token", which is not: `Σ_l mean over tokens of mean_h((h_s − h_t)²) / (mean_h(h_t²) · (1 + ε))`. A
        token whose teacher state is exactly zero is divided by 1.
    Raises PlanError when numbers of layers or shapes differ.
    """
    if len(student) != len(teacher):
        raise PlanError(f"the student has {len(student)} hidden states and the teacher {len(teacher)}")
    shared = mask if isinstance(mask, Tensor) else None
    masks = [shared] * len(student) if mask is None or isinstance(mask, Tensor) else list(mask)
    device = student[0].device if student else torch.device("cpu")
    with torch.autocast(device.type, enabled=False):
        loss = torch.zeros((), device=device)
        for layer, (own, other, kept) in enumerate(zip(student, teacher, masks, strict=True)):
            if own.shape != other.shape:
                raise PlanError(
                    f"hidden state {layer}: the student has shape {tuple(own.shape)}, the teacher {tuple(other.shape)}"
                )
            other = other.to(own.device)
            if normalise == "token":
                relative, tokens = token_sums(relative_errors(own, other, eps), kept)
                loss = loss + relative / (tokens if totals is None else totals[layer][1]).clamp_min(1)
                continue
            squared, _ = token_sums((own.float() - other.float()).square(), kept)
            energy, all_tokens = hidden_energy(other, kept) if totals is None else totals[layer]
            # mean(d²) / mean(h_t²) = Σ d² / Σ h_t²: both means have the same count
            floor = torch.where(energy > 0, energy * (1 + eps), (all_tokens * own.shape[-1]).clamp_min(1))
            loss = loss + squared / floor
    return loss


def relative_errors(
    student: Float[Tensor, "*t hidden"], teacher: Float[Tensor, "*t hidden"], eps: float
) -> Float[Tensor, "*t 1"]:
    """`mean_h((h_s − h_t)²) / (mean_h(h_t²) · (1 + ε))` of every token, fp32 `(…, 1)`."""
    energy = teacher.float().square().mean(-1, keepdim=True)
    squared = (student.float() - teacher.float()).square().mean(-1, keepdim=True)
    return squared / torch.where(energy > 0, energy * (1 + eps), torch.ones_like(energy))


def shift_targets(
    logits: Float[Tensor, "batch tokens vocabulary"],
    other: Float[Tensor, "batch tokens vocabulary"],
    valid: Bool[Tensor, "batch tokens"],
) -> tuple[
    Float[Tensor, "batch tokens-1 vocabulary"],
    Float[Tensor, "batch tokens-1 vocabulary"],
    Bool[Tensor, "batch tokens-1"],
]:
    """Causal alignment: position `t` predicts token `t + 1`, so it counts when token `t + 1` is valid."""
    return logits[:, :-1], other[:, :-1], valid[:, 1:]


def kl_loss(
    student: Float[Tensor, "*t vocabulary"],
    teacher: Float[Tensor, "*t vocabulary"],
    valid: Shaped[Tensor, "*t"] | None = None,
    *,
    temperature: float = 1.0,
    shift: bool = True,
    total: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """`T² · mean KL(teacher ‖ student)` over valid predictions, an fp32 scalar.

    student, teacher: logits `(batch, tokens, vocabulary)`, or `(batch, classes)` without tokens.
    temperature: `T`, by which both logits are divided.
    valid: `(batch, tokens)`, True for *tokens* that are targets (labels ≠ −100, or the attention mask). With `shift` (causal models)
        logits at `t` are weighed by token `t + 1`; without (encoder–decoders, classifiers) by token `t`.
    total: number of valid predictions in the whole step (gradient accumulation, DDP) instead of in this batch.
    """
    if student.shape != teacher.shape:
        raise PlanError(
            f"KL: the student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        )
    kept = (
        torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
        if valid is None
        else valid.bool().to(student.device)
    )
    teacher = teacher.to(student.device)
    if shift and student.dim() == 3:
        student, teacher, kept = shift_targets(student, teacher, kept)
    with torch.autocast(student.device.type, enabled=False):
        log_s = F.log_softmax(student.float() / temperature, -1)
        log_t = F.log_softmax(teacher.float() / temperature, -1).clone()
        per_token = (log_t.exp() * (log_t - log_s)).sum(-1).masked_fill(~kept, 0)
        count = kept.sum().float() if total is None else total
        return per_token.sum() / count.clamp_min(1) * temperature**2


# --- hidden states of any model -----------------------------------------------------------------------------------------------------


def first_tensor(output: object) -> Tensor | None:
    """The hidden state in what a block returns: the first floating tensor with at least three axes, or the first one."""
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return next((t for t in leaves if t.dim() >= 3), leaves[0] if leaves else None)


class BlockOutputs:
    """Records the output of every repeated block during a forward, by forward hooks that are silent unless `armed`.

    Attach before `torch.compile`: a compiled model does not see hooks that come later. stacks: as `repeated_blocks` finds them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stacks: list[Stack] = repeated_blocks(model)
        if not self.stacks:
            raise PlanError(
                f"{type(model).__name__} has no repeated blocks (no ModuleList of layers): nothing to distil between"
            )
        self.armed = False
        self.store: dict[int, Tensor] = {}
        self.names = [name for stack in self.stacks for name in stack.names]
        modules = [module for stack in self.stacks for module in stack.modules]
        self.handles = [module.register_forward_hook(self._hook(i)) for i, module in enumerate(modules)]

    def _hook(self, slot: int) -> Callable[..., None]:
        def record(module: nn.Module, args: object, output: object) -> None:
            if self.armed:
                hidden = output if isinstance(output, Tensor) else first_tensor(output)
                if hidden is not None:
                    self.store[slot] = hidden

        return record

    def __enter__(self) -> BlockOutputs:
        self.store.clear()
        self.armed = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.armed = False
        if exc[0] is not None:
            self.store.clear()

    def take(self) -> list[Tensor]:
        """The recorded outputs, one per block; raises SparsifyError naming a block that did not run."""
        missing = [name for slot, name in enumerate(self.names) if slot not in self.store]
        if missing:
            raise SparsifyError(
                f"block {missing[0]} gave no hidden state in this forward (layer drop, or the model was compiled before the "
                "distiller was made)"
            )
        taken = [self.store[slot] for slot in range(len(self.names))]
        self.store.clear()
        return taken

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def in_encoder(model: nn.Module, name: str) -> bool:
    """Whether a block belongs to the encoder of an encoder–decoder."""
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if callable(get_encoder) and is_encoder_decoder(model) else None
    if not isinstance(encoder, nn.Module):
        return False
    block = model.get_submodule(name)
    return any(module is block for module in encoder.modules())


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def token_mask(
    batch: Mapping[str, object], hidden: Float[Tensor, "*t hidden"], encoder: bool, seq2seq: bool
) -> Bool[Tensor, "*t"] | None:
    """Non-padding tokens `(batch, tokens)` of a hidden state `(batch, tokens, hidden)`, or None when every position counts.

    Encoder blocks and plain models use `attention_mask`. Decoder blocks of an encoder–decoder use `decoder_attention_mask`,
    else labels ≠ −100. A mask of another length (downsampled speech frames) does not apply.
    """
    if seq2seq and not encoder:
        mask = batch.get("decoder_attention_mask")
        labels = batch.get("labels")
        if mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
            mask = labels != IGNORED
    else:
        mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:-1]:
        return None
    return mask.bool()


# --- the wrapper ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Distilled:
    """One step's losses, fp32 scalars; `loss` is the weighted sum, the others are unweighted. outputs: the student's."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    sq: Tensor
    outputs: Any  # of whatever class the student returns


@dataclass
class Window:
    """What one optimizer step covers: totals over its micro-batches (and ranks), and the teacher's states for each.

    energies: per layer `(Σ h_t², tokens)`. targets: label tokens for CE. predictions: valid predictions for KL.
    world: number of ranks whose gradients DDP will average.
    """

    energies: list[tuple[Tensor, Tensor]]
    targets: Tensor
    predictions: Tensor
    batches: int
    world: int
    states: deque[TeacherStates] = field(default_factory=deque)


class Distiller:
    """Cross-entropy, KL and SquareHead against a teacher, for any training loop.

    student: the trained model. Make the distiller *before* compiling it; wrap it (DDP, compile) freely and pass the wrapper as
        `model=` on each call.
    teacher: run in eval mode under `inference_mode`; never written, kept on its device.
    ce, kl, sq: weights. temperature: of the KL term. eps: relative, see `squarehead_loss`.
    normalise: "layer" is the paper's SquareHead; "token" is a variant of ours, see there.
    task_loss: `(outputs, batch) → scalar`, a mean over the batch; default: the model's own `outputs.loss`.
    cache: None, "memory", or a folder: the teacher's states of a batch are computed once (batches must repeat unchanged).
    int8: run the teacher with int8 weights (per output row, dequantised for each product).
    tokenizers: `(student's, teacher's)`, refused when their vocabularies differ.

    Raises PlanError for a teacher of other depth, hidden size or vocabulary.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        ce: float = 1.0,
        kl: float = 0.0,
        sq: float = 1.0,
        temperature: float = 1.0,
        eps: float = 1e-6,
        normalise: Literal["layer", "token"] = "layer",
        task_loss: Loss | None = None,
        cache: str | Path | None = None,
        int8: bool = False,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        if teacher is student:
            raise PlanError("the teacher is the student itself: pass the dense model (or a copy made before pruning)")
        if temperature <= 0:
            raise PlanError(f"Distiller(temperature={temperature:g}): must be positive")
        for name, weight in (("ce", ce), ("kl", kl), ("sq", sq)):
            if not weight >= 0:
                raise PlanError(f"Distiller({name}={weight:g}): a weight must be ≥ 0")
        if normalise not in ("layer", "token"):
            raise PlanError(f"Distiller(normalise={normalise!r}): expected 'layer' (the paper's) or 'token'")
        check_teacher(student, teacher, tokenizers, logits=kl > 0)
        self.student, self.teacher = student, int8_copy(teacher) if int8 else teacher
        self.ce, self.kl, self.sq, self.temperature, self.eps = ce, kl, sq, temperature, eps
        self.task_loss = task_loss
        self.normalise: Literal["layer", "token"] = normalise
        self.student_outputs = BlockOutputs(student)
        self.teacher_outputs = BlockOutputs(self.teacher)
        self.cache = None if cache is None else TeacherCache(None if cache == "memory" else Path(cache))
        self.causal = not is_encoder_decoder(student)
        self.encoder_blocks = [in_encoder(student, name) for name in self.student_outputs.names]

    # --- the teacher ---

    def teach(self, batch: Mapping[str, object]) -> TeacherStates:
        """The teacher's hidden states and logits for a batch; labels are needed only when the model makes its inputs from them."""
        if self.cache is not None and (known := self.cache.get(batch)) is not None:
            return known
        training = [module for module in self.teacher.modules() if module.training]
        device = next((p.device for p in self.teacher.parameters()), torch.device("cpu"))
        inputs = move(batch, device)
        if self.causal:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        self.teacher.eval()
        try:
            with torch.inference_mode(), self.teacher_outputs:
                outputs = self.teacher(**inputs)
        finally:
            for module in training:
                module.training = True
        hidden = self.teacher_outputs.take()
        states = TeacherStates(hidden if self.sq else [], read_logits(outputs) if self.kl else None)
        if self.cache is not None:
            self.cache.put(batch, states)
        return states

    def window(self, batches: Iterable[Mapping[str, object]], *, keep: bool = True) -> Window:
        """Totals over the micro-batches of one optimizer step (and over all ranks), so that their losses add up to the full batch's.

        keep: hold the teacher's states until their micro-batch is trained; without it the teacher runs twice.
        Call it on every rank, with that rank's micro-batches.
        """
        device = next(self.student.parameters()).device
        layers = len(self.student_outputs.names) if self.sq else 0
        sums = torch.zeros(2 * layers + 2, dtype=torch.float64, device=device)
        states: deque[TeacherStates] = deque()
        count = 0
        for batch in batches:
            taught = self.teach(batch)
            for layer, hidden in enumerate(taught.hidden):
                mask = token_mask(batch, hidden, self.encoder_blocks[layer], not self.causal)
                energy, tokens = hidden_energy(hidden, None if mask is None else mask.to(hidden.device))
                sums[2 * layer] += energy.to(device)
                sums[2 * layer + 1] += tokens.to(device)
            sums[-2] += self.count_targets(batch)
            sums[-1] += self.count_predictions(batch)
            count += 1
            if keep:
                states.append(taught)
        world = 1
        if dist.is_available() and dist.is_initialized():
            world = dist.get_world_size()
            dist.all_reduce(sums)
        totals = sums.float()
        energies = [(totals[2 * layer], totals[2 * layer + 1]) for layer in range(layers)]
        return Window(energies, totals[-2], totals[-1], count, world, states)

    # --- the loss ---

    def __call__(
        self, batch: Mapping[str, object], *, window: Window | None = None, model: nn.Module | None = None
    ) -> Distilled:
        """Losses of one (micro-)batch. model: the wrapped student to call (DDP, compiled); default the student itself.

        With `window`, call it with the micro-batches in the order in which `window` saw them.
        """
        inputs = move(batch, next(self.student.parameters()).device)
        needs_teacher = self.sq > 0 or self.kl > 0
        taught = TeacherStates([], None)
        if needs_teacher:
            taught = window.states.popleft() if window is not None and window.states else self.teach(batch)
        with self.student_outputs:
            outputs = (self.student if model is None else model)(**inputs)
        hidden = self.student_outputs.take() if self.sq else []
        self.student_outputs.store.clear()
        device = next(self.student.parameters()).device
        zero = torch.zeros((), device=device)
        world = window.world if window is not None else 1
        ce = zero
        if self.ce:
            ce = self.task_loss(outputs, inputs) if self.task_loss is not None else own_loss(outputs)
            ce = ce.float()
            if window is not None:
                ce = ce * (world * self.count_targets(batch) / window.targets.clamp_min(1))
        kl = zero
        if self.kl:
            logits = read_logits(outputs)
            assert taught.logits is not None
            total = None if window is None else window.predictions / world
            kl = kl_loss(
                logits,
                taught.logits,
                self.valid_targets(inputs, logits),
                temperature=self.temperature,
                shift=self.causal,
                total=total,
            )
        sq = zero
        if self.sq:
            masks = [
                token_mask(inputs, state, encoder, not self.causal)
                for state, encoder in zip(hidden, self.encoder_blocks, strict=True)
            ]
            if (
                any(s.grad_fn is None for s in hidden)
                and torch.is_grad_enabled()
                and any(p.requires_grad for p in self.student.parameters())
            ):
                self._explain_detached(hidden)
            totals = None if window is None else window.energies
            sq = squarehead_loss(hidden, taught.hidden, masks, eps=self.eps, totals=totals, normalise=self.normalise)
            sq = sq * world
        return Distilled(self.ce * ce + self.kl * kl + self.sq * sq, ce.detach(), kl.detach(), sq.detach(), outputs)

    def _explain_detached(self, hidden: list[Tensor]) -> None:
        if all(s.grad_fn is None for s in hidden) and self.student.training:
            raise SparsifyError(
                "the student's hidden states carry no gradient: reentrant checkpointing hides them; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )

    def valid_targets(
        self, batch: Mapping[str, object], logits: Float[Tensor, "*t vocabulary"]
    ) -> Bool[Tensor, "*t"] | None:
        """Tokens that are targets, `(batch, tokens)`: labels ≠ −100, else the attention mask of the side that has the logits."""
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1] and logits.dim() == 3:
            return labels != IGNORED
        return token_mask(batch, logits, False, not self.causal)

    def count_targets(self, batch: Mapping[str, object]) -> int:
        """How many terms the model's own mean loss has for this batch (rows when there are no token labels)."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            return len(next(v for v in batch.values() if isinstance(v, Tensor)))
        if labels.dim() < 2 or labels.is_floating_point():
            return labels.shape[0]
        shifted = labels[:, 1:] if self.causal and shifts_labels(self.student) else labels
        return int((shifted != IGNORED).sum())

    def count_predictions(self, batch: Mapping[str, object]) -> int:
        """How many predictions the KL term has for this batch."""
        labels, mask, ids = (batch.get(name) for name in ("labels", "attention_mask", "input_ids"))
        if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
            kept = labels != IGNORED
        elif isinstance(mask, Tensor) and self.causal:
            kept = mask.bool()
        elif isinstance(ids, Tensor) and self.causal:
            kept = torch.ones_like(ids, dtype=torch.bool)
        else:
            return len(next(v for v in batch.values() if isinstance(v, Tensor)))
        return int((kept[:, 1:] if self.causal else kept).sum())


def shifts_labels(model: nn.Module) -> bool:
    """Causal language models shift labels inside; token classifiers do not."""
    kind = type(model).__name__
    return "TokenClassification" not in kind and "MaskedLM" not in kind


def own_loss(outputs: object) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise SparsifyError(
            "the student returned no loss: put labels in the batch, or pass Distiller(task_loss=…), or ce=0"
        )
    return loss


def read_logits(outputs: object) -> Float[Tensor, "*t vocabulary"]:
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise SparsifyError("KL needs logits, but the model returns none: use kl=0")
    return logits


def move(batch: Mapping[str, object], device: torch.device) -> dict[str, object]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def check_teacher(
    student: nn.Module,
    teacher: nn.Module,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None,
    *,
    logits: bool,
) -> None:
    """Raises PlanError saying which of depth, hidden size, vocabulary differs."""
    own, other = repeated_blocks(student), repeated_blocks(teacher)
    if [len(s) for s in own] != [len(s) for s in other]:
        show = lambda stacks: ", ".join(f"{len(s)} blocks in {s.path}" for s in stacks) or "no repeated blocks"  # noqa: E731
        raise PlanError(
            f"the teacher has another depth: {show(other)}, but the student has {show(own)}; SquareHead pairs block by block"
        )
    own_config, other_config = getattr(student, "config", None), getattr(teacher, "config", None)
    for names, what in (
        (("hidden_size", "d_model", "n_embd"), "hidden size"),
        (("vocab_size",), "vocabulary (tokenizer)"),
    ):
        for name in names:
            here, there = getattr(own_config, name, None), getattr(other_config, name, None)
            if here is not None and there is not None and here != there:
                raise PlanError(f"the teacher has another {what}: {name} is {there}, but the student's is {here}")
    if tokenizers is not None and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise PlanError(
            "the teacher has another tokenizer: its vocabulary differs from the student's, so their tokens do not align"
        )


def distillation_trainer(base: type | None = None) -> type:
    """A `transformers.Trainer` subclass (or of `base`) that takes `distiller=` and trains with its loss.

    Exact under gradient accumulation and data parallelism: every optimizer step is one `Window`.
    """
    if base is None:
        from transformers import Trainer

        base = Trainer

    class DistillationTrainer(base):  # type: ignore[misc, valid-type]
        #: our losses are already normalised over the whole step
        loss_is_scaled_for_ga = True

        def __init__(self, *args: object, distiller: Distiller, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.distiller = distiller
            self.loss_is_scaled_for_ga = True
            self._window: Window | None = None

        def get_batch_samples(
            self, epoch_iterator: object, num_batches: int, device: torch.device
        ) -> tuple[list[object], object]:
            samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            self._window = self.distiller.window(samples) if samples else None
            return samples, count

        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, object],
            return_outputs: bool = False,
            num_items_in_batch: object = None,
        ) -> object:
            result = self.distiller(inputs, model=model, window=self._window if model.training else None)
            return (result.loss, result.outputs) if return_outputs else result.loss

    return DistillationTrainer

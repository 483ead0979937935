"""TRL's trainers take a host as they take any model: SFT (chat, answers only, packed), DPO against the base, GRPO."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import small_folder
import torch
import transformers as hf

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, RoSA
from sparsify.train import adapter_checkpoints

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

RULES: dict[str, Any] = {
    "s2ft": S2FT(0.2),
    "paca": PaCA(rank=2),
    "rosa": RoSA(rank=2, density=0.03, mask="random"),
    "lora": LoRA(rank=2),
}
TEMPLATE = (
    "{% for m in messages %}<begin> {{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <end> "
    "{% endgeneration %}{% else %}{{ m['content'] }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<begin> assistant {% endif %}"
)
SETTINGS: dict[str, Any] = {
    "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
    "bf16": False, "seed": 3,
}  # fmt: skip


def base() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(small_folder.config(max_position_embeddings=128)).eval()


def tokenizer() -> Any:
    found = small_folder.tokenizer()
    found.chat_template = TEMPLATE
    return found


def host_of(rule: str) -> Any:
    return sparsify.compile(base(), Plan([RULES[rule]]), progress=False)


def values(host: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in host.named_parameters() if p.requires_grad}


def moved(host: Any, rule: str) -> bool:
    start = values(host_of(rule))
    return all(not torch.equal(start[n], value) for n, value in values(host).items())


def losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def sft(folder: Path, rule: str, resume: Path | None = None, **options: Any) -> tuple[Any, Any]:
    host = host_of(rule)
    rows = datasets.Dataset.from_list(small_folder.conversations(12))
    settings = SETTINGS | {"per_device_train_batch_size": 2, "output_dir": str(folder)} | options
    trainer = trl.SFTTrainer(
        model=host, args=trl.SFTConfig(**settings), train_dataset=rows, processing_class=tokenizer()
    )
    adapter_checkpoints(trainer).train(resume_from_checkpoint=str(resume) if resume else None)
    return host, trainer


@pytest.mark.parametrize("rule", ["s2ft", *(pytest.param(r, marks=pytest.mark.slow) for r in ("paca", "rosa", "lora"))])
def test_a_chat_is_learned_and_resumed_from_small_checkpoints(rule: str, tmp_path: Path) -> None:
    host, first = sft(tmp_path / "a", rule)
    assert moved(host, rule)
    assert losses(first)[4] < losses(first)[1]
    kept = tmp_path / "a" / "checkpoint-2"
    assert [path.name for path in kept.rglob("*.safetensors")] == ["adapter.safetensors"]
    again, second = sft(tmp_path / "b", rule, resume=kept)
    assert losses(second) == {step: losses(first)[step] for step in (1, 2, 3, 4)}
    assert all(torch.equal(values(again)[n], value) for n, value in values(host).items())


def test_only_the_assistant_s_tokens_count(tmp_path: Path) -> None:
    """The loss of the first step is that of the untouched model on the answers' tokens alone."""
    seen: dict[str, torch.Tensor] = {}

    class Watched(trl.SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.setdefault("labels", inputs["labels"].clone())
            seen.setdefault("ids", inputs["input_ids"].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    host, words = host_of("s2ft"), tokenizer()
    settings = SETTINGS | {"per_device_train_batch_size": 2, "output_dir": str(tmp_path), "assistant_only_loss": True}
    rows = datasets.Dataset.from_list(small_folder.conversations(12))
    trainer = Watched(model=host, args=trl.SFTConfig(**settings), train_dataset=rows, processing_class=words)
    trainer.train()
    labels = seen["labels"]
    counted = [words.decode(row[row != -100]) for row in labels]
    answers = {row["completion"] for row in small_folder.pairs()}
    assert all(text.removesuffix(" <end>").strip() in answers for text in counted)
    with torch.no_grad():
        expected = base()(input_ids=seen["ids"], labels=labels).loss
    assert losses(trainer)[1] == pytest.approx(float(expected), rel=1e-3)


def test_packed_rows(tmp_path: Path) -> None:
    host, trainer = sft(tmp_path, "paca", packing=True, max_length=32)
    assert moved(host, "paca")
    assert losses(trainer)[4] < losses(trainer)[1]


def preferences() -> Any:
    rows = [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": "dogs saw the cat" if i % 2 else "a mat and a mat",
        }
        for i, row in enumerate(small_folder.pairs(12))
    ]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("rule", "reference"),
    [("s2ft", "the base"), ("s2ft", "computed before"), ("rosa", "the base")]
    + [
        pytest.param(rule, reference, marks=pytest.mark.slow)
        for rule, reference in (("rosa", "computed before"), ("paca", "the base"), ("lora", "computed before"))
    ],
)
def test_preferences_against_the_base(rule: str, reference: str, tmp_path: Path) -> None:
    """The adapter's start is the base, so the first loss is ln 2 with either reference; then the chosen answers win."""
    host = host_of(rule)
    settings = SETTINGS | {"per_device_train_batch_size": 4, "output_dir": str(tmp_path), "max_steps": 6}
    settings["precompute_ref_log_probs"] = reference == "computed before"
    trainer = trl.DPOTrainer(
        model=host, ref_model=base() if reference == "the base" else None, args=trl.DPOConfig(**settings),
        train_dataset=preferences(), processing_class=tokenizer(),
    )  # fmt: skip
    adapter_checkpoints(trainer).train()
    found = losses(trainer)
    assert found[1] == pytest.approx(0.6931, abs=1e-3)
    assert found[6] < found[1]
    assert moved(host, rule)


def test_rewards(tmp_path: Path) -> None:
    """GRPO samples from the host that it trains, with the adapter on."""
    host = host_of("lora")
    torch.nn.init.normal_(next(p for n, p in host.named_parameters() if n.endswith("lora_B")), std=0.5)
    start = copy.deepcopy(values(host))
    asked: list[list[str]] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        asked.append(completions)
        return [float(text.split().count("red")) for text in completions]

    settings = SETTINGS | {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "output_dir": str(tmp_path), "max_steps": 3,
    }  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in small_folder.pairs(12)])
    trainer = trl.GRPOTrainer(
        model=host, reward_funcs=reward, args=trl.GRPOConfig(**settings), train_dataset=rows, processing_class=tokenizer()
    )  # fmt: skip
    trainer.train()
    assert len(asked) == 3
    assert any(len(set(texts)) > 1 for texts in asked)
    assert any(not torch.equal(start[n], value) for n, value in values(host).items())

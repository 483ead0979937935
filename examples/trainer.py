"""S2FT under the Hugging Face Trainer: nothing special to do, the trained slices are ordinary parameters.

    python examples/trainer.py --out runs/trainer

A sequence classifier (MiniLM and a new head) learns from which of six standard-library modules a docstring comes.
`Plan(train=["classifier"])` trains the new head in full and stores it in the adapter.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

import sparsify
from sparsify import S2FT, Plan
from sparsify.demo.minilm import load_tokenizer, model_directory
from sparsify.demo.stdlib_text import describe, docstring_task


class Texts(torch.utils.data.Dataset):
    """Tokenised texts with labels, as the Trainer wants them."""

    def __init__(self, tokenizer: Any, texts: tuple[str, ...], labels: tuple[int, ...]):
        self.rows = tokenizer(list(texts), truncation=True, max_length=40)["input_ids"]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.rows[i], "attention_mask": [1] * len(self.rows[i]), "labels": self.labels[i]}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--fast", action="store_true", help="three steps only")
    parser.add_argument(
        "--out", type=Path, help="where the Trainer and the adapter write (default: a temporary folder)"
    )
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="sparsify-"))

    task = docstring_task(6, least=30, most=20 if options.fast else 60)
    print(describe(task))
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model_directory(), num_labels=len(task.classes))
    rules = [
        S2FT(
            match="bert.encoder.*", structure="ffn", fraction=0.03
        ),  # pooler and classifier are an FFN too: leave them
        S2FT(match="bert.encoder.*", structure="attention", fraction=0.1),
    ]
    plan = Plan(rules, train=["classifier"])
    model = sparsify.compile(base, plan)
    model.sparsify.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            num_train_epochs=options.epochs,
            max_steps=3 if options.fast else -1,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            warmup_steps=3,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=0,
        ),
        train_dataset=Texts(tokenizer, task.train_texts, task.train_labels),
        eval_dataset=Texts(tokenizer, task.test_texts, task.test_labels),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    print(f"before: {trainer.evaluate()['eval_accuracy']:.1%}")
    trainer.train()
    print(f"after:  {trainer.evaluate()['eval_accuracy']:.1%}")

    model.sparsify.save_adapter(out / "adapter")
    model.save_pretrained(out / "model")  # the usual layout: from_pretrained reads it without sparsify
    plain = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    inputs = tokenizer(list(task.test_texts[:4]), padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        difference = (plain(**inputs).logits - model.eval()(**inputs).logits).abs().max().item()
    print(f"saved and read back as a plain model: logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()

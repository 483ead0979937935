"""A chat model learns from conversations with TRL's SFTTrainer: loss on the answers alone, small checkpoints, a few rows.

    pip install "sparsify-compiler[trl]"
    python examples/chat_trl.py --out runs/chat

SmolLM2-135M-Instruct (see `sparsify.demo.smollm2`) learns to answer in one line that begins with "Short:". DPOTrainer and GRPOTrainer take
a host in the same way; DPO's reference is the model that was compiled: `DPOTrainer(model=host, ref_model=base, …)`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import sparsify
from sparsify import S2FT, Plan
from sparsify.demo import smollm2
from sparsify.train import adapter_checkpoints

FACTS = {
    "What is a compiler?": "a program that turns source code into machine code.",
    "What is a cache?": "fast memory that keeps what was used before.",
    "What is a kernel?": "the part of a system that talks to the hardware.",
    "What is a tensor?": "an array of numbers with any number of axes.",
    "What is a gradient?": "the direction in which a function grows fastest.",
    "What is a token?": "a piece of text that a model reads as one symbol.",
    "What is a thread?": "a sequence of instructions that runs beside others.",
    "What is a hash?": "a short number that stands for a longer text.",
}
#: ChatML as the model knows it, with the marks that tell TRL which tokens are the assistant's
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--fast", action="store_true", help="two layers, three steps")
    parser.add_argument("--out", type=Path, help="where checkpoints and adapter go (default: a temporary folder)")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="sparsify-"))

    base, tokenizer = smollm2()
    tokenizer.chat_template = TEMPLATE
    if options.fast:
        base.model.layers, base.config.num_hidden_layers = base.model.layers[:2], 2
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"Short: {a}"}]}
        for q, a in FACTS.items()
    ]
    host = sparsify.compile(base, Plan([S2FT(0.02)]))
    settings = SFTConfig(
        output_dir=str(out), max_steps=3 if options.fast else options.steps, per_device_train_batch_size=4, learning_rate=1e-3,
        assistant_only_loss=True, logging_steps=1 if options.fast else 10, save_steps=10, save_total_limit=1, report_to=[],
        use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(model=host, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    adapter_checkpoints(trainer).train()
    host.sparsify.save_adapter(out / "adapter")
    size = sum(path.stat().st_size for path in (out / "adapter").iterdir())
    print(f"adapter: {out / 'adapter'}, {size / 1e6:.1f} MB")

    question = [{"role": "user", "content": "What is a function?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    for name, model in (("before", base), ("after", host)):
        ids = model.eval().generate(**prompt, max_new_tokens=24, do_sample=False)
        print(f"{name}: {tokenizer.decode(ids[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()

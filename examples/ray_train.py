"""A run on Ray Train: workers, restarts and storage are Ray's, and a checkpoint is the adapter, the optimizer and the step.

    pip install "sparsify-compiler[demo]" "ray[train]"
    python examples/ray_train.py --workers 2 --out runs/ray

Every worker compiles the same plan, so that all choose the same units, and Ray wraps the host with DistributedDataParallel. A worker that
fails starts again from the last checkpoint; a second run in the same folder does so too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from transformers import LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify import S2FT, Plan
from sparsify.demo import smollm2
from sparsify.demo.stdlib_text import prose

BATCH = 4  # rows of one worker


def base_and_rows(fast: bool) -> tuple[Any, torch.Tensor]:
    """SmolLM2 on the standard library's docstrings; `fast`: a small random Llama on their bytes. Rows `(n, length)`."""
    text = "".join(prose())
    if fast:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        return LlamaForCausalLM(config), ids[: 256 * 32].view(256, 32)
    model, tokenizer = smollm2()
    ids = tokenizer(text[:400_000], return_tensors="pt")["input_ids"][0]
    return model, ids[: len(ids) // 128 * 128].view(-1, 128)


def train(settings: dict[str, Any]) -> None:
    """What every worker runs."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    base, rows = base_and_rows(settings["fast"])
    host = sparsify.compile(base, Plan([S2FT(0.02)]), progress=False)
    optimizer = torch.optim.AdamW(
        [p for p in host.parameters() if p.requires_grad], lr=settings["lr"], weight_decay=0.0
    )
    first = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            host.sparsify.load_adapter(Path(folder) / "adapter")
            host.sparsify.set_adapter("default")
            state = torch.load(Path(folder) / "optimizer.pt", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
    model = prepare_model(host)
    model.train()
    for step in range(first, settings["steps"]):
        if settings["fail_at"] == step and first == 0 and rank == 0:
            raise RuntimeError("a worker is lost")
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))[: BATCH * world]
        batch = rows[chosen[rank::world]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": loss.item(), "step": step + 1, "from": first}
        if (step + 1) % settings["save_every"] and step + 1 < settings["steps"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                host.sparsify.save_adapter(Path(folder) / "adapter")
                torch.save({"optimizer": optimizer.state_dict(), "step": step + 1}, Path(folder) / "optimizer.pt")
                saved = Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--fast", action="store_true", help="a small random model, six steps")
    parser.add_argument("--fail-at", type=int, default=-1, help="lose a worker before this step, to see it start again")
    parser.add_argument("--out", type=Path, default=Path("runs/ray"))
    options = parser.parse_args()

    settings = {
        "fast": options.fast, "steps": 6 if options.fast else options.steps, "save_every": 2 if options.fast else 20,
        "lr": 1e-3, "fail_at": options.fail_at,
    }  # fmt: skip
    ray.init(num_cpus=options.workers, include_dashboard=False, log_to_driver=False)
    trainer = TorchTrainer(
        train,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if torch.cuda.is_available() else "gloo"),
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(
            name="sparsify",
            storage_path=str(options.out.resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=1),
        ),
    )
    result = trainer.fit()
    assert result.checkpoint is not None
    assert result.metrics is not None
    print(
        f"{options.workers} workers, {result.metrics['step']} steps (the last worker began at {result.metrics['from']}): ",
        end="",
    )
    print(f"loss {result.metrics['loss']:.3f}")
    with result.checkpoint.as_directory() as folder:
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        base, rows = base_and_rows(options.fast)
        served = sparsify.load(base, Path(folder) / "adapter", active=True)
        with torch.no_grad():
            found = [model(input_ids=rows[:8], labels=rows[:8]).loss.item() for model in (base.eval(), served.eval())]
    print(f"the checkpoint, {size / 1e6:.2f} MB, loaded outside of Ray: loss {found[0]:.3f} → {found[1]:.3f}")


if __name__ == "__main__":
    main()

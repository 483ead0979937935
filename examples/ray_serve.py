"""Two replicas of a serving host on Ray Serve: each computes with every adapter, one a request, in batches that mix them.

    pip install "sparsify-compiler[demo]" "ray[serve]"
    python examples/ray_serve.py --model MODEL --adapters ADAPTERS

Ray starts the replicas, spreads requests over them and begins one again when it is lost; what a replica does is `sparsify.serve`. Requests
that come together are one call of `generate(adapter_names=…)`, whatever they name, and nothing switches: no lock, and no weight written.
A server with continuous batching of its own is `sparsify serve`; many machines behind one address are Ray Serve LLM over vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from transformers import LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify import S2FT, AdapterError, LoRA, PaCA, Plan

TOGETHER = 8  # requests of one batch


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
class Adapters:
    """One replica. model: a folder. adapters: a folder of adapters, each served by its name."""

    def __init__(self, model: str, adapters: str) -> None:
        base = LlamaForCausalLM.from_pretrained(model).eval()
        self.host: Any = sparsify.serve(base, folder=adapters, slots=TOGETHER, budget="256MiB")
        self.calls = 0

    @serve.batch(max_batch_size=TOGETHER, batch_wait_timeout_s=0.02)
    async def write(self, prompts: list[list[int]], names: list[str], counts: list[int]) -> list[Any]:
        """Token ids that go on from each prompt under its adapter; the error of one whose adapter cannot be served, and of no other."""
        refused = {name: error for name in set(names) if (error := self.why_not(name)) is not None}
        rows = [row for row, name in enumerate(names) if name not in refused]
        found: list[Any] = [AdapterError(refused[name]) if name in refused else None for name in names]
        if rows:
            longest = max(len(prompts[row]) for row in rows)
            ids = torch.tensor([[0] * (longest - len(prompts[row])) + prompts[row] for row in rows])
            mask = torch.tensor([[0] * (longest - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
            made = await asyncio.to_thread(
                self.host.generate,
                input_ids=ids,
                attention_mask=mask,
                adapter_names=[names[row] for row in rows],
                max_new_tokens=max(counts[row] for row in rows),
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            for place, row in enumerate(rows):
                found[row] = made[place, longest : longest + counts[row]].tolist()
        self.calls += 1
        return found

    def why_not(self, name: str) -> str | None:
        try:
            self.host.sparsify.lease(name).close()
        except AdapterError as error:
            return str(error)
        return None

    async def __call__(self, prompt: list[int], name: str, count: int) -> list[int]:
        found = await self.write(prompt, name, count)
        if isinstance(found, Exception):
            raise found
        return found

    async def facts(self) -> dict[str, Any]:
        return {"calls": self.calls, **self.host.sparsify.status()}


def make(root: Path) -> None:
    """A small random model, and an adapter of each of three methods."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    base = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).eval()
    base.save_pretrained(root / "model")
    for name, rule in {"s2ft": S2FT(0.1), "lora": LoRA(4), "paca": PaCA(4)}.items():
        host: Any = sparsify.compile(base, Plan([rule]), progress=False)
        with torch.no_grad():
            for parameter in host.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        host.sparsify.save_adapter(root / "adapters" / name)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="a folder; without one, a small random model and three adapters are made")
    options.add_argument("--adapters", help="a folder of adapters")
    options.add_argument("--requests", type=int, default=48)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, adapters = arguments.model, arguments.adapters
        if model is None:
            make(Path(scratch))
            model, adapters = f"{scratch}/model", f"{scratch}/adapters"
        run(model, adapters, arguments.requests)


def run(model: str, adapters: str, requests: int) -> None:
    """Deploy, ask, and compare every answer with what its adapter writes alone."""
    alone: Any = sparsify.serve(
        LlamaForCausalLM.from_pretrained(model).eval(), folder=adapters, slots=4, budget="256MiB"
    )
    names = [*alone.sparsify.names, "__base__"]
    vocabulary = alone.config.vocab_size
    asked = [
        ([1 + (7 * n + k) % (vocabulary - 1) for k in range(3 + n % 4)], names[n % len(names)], 4 + n % 5)
        for n in range(requests)
    ]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"location": "NoServer"})  # a handle is enough here; `sparsify serve` speaks HTTP
        handle = serve.run(Adapters.bind(model, adapters), name="adapters", route_prefix=None)
        waiting = [handle.remote(*each) for each in asked]
        wrong = handle.remote([1, 2, 3], "nobody", 4)
        answers = [answer.result(timeout_s=300) for answer in waiting]
        right = 0
        for (prompt, name, count), answer in zip(asked, answers, strict=True):
            ids = torch.tensor([prompt])
            made = alone.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[name], max_new_tokens=count, do_sample=False,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            right += answer == made[0, len(prompt) :].tolist()
        try:
            wrong.result(timeout_s=300)
            refused = "nothing"
        except Exception as error:  # Ray wraps what a replica raises
            refused = str(error).partition("AdapterError: ")[2].splitlines()[0]
        status = serve.status().applications["adapters"].deployments["Adapters"]
        replicas = sum(status.replica_states.values())
        print(
            f"{replicas} replicas, {len(names) - 1} adapters and the base: {right} of {requests} answers are those of each adapter alone"
        )
        print(f"an adapter that there is not: {refused}")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()

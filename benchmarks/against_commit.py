"""Has a change of the code cost anything? The working tree beside another commit: step time, saved bytes, decode, compile time.

    python benchmarks/against_commit.py --commit HEAD~20 --save
    python benchmarks/against_commit.py --commit v0.2 --only s2ft decode --rounds 21

The other commit is checked out into a temporary folder; each tree runs in a process of its own, and both stay alive. They take turns,
call by call, on the same model, data and seed, so that the noise of a shared machine meets both alike. Bytes that autograd saves are
counted by the measuring tree's `saved_for_backward` in both. A loss or a token that differs between the trees is shown: what costs less
must compute the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOBS = ("s2ft", "paca", "rosa", "lora", "decode")


# --- in each tree ------------------------------------------------------------------------------------------------------


def training(method: str, layers: int) -> tuple[Callable[[], None], dict[str, float]]:
    """A training step of a Llama, and what autograd keeps for it."""
    import torch
    from harness import saved_for_backward
    from transformers import LlamaConfig, LlamaForCausalLM

    import sparsify
    from sparsify import S2FT, LoRA, PaCA, Plan, RoSA

    rules = {
        "s2ft": S2FT(fraction=0.1),
        "paca": PaCA(rank=16),
        "rosa": RoSA(rank=8, density=0.005, mask="random"),
        "lora": LoRA(rank=8),
    }
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokens = LlamaForCausalLM(config), torch.randint(0, 1024, (4, 128))
    started = time.perf_counter()
    host: Any = sparsify.compile(model, Plan([rules[method]], seed=0), progress=False).train()
    compiled = time.perf_counter() - started
    optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=1e-4, fused=True)
    with saved_for_backward([*host.parameters(), *host.buffers(), tokens]) as saved:
        loss = host(input_ids=tokens, labels=tokens).loss
    facts = {"saved": saved.bytes, "result": float(loss.detach()), "compile": compiled}
    del loss

    def step() -> None:
        host(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, facts


def decoding(layers: int) -> tuple[Callable[[], None], dict[str, float]]:
    """Sixteen greedy tokens of a Llama at 75 % zeros in int8, lowered for the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import sparsify
    from sparsify import Plan, Prune, Quantize

    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model, prompt = LlamaForCausalLM(config).eval(), torch.randint(0, 1024, (1, 8))
    plan = Plan([Prune(sparsity=0.75, method="magnitude"), Quantize("int8")], target="cpu", seed=0)
    started = time.perf_counter()
    host: Any = sparsify.compile(model, plan, example={"input_ids": prompt}, progress=False).eval()
    compiled = time.perf_counter() - started
    texts: list[int] = []

    def step() -> None:
        with torch.inference_mode():
            texts[:] = host.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False)[0].tolist()

    step()
    return step, {"result": float(hash(tuple(texts))), "compile": compiled}


def worker(job: str, layers: int, threads: int) -> None:
    """Answer one line of JSON when ready, then one for every line that is read."""
    import torch

    torch.set_num_threads(threads)
    said, sys.stdout = sys.stdout, sys.stderr
    step, facts = decoding(layers) if job == "decode" else training(job, layers)
    step()
    said.write(json.dumps(facts) + "\n")
    said.flush()
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        said.write(json.dumps(time.perf_counter() - started) + "\n")
        said.flush()


# --- beside each other --------------------------------------------------------------------------------------------------


class Tree:
    """One tree's process for one job. Raises RuntimeError with what it printed if it ends early."""

    def __init__(self, root: Path, job: str, arguments: argparse.Namespace) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(root), str(ROOT / "benchmarks"), str(ROOT))),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(arguments.threads or os.cpu_count() or 1),
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--commit", "", "--worker", job]
        command += ["--layers", str(arguments.layers), "--threads", environment["OMP_NUM_THREADS"]]
        self.root, self.job = root, job
        self.errors: Any = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  closed with the process
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )  # fmt: skip
        self.facts: dict[str, float] = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.job} in {self.root} ended:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def __call__(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.answer()

    def close(self) -> None:
        self.process.communicate()
        self.errors.close()


def compare(other: Path, job: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: this tree over the other one."""
    from benchmarks.harness import interleave, mib

    trees = {"other": Tree(other, job, arguments), "here": Tree(ROOT, job, arguments)}
    try:
        timings = interleave(trees, rounds=arguments.rounds, warmup=2, patience=arguments.patience)
    finally:
        for tree in trees.values():
            tree.close()
    ratio = timings["here"].over(timings["other"])
    here, there = trees["here"].facts, trees["other"].facts
    return {
        "job": job,
        "time, here / commit (medians)": ratio.median,
        "(minima)": ratio.minimum,
        "(paired)": ratio.paired,
        "saved MiB here": mib(int(here["saved"])) if "saved" in here else None,
        "saved MiB commit": mib(int(there["saved"])) if "saved" in there else None,
        "compile, here / commit": here["compile"] / there["compile"],
        "same result": here["result"] == there["result"],
    }


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.harness import begin, parser, report

    options = parser(__doc__ or "")
    options.add_argument("--commit", required=True, help="commit, tag or branch to compare with")
    options.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--rounds", type=int, default=15)
    arguments = options.parse_args()
    if arguments.fast:
        arguments.layers, arguments.rounds = 2, 3
    begin(arguments)
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--verify", "--short", f"{arguments.commit}^{{commit}}"], capture_output=True, text=True
    )
    if found.returncode:
        options.error(f"--commit {arguments.commit}: {found.stderr.strip()}")
    arguments.commit = found.stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(other), arguments.commit], check=True)
        try:
            rows = [compare(other, job, arguments) for job in arguments.only]
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(other)], check=True)
    report("against_commit", arguments, rows)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        given = argparse.ArgumentParser()
        given.add_argument("--commit")
        given.add_argument("--worker")
        given.add_argument("--layers", type=int)
        given.add_argument("--threads", type=int)
        own = given.parse_args()
        worker(own.worker, own.layers, own.threads)
    else:
        main()

"""`sparsify bench`: latency and throughput of one model on this CPU, dense and packed, in turn."""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated

import typer


def bench(
    model: Annotated[str, typer.Option("--model", "-m", help="Hugging Face directory or name")],
    batch: Annotated[int, typer.Option("--batch", "-b", min=1)] = 1,
    seq: Annotated[int, typer.Option("--seq", "-s", min=1, help="tokens per sequence")] = 128,
    sparsity: Annotated[float, typer.Option(min=0.0, max=0.99, help="prune by magnitude first; 0: as it is")] = 0.0,
    dtype: Annotated[str, typer.Option(help="fp32 or int8: values of the packed weights")] = "fp32",
    threads: Annotated[int, typer.Option("--threads", "-t", min=0, help="0: as torch chooses")] = 0,
    seconds: Annotated[float, typer.Option(help="how long to measure each variant")] = 5.0,
    report: Annotated[bool, typer.Option(help="print what became of every layer")] = False,
) -> None:
    """Time a forward pass, dense against packed; prints a table and a last line of JSON."""
    if dtype not in ("fp32", "int8"):
        raise typer.BadParameter(f"dtype {dtype!r}: expected fp32 or int8")
    import copy

    import torch
    from transformers import AutoModel

    from sparsify.kernels.cpu.dispatch import cpu_name
    from sparsify.kernels.cpu.operator import module_bytes
    from sparsify.lowering.cpu import lower_model

    if threads:
        torch.set_num_threads(threads)
    dense = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    if sparsity:
        with torch.no_grad():
            for module in dense.modules():
                if isinstance(module, torch.nn.Linear):
                    count = max(1, int(module.in_features * sparsity))
                    bound = module.weight.abs().kthvalue(count, dim=1, keepdim=True).values
                    module.weight.mul_(module.weight.abs() > bound)
    packed = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
    outcome = lower_model(packed, quantize="int8" if dtype == "int8" else None, tokens=(batch * seq,))
    typer.echo(str(outcome) if report else str(outcome).splitlines()[0])
    ids = torch.randint(0, dense.config.vocab_size, (batch, seq))
    contestants = {"dense": dense, f"packed {dtype}": packed}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        for contestant in contestants.values():
            contestant(ids)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds * len(contestants) or len(samples["dense"]) < 3:
            for name, contestant in contestants.items():
                before = time.perf_counter()
                contestant(ids)
                samples[name].append(time.perf_counter() - before)
    median = {name: statistics.median(values) for name, values in samples.items()}
    for name, contestant in contestants.items():
        throughput, ratio = batch / median[name], median["dense"] / median[name]
        memory = module_bytes(contestant) / 2**20
        typer.echo(
            f"{name:>12} {median[name] * 1e3:9.2f} ms {throughput:9.1f} items/s {ratio:6.2f} × {memory:9.1f} MiB"
        )
    typer.echo(
        json.dumps(
            {
                "benchmark": "bench",
                "model": model,
                "batch": batch,
                "seq": seq,
                "sparsity": sparsity,
                "dtype": dtype,
                "threads": torch.get_num_threads(),
                "cpu": cpu_name(),
                "ms": {name: value * 1e3 for name, value in median.items()},
                "lowered": len(outcome.lowered),
                "dense_layers": len(outcome.refusals),
            }
        )
    )

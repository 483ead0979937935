"""`sparsify bench`: latency and throughput of one model on this CPU, dense and packed, in turn."""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli.rule import reading
from sparsify.console import one_line
from sparsify.errors import InputError, SparsifyError

LARGEST = 1 << 20  # sequences, tokens
LONGEST_RUN = 3600.0
MOST_THREADS = 1024


class TooLargeError(SparsifyError):
    """A model of default size does not fit this machine."""

    exit_code = 1


def bench(
    model: Annotated[str, typer.Option("--model", "-m", help="a Hugging Face folder, or a model type such as 'bert'")],
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, max=LARGEST, help="sequences per call")] = 1,
    seq: Annotated[int, typer.Option("--seq", "-s", min=1, max=LARGEST, help="tokens per sequence")] = 128,
    sparsity: Annotated[float, typer.Option(min=0.0, max=0.99, help="prune by magnitude first; 0: as it is")] = 0.0,
    dtype: Annotated[str, typer.Option(help="fp32 or int8: values of the packed weights")] = "fp32",
    threads: Annotated[int, typer.Option("--threads", "-t", min=0, max=MOST_THREADS, help="0: as torch chooses")] = 0,
    seconds: Annotated[float, typer.Option(min=0.0, max=LONGEST_RUN, help="how long to measure each variant")] = 5.0,
    report: Annotated[bool, typer.Option(help="print what became of every layer")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the last line alone, which is JSON")] = False,
) -> None:
    """Time a forward pass of a model on this CPU, dense against packed; prints a table and a last line of JSON."""
    if dtype not in ("fp32", "int8"):
        raise InputError(f"--dtype {dtype!r}: expected fp32 or int8")
    for name, value in (("sparsity", sparsity), ("seconds", seconds)):
        if math.isnan(value):  # which no comparison with a bound finds
            raise InputError(f"--{name} {value}: expected a number")
    import torch

    from sparsify.kernels.cpu.operator import module_bytes
    from sparsify.kernels.cpu.tune import cpu_name
    from sparsify.lowering.cpu.lower import lower_model
    from sparsify.program.capture import capture

    if threads:
        torch.set_num_threads(threads)
    dense = load_model(model)
    inputs = make_inputs(dense, model, batch, seq)
    if sparsity:
        prune_rows(dense, sparsity)
    packed = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
    program = capture(packed, inputs)  # shows which linears one kernel may serve
    outcome = lower_model(packed, program, quantize="int8" if dtype == "int8" else None, tokens=(batch * seq,))
    if report or not as_json:
        typer.echo(str(outcome) if report else str(outcome).partition("\n")[0], err=as_json)
    contestants = {"dense": dense, f"packed {dtype}": packed}
    median = {name: statistics.median(s) for name, s in time_in_turn(contestants, inputs, seconds).items()}
    memory = {name: module_bytes(contestant) / 2**20 for name, contestant in contestants.items()}
    if not as_json:
        show_times(median, memory, batch)
    result = {
        "benchmark": "bench", "model": model, "batch": batch, "seq": seq, "sparsity": sparsity, "dtype": dtype,
        "threads": torch.get_num_threads(), "cpu": cpu_name(), "ms": {n: v * 1e3 for n, v in median.items()},
        "MiB": memory, "lowered": len(outcome.lowered), "dense_layers": len(outcome.refusals),
    }  # fmt: skip
    typer.echo(json.dumps(result))


def show_times(median: dict[str, float], memory: dict[str, float], batch: int) -> None:
    """The table."""
    typer.echo(f"{'':>12} {'latency':>12} {'throughput':>17} {'speed':>8} {'memory':>12}")
    for name, value in median.items():
        times = f"{value * 1e3:9.2f} ms {batch / value:9.1f} items/s"
        typer.echo(f"{name:>12} {times} {median['dense'] / value:6.2f} × {memory[name]:8.1f} MiB")


def load_model(name: str) -> Any:
    """The model in a folder; or, for a model type, one of the default size with random weights. Eval mode, fp32."""
    import torch
    from transformers import AutoModel

    from sparsify.cli.model_folder import config_of_type, is_folder
    from sparsify.cli.model_folder import load_model as load_folder

    if is_folder(name):
        model, missing, _ = load_folder(Path(name), dtype=torch.float32)
        if missing:
            note = f"note: the files lack '{missing[0]}' ({len(missing)} tensors in all), which start at random"
            typer.echo(one_line(note), err=True)
        return model
    config = config_of_type(name)
    with reading(f"model type {name!r}"):
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModel.from_config(config, trust_remote_code=False).parameters()) * 4
        check_memory(name, size)
        torch.manual_seed(0)
        return AutoModel.from_config(config, trust_remote_code=False).float().eval()


def check_memory(name: str, size: int) -> None:
    """Raises TooLargeError when `size` bytes and a packed copy are more than the memory that is free, where that is known."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    if 1.25 * size > free:
        raise TooLargeError(
            f"a {name} of the default size takes {size / 2**30:.1f} GiB in fp32 and its packed copy more; {free / 2**30:.1f} GiB are "
            "free here: give the folder of a smaller model"
        )


def make_inputs(model: Any, name: str, batch: int, seq: int) -> dict[str, Any]:
    """Random tokens, for the decoder too where there is one. Raises InputError for models that do not take tokens."""
    import torch

    config = model.config.get_text_config()
    vocabulary, limit = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if not isinstance(vocabulary, int) or vocabulary < 1 or model.main_input_name != "input_ids":
        raise InputError(f"{name!r} takes {model.main_input_name}; bench times models that take tokens")
    if isinstance(limit, int) and seq > limit > 0:
        raise InputError(f"--seq {seq}: {name!r} has {limit} positions")
    ids = torch.randint(0, vocabulary, (batch, seq))
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def prune_rows(model: Any, sparsity: float) -> None:
    """Zero the smallest `sparsity` of every row of every linear but those whose weight an embedding shares."""
    import torch

    from sparsify.model.linears import is_conv1d, logical_weight

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for module in model.modules():
            if (isinstance(module, torch.nn.Linear) or is_conv1d(module)) and id(module.weight) not in embeddings:
                weight = logical_weight(module)
                count = int(weight.shape[1] * sparsity)
                if count:
                    bound = weight.abs().kthvalue(count, dim=1, keepdim=True).values
                    weight.mul_(weight.abs() > bound)


def time_in_turn(contestants: dict[str, Any], inputs: dict[str, Any], seconds: float) -> dict[str, list[float]]:
    """Seconds of every forward; the models take turns for `seconds` each, at least three times."""
    import torch

    samples: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        for contestant in contestants.values():
            contestant(**inputs)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds * len(contestants) or len(samples["dense"]) < 3:
            for name, contestant in contestants.items():
                before = time.perf_counter()
                contestant(**inputs)
                samples[name].append(time.perf_counter() - before)
    return samples

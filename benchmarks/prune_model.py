"""A whole model pruned from disk to disk: time per layer and per block, peak memory, and the zeros in the written files.

The model is a Llama with random bf16 weights, by default in the shape of Llama-2-7B (13.5 GB of files, and as much again per method while it
runs), written shard by shard into `--folder`. Each method runs in a process of its own, `sparsify.pruning.on_disk.prune_on_disk`,
whose memory is read from the operating system; after `--minutes` it is killed, and the same command goes on where it stopped.

    python benchmarks/prune_model.py --folder /scratch/llama --methods magnitude wanda --save
    python benchmarks/prune_model.py --folder /scratch/llama --methods sparsegpt --minutes 30 --save       # again: it goes on

`block s` is the wall time from one finished block to the next (reading, collecting inputs, pruning, running the pruned block, writing),
the other times are pruning alone, per weight. `resident MiB` counts mapped pages of the files that the system may drop at any
time; `own MiB` does not. `zeros` is counted in the files and compared with what the run reported, and where a method only removes
weights (magnitude, Wanda) the survivors are compared with the dense files bit by bit. Random weights and random tokens cost
what a trained model costs; they say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama_config(arguments: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=arguments.width, intermediate_size=arguments.intermediate, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads, num_key_value_heads=arguments.heads, vocab_size=arguments.vocabulary,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def write_model(folder: Path, arguments: argparse.Namespace) -> None:
    """Random weights, one file per block; a file that is there is kept."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers import LlamaForCausalLM

    config = llama_config(arguments)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        files.setdefault(f"block-{parts[2]}" if parts[1] == "layers" else "rest", []).append(name)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (label, names) in enumerate(tqdm(files.items(), desc="writing the dense model", unit="file")):
        path = folder / f"{label}.safetensors"
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(arguments.seed * 1000 + number)
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            tensors[name] = tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(0, 0.02, generator=generator)
        save_file(tensors, temporary := path.with_suffix(".tmp"), {"format": "pt"})
        os.replace(temporary, path)
    index = {name: f"{label}.safetensors" for label, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    config.save_pretrained(folder)


def prune(arguments: argparse.Namespace, method: str) -> None:
    """The child process: one `prune_on_disk`."""
    import torch

    from benchmarks.harness import begin
    from sparsify import Plan, Prune
    from sparsify.pruning.on_disk import prune_on_disk

    begin(arguments)
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (1, arguments.length)
    batches = [
        {"input_ids": torch.randint(arguments.vocabulary, shape, generator=generator)} for _ in range(arguments.rows)
    ]
    rule = Prune(method=method, sparsity=arguments.sparsity)  # type: ignore[arg-type]
    folder = Path(arguments.folder)
    prune_on_disk(
        folder / "dense", folder / method, Plan([rule]), calibration=batches if rule.needs_calibration else None
    )


def memory_of(process: int) -> dict[str, float]:
    """MiB of a process now: largest resident size so far, and what is its own (not pages of files)."""
    fields = {}
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssAnon"):
            fields[name] = int(value.split()[0]) / 1024
    return {"resident": fields.get("VmHWM", 0.0), "own": fields.get("RssAnon", 0.0)}


def records_of(target: Path) -> list[Path]:
    """What the pruner wrote for each finished block, in the order of writing."""
    return sorted((target / "pruning").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)


def run_child(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """Prune, at most `--minutes`; peak memory and seconds of the blocks that were finished, added to those of earlier starts."""
    folder = Path(arguments.folder)
    path, target = folder / f"{method}.json", folder / method
    state = (
        json.loads(path.read_bytes()) if path.exists() else {"peak": {}, "seconds": {}, "starts": 0, "complete": False}
    )
    if state["complete"]:
        return state
    known = set(records_of(target))
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", method]
    child = subprocess.Popen(command)
    end = time.monotonic() + 60 * arguments.minutes
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
        try:
            now = memory_of(child.pid)
        except (FileNotFoundError, ProcessLookupError):
            break
        state["peak"] = {name: max(state["peak"].get(name, 0.0), value) for name, value in now.items()}
    if child.poll() is None and time.monotonic() >= end:
        child.kill()
    code = child.wait()
    if code > 0:
        raise SystemExit(f"{method}: the pruning process ended with code {code}")
    fresh = [record for record in records_of(target) if record not in known]
    for before, record in pairwise(fresh):  # the first of a start has the set-up in it
        state["seconds"][record.stem] = record.stat().st_mtime - before.stat().st_mtime
    state["starts"] += 1
    state["complete"] = code == 0
    path.write_text(json.dumps(state), encoding="utf-8")
    return state


def check_files(dense: Path, target: Path, same_survivors: bool) -> dict[str, Any]:
    """Zeros in the files of the finished blocks; raises SystemExit when they are not what the run reported."""
    from safetensors import safe_open

    index = json.loads((dense / "model.safetensors.index.json").read_bytes())["weight_map"]
    zeros = total = 0
    seconds: dict[str, list[float]] = {leaf: [] for leaf in LEAVES}
    errors = []
    records = records_of(target)
    for record in records:
        with safe_open(record, framework="pt") as file:
            stats = json.loads(file.metadata()["stats"])
        shard = target / f"model-{record.stem.replace('.', '-')}.safetensors"
        with safe_open(shard, framework="pt") as pruned, safe_open(dense / index[stats[0]["name"]], "pt") as before:
            for layer in stats:
                weight = pruned.get_tensor(layer["name"])
                gone = int((weight == 0).sum())
                if abs(gone / weight.numel() - layer["sparsity"]) > 1e-4:
                    raise SystemExit(
                        f"{shard.name}: {layer['name']} has {gone} zeros, but {layer['sparsity']} was reported"
                    )
                if same_survivors and not bool(((weight == before.get_tensor(layer["name"])) | (weight == 0)).all()):
                    raise SystemExit(f"{shard.name}: survivors of {layer['name']} are not the dense weights")
                zeros, total = zeros + gone, total + weight.numel()
                seconds[layer["name"].split(".")[-2]].append(layer["seconds"])
                errors.append(layer["error"])
    return {
        "blocks": len(records),
        "zeros": zeros / max(total, 1),
        "relative error": statistics.mean(errors) if errors else float("nan"),
        **{f"{leaf} s": statistics.median(values) for leaf, values in seconds.items() if values},
    }


def main() -> None:
    from benchmarks.harness import begin, parser, report

    options = parser(__doc__ or "")
    options.add_argument("--folder", required=True, help="scratch folder for the dense and the pruned models")
    options.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    options.add_argument("--sparsity", type=float, default=0.5)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--width", type=int, default=4096)
    options.add_argument("--intermediate", type=int, default=11008)
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--vocabulary", type=int, default=32000)
    options.add_argument("--rows", type=int, default=8, help="calibration rows")
    options.add_argument("--length", type=int, default=64, help="tokens of each")
    options.add_argument("--minutes", type=float, default=60.0, help="per method and start; the next start goes on")
    options.add_argument("--discard", action="store_true", help="delete a pruned model once it is complete and checked")
    options.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.fast:
        arguments.layers, arguments.width, arguments.intermediate, arguments.heads = 3, 64, 176, 4
        arguments.vocabulary, arguments.rows, arguments.length = 256, 4, 16
    if arguments.child is not None:
        prune(arguments, arguments.child)
        return
    begin(arguments)
    folder = Path(arguments.folder)
    write_model(folder / "dense", arguments)
    rows = []
    for method in arguments.methods:
        state = run_child(arguments, method)
        if "checked" not in state or state["checked"]["blocks"] < arguments.layers:
            state["checked"] = check_files(folder / "dense", folder / method, method in ("magnitude", "wanda"))
            (folder / f"{method}.json").write_text(json.dumps(state), encoding="utf-8")
        if arguments.discard and state["complete"]:
            shutil.rmtree(folder / method, ignore_errors=True)
        blocks = list(state["seconds"].values())
        rows.append(
            {
                "method": method,
                **state["checked"],
                "block s": statistics.median(blocks) if blocks else float("nan"),
                "resident MiB": state["peak"].get("resident"),
                "own MiB": state["peak"].get("own"),
                "starts": state["starts"],
                "complete": state["complete"],
            }
        )
    arguments.folder = "…"  # the record names no folder of the machine
    del arguments.child
    report("prune_model", arguments, rows, notes=["times: medians over blocks; memory: largest over all starts"])


if __name__ == "__main__":
    main()

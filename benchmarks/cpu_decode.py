"""Tokens per second and memory of whole models on this CPU: torch, packed, torch's quantised kernels, OpenVINO, llama.cpp.

    python benchmarks/cpu_decode.py --model llama-1b --threads 2 --variants int8 aten-int8 aten-int4 --peer openvino=ENV llamacpp=ENV
    python benchmarks/cpu_decode.py --model llama-7b --by-block --distinct-blocks 1 --threads 2 --variants int8 --peer llamacpp=ENV
    python benchmarks/cpu_decode.py --model smollm2 --new 64 --rounds 7 --variants dense int8 int8-pytorch --peer llamacpp=ENV
    python benchmarks/cpu_decode.py --model minilm --batch 16 --seq 128

Models have the real shapes and random weights (nothing is downloaded; `smollm2` is the real one), of which the share `--sparsity` is zero but for embedding and
vocabulary head; all contestants hold the same ones (`random_decoder.py`), and the table says how near each one's logits are to those of
the first. Decoders generate `--new` tokens greedily with a KV cache after a prompt of `--seq` tokens, which does not count:
ours and torch's by `generate()`, from the second token on; peers by a loop over their own API. Encoders run
forward. One process tree, contestants in turn, each peer in a process of its own that is stopped while others run, medians.

    dense       torch, fp32                       fp32, int8            `sparsify.compile(…, target="cpu")`
    bf16        torch, bfloat16                   packed-bf16           the same of the model in bfloat16
    fp32-pytorch, int8-pytorch                    the same without the native step: PyTorch calls every product
                                                  aten-int8, aten-int4  the kernels that torchao's weight-only configurations
                                                                        compile to on a CPU, in place of every linear (bf16)
    openvino=ENV     openvino-int8, openvino-int4: weights in int8 (one scale per row), int4 (one per 128 columns), stateful
    llamacpp=ENV     llamacpp-Q8_0, llamacpp-Q4_0: one scale per 32 columns, quantised by llama.cpp
    openvino-int4=ENV, llamacpp-Q4_0=ENV, …: one of them alone, where memory is short

ENV is an environment's folder or its Python; `benchmarks/peers/README.md` says how to make one.

The vocabulary head is dense for all. Every quantised contestant holds it in 8 bits, the 4-bit ones too (as the exporters of OpenVINO and
llama.cpp keep it in 8 and 6 bits), unless `--int4-head int4` gives the 4-bit ones a head in 4 bits; the others hold it in their own type.

`--by-block` builds one decoder block after the other (each compiled by `sparsify.compile`, head and all, and put into one host), so that
the dense model is never whole in memory. `--distinct-blocks N` makes N different blocks and repeats them in memory of their own,
for all contestants alike, which saves the time of making them. `--linears` times the model's linears alone, without attention, norms and
cache, ours and OpenVINO's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsify
from benchmarks.peer import Peer, named_environments, resident
from benchmarks.random_decoder import EPSILON, ROPE_BASE, SHAPES, Decoder, random_tensor
from sparsify import CpuOptions, Plan, Quantize
from sparsify.console import adapt_streams
from sparsify.errors import Refusal
from sparsify.host.native_forward import NativeForward
from sparsify.kernels.cpu.dispatch import best_isa
from sparsify.kernels.cpu.operator import module_bytes
from sparsify.kernels.cpu.tune import cpu_name
from sparsify.lowering.cpu.native.make import make_native
from sparsify.plan import Rule
from sparsify.program.capture import capture

#: bytes per weight of a block while it stands, by variant; the packed ones at density d
BYTES = {
    "dense": lambda d: 4, "bf16": lambda d: 2, "fp32": lambda d: 4 * d + 1 / 8, "packed-bf16": lambda d: 2 * d + 1 / 8,
    "fp32-pytorch": lambda d: 4 * d + 1 / 8, "int8-pytorch": lambda d: d + 1 / 8, "int8": lambda d: d + 1 / 8, "aten-int8": lambda d: 1, "aten-int4": lambda d: 0.53, "openvino-int8": lambda d: 2.1,
    "openvino-int4": lambda d: 1.1, "llamacpp-Q8_0": lambda d: 1.07, "llamacpp-Q4_0": lambda d: 1.13,
}  # fmt: skip
VARIANTS = ("dense", "bf16", "fp32", "fp32-pytorch", "packed-bf16", "int8", "int8-pytorch", "aten-int8", "aten-int4")
COMPILED = ("fp32", "fp32-pytorch", "packed-bf16", "int8", "int8-pytorch")
PEERS = {"openvino": ("openvino-int8", "openvino-int4"), "llamacpp": ("llamacpp-Q8_0", "llamacpp-Q4_0")}
SMOLLM2 = "smollm2"  # the real one, of the demo; llama.cpp then runs the file that it came as (Q4_1)
PEERS |= {name: (name,) for names in list(PEERS.values()) for name in names}  # one format alone


class AtenLinear(nn.Module):
    """A linear on torch's weight-only kernels: int8 with a scale per row, or int4 with one per 128 columns. bf16."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.bits, self.out_features = bits, linear.out_features
        if bits == 8:
            scales = weight.abs().amax(1) / 127
            self.register_buffer("packed", torch.round(weight / scales[:, None]).clamp_(-127, 127).to(torch.int8))
            self.register_buffer("scales", scales.to(torch.bfloat16))
            return
        groups = weight.view(weight.shape[0], -1, 128)
        scales = groups.abs().amax(2) / 7
        codes = torch.round(groups / scales[..., None]).clamp_(-8, 7).add_(8).view_as(weight).to(torch.int32)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        pairs = torch.stack([scales, torch.zeros_like(scales)], 2).transpose(0, 1)
        self.register_buffer("scales", pairs.to(torch.bfloat16).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.bits == 8:
            y = torch._weight_int8pack_mm(flat, self.packed, self.scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, 128, self.scales)
        return y.view(*x.shape[:-1], self.out_features)


# --- models -----------------------------------------------------------------------------------------------------------


def llama_config(decoder: Decoder, **changes: Any) -> Any:
    from transformers import LlamaConfig

    shape = decoder.shape
    sizes = {
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "rms_norm_eps": EPSILON, "rope_theta": ROPE_BASE, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def empty_llama(config: Any) -> Any:
    """A LlamaForCausalLM whose weights are on the meta device; the rotary tables are real."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def fill(module: nn.Module, prefix: str, sparsity: float) -> None:
    """Real weights in place of those on the meta device. prefix: what comes before the names of `module` in the decoder's."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            values = torch.from_numpy(random_tensor(prefix + name, tuple(parameter.shape), sparsity))
            setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))


def make_minilm(sparsity: float) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertModel(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and sparsity > 0:
                module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
    return model


def transform(model: nn.Module, variant: str, tokens: tuple[int, ...], head: int, example: Any = None) -> Any:
    """One contestant made of the dense `model`, which it may take apart. head: bits of `lm_head` of the aten-… variants."""
    if variant in COMPILED:
        source = model.bfloat16() if variant == "packed-bf16" else model
        rules: list[Rule] = (
            [Quantize(format="int8", exclude=())] if variant.startswith("int8") else []
        )  # the vocabulary head too
        options = CpuOptions(tokens=tokens, native=not variant.endswith("-pytorch"), tied="copy")
        return sparsify.compile(source, Plan(rules, target="cpu"), example=example, cpu=options, progress=False)
    if variant.startswith("aten"):
        bits = 8 if variant == "aten-int8" else 4
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, AtenLinear(module, head if leaf == "lm_head" else bits))
    return model if variant == "dense" else model.bfloat16()


class Head(nn.Module):
    """The vocabulary head as a model, so that it can be compiled alone."""

    def __init__(self, lm_head: nn.Module) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(x)


def report_lines(host: Any) -> list[str]:
    """The first line of the CPU's part of a report, and one line of each kind."""
    lines = str(host.sparsify.report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("cpu lowering"))
    kinds = ("native", "packed", "fused", "apart", "dense", "blocked")
    return [lines[start], *(next((x for x in lines[start:] if x.startswith(k)), f"{k:<10} none") for k in kinds)]


def real_decoder(decoder: Decoder, variant: str, tokens: tuple[int, ...], head: int) -> nn.Module:
    """SmolLM2-135M-Instruct, its blocks' linears pruned by magnitude (speed does not depend on which weights are zero)."""
    from sparsify.demo.pretrained import smollm2

    model, _ = smollm2()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head" and decoder.sparsity:
                weight = module.weight
                kept = weight.abs() > weight.abs().flatten().kthvalue(round(decoder.sparsity * weight.numel())).values
                weight.mul_(kept)
    host = transform(model, variant, tokens, head)
    if variant in COMPILED:
        print("\n".join(report_lines(host)))
    return host


def whole_decoder(decoder: Decoder, variant: str, tokens: tuple[int, ...], head: int) -> nn.Module:
    """The dense decoder, made and then transformed."""
    model = empty_llama(llama_config(decoder))
    for layer, block in enumerate(model.model.layers):
        fill(block, f"model.layers.{layer % decoder.distinct}.", decoder.sparsity)
    fill(model, "", decoder.sparsity)
    host = transform(model, variant, tokens, head)
    if variant in COMPILED:
        print("\n".join(report_lines(host)))
    return host


def decoder_by_block(decoder: Decoder, variant: str, tokens: tuple[int, ...], head: int) -> nn.Module:
    """The same without the dense decoder: blocks and head are made, transformed and put into one host in turn."""
    host = empty_llama(llama_config(decoder))
    made: list[Any] = []
    for layer in range(decoder.shape.layers):
        if layer < decoder.distinct:
            part = empty_llama(llama_config(decoder, num_hidden_layers=1, vocab_size=64)).model
            fill(part.layers[0], f"model.layers.{layer}.", decoder.sparsity)
            fill(part, "model.", decoder.sparsity)
            part = transform(part, variant, tokens, head)
            if variant in COMPILED and not layer:
                print("\n".join(report_lines(part)))
            made.append(part.layers[0])
            block = part.layers[0]
            del part
        else:
            block = copy.deepcopy(made[layer % decoder.distinct])
        block.self_attn.layer_idx = layer
        host.model.layers[layer] = block
    top = Head(host.lm_head)
    fill(top, "", decoder.sparsity)
    example = torch.zeros(1, max(tokens), decoder.shape.hidden)
    host.lm_head = transform(top, variant, tokens, head, example.bfloat16() if "bf16" in variant else example).lm_head
    fill(host, "", decoder.sparsity)
    if variant not in ("dense", "fp32", "fp32-pytorch", "int8", "int8-pytorch"):
        host.model.embed_tokens.bfloat16()
        host.model.norm.bfloat16()
    if variant in ("fp32", "int8"):  # the blocks were compiled one by one: the step is made of the whole
        step = make_native(host, capture(host))
        print(f"native     {step}")
        if not isinstance(step, Refusal):
            host.__dict__["forward"] = NativeForward(host, step)
    return host


# --- contestants ------------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """seconds: of one token (or of one forward of an encoder). MiB: of a model in torch its tensors, of a peer what the system counts."""

    name: str
    seconds: Callable[[], float]
    logits: Callable[[], np.ndarray] | None
    memory: Callable[[], dict[str, float]]
    facts: dict[str, Any]
    close: Callable[[], None] = lambda: None


class Clock:
    """A streamer of `generate()` that notes when the prompt was handed over and when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


def one_run(model: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds per generated token, from the second on, so without the prompt; or seconds of one forward of an encoder."""
    if hasattr(model, "lm_head"):
        clock = Clock()
        model.generate(
            ids, max_new_tokens=new + 2, min_new_tokens=new + 2, do_sample=False, pad_token_id=0, streamer=clock
        )
        return (clock.times[-1] - clock.times[2]) / new
    start = time.perf_counter()
    model(ids)
    return time.perf_counter() - start


def linears_alone(model: Any) -> float:
    """Seconds of one token through the model's linears, chained as OpenVINO's are: no attention, norms, cache."""
    start = time.perf_counter()
    x = torch.ones(1, 1, model.config.hidden_size, dtype=model.model.norm.weight.dtype)
    for layer in model.model.layers:
        attention = layer.self_attn
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        x = x + attention.o_proj(q + torch.cat([k, v], -1).mean(-1, keepdim=True))
        x = x + layer.mlp(x)
    model.lm_head(x)
    return time.perf_counter() - start


def torch_contestant(name: str, model: Any, ids: torch.Tensor, arguments: argparse.Namespace) -> Contestant:
    decodes = hasattr(model, "lm_head")
    if arguments.linears:
        seconds: Callable[[], float] = lambda: statistics.median(  # noqa: E731
            linears_alone(model) for _ in range(arguments.new)
        )
    else:
        seconds = lambda: one_run(model, ids, arguments.new)  # noqa: E731
    logits = (lambda: model(ids[:1]).logits[0, -1].float().numpy()) if decodes and not arguments.linears else None
    facts = {"head": type_of_head(model.lm_head)} if decodes else {}
    return Contestant(name, seconds, logits, lambda: {"MiB": module_bytes(model) / 2**20}, facts)


def type_of_head(head: Any) -> str:
    """How a vocabulary head holds its weight."""
    if isinstance(head, AtenLinear):
        return f"int{head.bits}"
    packed = getattr(head, "packed", None)
    return f"{packed.value} bitmask" if packed is not None else str(head.weight.dtype).removeprefix("torch.")


def peer_contestants(
    key: str, place: str, decoder: Decoder, ids: torch.Tensor, arguments: argparse.Namespace, scratch: Path
) -> Iterator[Contestant]:
    """The formats of one engine, each in a process of its own. key: of `PEERS`."""
    prompt = ids[0].tolist()
    small_head = arguments.int4_head == "int4"
    kind = key.partition("-")[0]
    for name in PEERS[key] if arguments.model != SMOLLM2 else ("llamacpp-Q4_1",):
        folder = str((arguments.files or scratch).resolve())
        job: dict[str, Any] = {**decoder.as_json(), "threads": arguments.threads, "folder": folder}
        if kind == "openvino":
            bits = 8 if name.endswith("int8") else 4
            job |= {"bits": bits, "head": bits if small_head else 8, "linears": arguments.linears}
        else:
            form = name.rpartition("-")[2]
            job |= {"format": form, "head": form if small_head else "Q8_0"}
            if arguments.model == SMOLLM2:
                from sparsify.demo.pretrained import gguf_file

                job |= {"file": str(gguf_file()), "format": "Q4_1", "head": "as the file has it"}
            job["context"] = -(-(arguments.seq + arguments.new + 2) // 256) * 256
        peer = Peer(name, place, f"{kind}_decoder.py", json.dumps(job))
        file = scratch / f"{name}.npy"

        def logits(peer: Peer = peer, file: Path = file) -> np.ndarray:
            peer.ask(prompt=prompt, logits=str(file))
            return np.load(file)

        def seconds(peer: Peer = peer) -> float:
            return float(peer.ask(prompt=prompt, tokens=arguments.new)["seconds"])

        yield Contestant(name, seconds, None if arguments.linears else logits, peer.resident, peer.started, peer.close)


def free_bytes() -> int:
    """Memory that the system could give to programs now."""
    information = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(information["MemAvailable"].split()[0]) * 1024


def check_memory(names: list[str], decoder: Decoder, by_block: bool) -> str | None:
    """Why these contestants do not fit into the memory that is free now; None if they do."""
    free = free_bytes()
    weights, density = decoder.block_weights(), 1 - decoder.sparsity
    needed = sum(BYTES[name](density) for name in names) * weights + (0 if by_block else 4 * weights)
    if needed <= free:
        return None
    advice = "fewer contestants at a time" if by_block else "--by-block, or fewer contestants at a time"
    return f"the blocks of {', '.join(names)} need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free: {advice}"


def make_contestants(arguments: argparse.Namespace, places: dict[str, str], scratch: Path) -> list[Contestant]:
    if arguments.model == "minilm":
        dense = make_minilm(arguments.sparsity)
        ids = torch.randint(0, 30522, (arguments.batch, arguments.seq))
        tokens = (arguments.batch * arguments.seq,)
        models = [(name, transform(copy.deepcopy(dense), name, tokens, 8)) for name in arguments.variants]
        return [torch_contestant(name, model, ids, arguments) for name, model in models]
    decoder = decoder_of(arguments)
    ids = torch.randint(0, decoder.shape.vocab, (arguments.batch, arguments.seq))
    build = real_decoder if arguments.model == SMOLLM2 else decoder_by_block if arguments.by_block else whole_decoder
    tokens = (arguments.batch, arguments.batch * arguments.seq)
    contestants = []
    for name in arguments.variants:
        start = time.perf_counter()
        head = 4 if name == "aten-int4" and arguments.int4_head == "int4" else 8
        contestants.append(torch_contestant(name, build(decoder, name, tokens, head), ids, arguments))
        gc.collect()
        print(f"{name}: made in {time.perf_counter() - start:.0f} s", flush=True)
    for kind, place in places.items():
        start = time.perf_counter()
        contestants += peer_contestants(kind, place, decoder, ids, arguments, scratch)
        print(f"{kind}: made in {time.perf_counter() - start:.0f} s", flush=True)
    return contestants


def decoder_of(arguments: argparse.Namespace) -> Decoder:
    shape = SHAPES[arguments.model]
    layers = arguments.layers or shape.layers
    return Decoder(arguments.model, layers, arguments.sparsity, min(arguments.distinct_blocks or layers, layers))


def measure(contestants: list[Contestant], rounds: int) -> dict[str, list[float]]:
    """Name → seconds, one per round; every contestant runs once before."""
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds + 1):
        for contestant in contestants:
            time.sleep(0.02)  # until the threads of the one before have stopped spinning
            samples[contestant.name].append(contestant.seconds())
    return {name: seconds[1:] for name, seconds in samples.items()}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.astype(np.float64) @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def row_of(
    contestant: Contestant, units: int, samples: dict[str, list[float]], first: str, outputs: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Units per second, against the first contestant; memory; how near its logits are to the first one's."""
    name, seconds = contestant.name, samples[contestant.name]
    middle = statistics.median(seconds)
    row: dict[str, Any] = {
        "variant": name, "per_second": units / middle, "best": units / min(seconds),
        "speedup": statistics.median(samples[first]) / middle, "memory": contestant.memory(), **contestant.facts,
    }  # fmt: skip
    return {**row, "cosine": cosine(outputs[name], outputs[first])} if name in outputs else row


def line_of(row: dict[str, Any], unit: str) -> str:
    text = f"{row['variant']:>14} {row['per_second']:>9.2f} {unit}/s {row['speedup']:>6.2f} × "
    text += ", ".join(f"{value:.0f} {key.replace('_', ' ')}" for key, value in row["memory"].items())
    return text + (f", logits at cosine {row['cosine']:.4f}" if "cosine" in row else "")


def prepare(arguments: argparse.Namespace, places: dict[str, str]) -> None:
    """Write the peers' files, one peer at a time."""
    for kind, place in places.items():
        for contestant in peer_contestants(
            kind, place, decoder_of(arguments), torch.zeros(1, 1), arguments, arguments.files
        ):
            print(f"{contestant.name}: {contestant.facts}", flush=True)
            contestant.close()


def why_not(arguments: argparse.Namespace, places: dict[str, str]) -> str | None:
    """The first reason why these arguments cannot be served; None if they can."""
    decodes = arguments.model != "minilm"
    unknown = ", ".join(sorted(set(places) - set(PEERS)))
    if unknown:
        return f"--peer: {unknown} is none of {', '.join(PEERS)}"
    if arguments.model == SMOLLM2 and (
        arguments.by_block or arguments.layers or arguments.prepare or set(places) - {"llamacpp"}
    ):
        return "--model smollm2: whole, and beside --peer llamacpp=ENV alone"
    if places and (not decodes or arguments.batch > 1):
        return "--peer: peers decode one sequence; use a decoder and --batch 1"
    if arguments.linears and (not decodes or any("llamacpp" in key for key in places)):
        return "--linears: for decoders, beside openvino only"
    if arguments.prepare:
        return None if arguments.files and decodes else "--prepare: for decoders; say where, --files FOLDER"
    if arguments.model == SMOLLM2:
        return None
    names = [*arguments.variants, *(name for kind in places for name in PEERS[kind])]
    return check_memory(names, decoder_of(arguments), arguments.by_block) if decodes else None


def main() -> None:
    adapt_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SHAPES, "minilm"], default="llama-1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model, where time or memory is short")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=16)
    parser.add_argument("--new", type=int, default=8, help="tokens to time")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["dense", "fp32", "int8"])
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME=ENV", help=f"NAME: {', '.join(PEERS)}")
    parser.add_argument("--files", type=Path, help="keep the peers' model files in this folder, for the next run")
    parser.add_argument(
        "--prepare", action="store_true", help="only write the peers' files into --files, which takes longest"
    )
    parser.add_argument("--by-block", action="store_true", help="never hold the whole dense model")
    parser.add_argument("--distinct-blocks", type=int, help="repeat this many different blocks")
    parser.add_argument(
        "--int4-head", choices=["int8", "int4"], default="int8", help="vocabulary head of 4-bit contestants"
    )
    parser.add_argument("--linears", action="store_true", help="the linears alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        places = named_environments(args.peer)
    except ValueError as error:
        parser.error(str(error))
    refused = why_not(args, places)
    if refused:
        parser.error(refused)
    decoder = None if args.model == "minilm" else decoder_of(args)
    if args.prepare:
        prepare(args, places)
        return
    with tempfile.TemporaryDirectory() as scratch:
        contestants = make_contestants(args, places, Path(scratch))
        with torch.inference_mode():
            samples = measure(contestants, args.rounds)
            outputs = {c.name: c.logits() for c in contestants if c.logits is not None}
        rows = [row_of(c, args.batch, samples, contestants[0].name, outputs) for c in contestants]
        for contestant in contestants:
            contestant.close()
    for row in rows:
        print(line_of(row, "tokens" if decoder else "sentences"))
    own = resident()
    print(f"this process: {own['peak_MiB']:.0f} MiB at its peak, {own['resident_MiB']:.0f} now")
    summary = {
        "benchmark": "cpu_decode", "model": args.model, "layers": decoder.layers if decoder else None,
        "sparsity": args.sparsity, "batch": args.batch, "seq": args.seq, "new": args.new, "linears": args.linears,
        "by_block": args.by_block, "distinct_blocks": decoder.distinct if decoder else None, "int4_head": args.int4_head,
        "threads": args.threads, "cpu": cpu_name(), "isa": best_isa(), "torch": torch.__version__,
        "date": str(date.today()), "process": own, "results": rows,
    }  # fmt: skip
    text = json.dumps(summary)
    if args.save:
        args.save.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

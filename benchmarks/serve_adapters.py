"""Many adapters in one batch: what a step costs beside a step with one adapter, and beside PEFT's mixed batch of the same adapters.

    base        the serving host, no adapter
    one         every row the same adapter
    mixed       every row its own adapter (`--rows` of them)
    stored      the same while `--stored` adapters are known, of which the rows' are live
    peft        PEFT's mixed batch (`adapter_names=`) over the same adapters, exported to LoRA

Adapters are S2FT's, of the units that `S2FT(fraction=0.03)` chooses for SmolLM2: 63 channels of every Down (a head of every O would be
more than the whole budget); which ones, and their values, are random. `--heads` adds one head of every O. A step is one forward
of `--rows` rows with `--length` tokens. `switch` is a lease of an adapter that lies in host memory while all slots are taken: another
is evicted, and it is put in its place. Bytes of an adapter count what a slot takes, and what its LoRA form takes in the same type.

    python benchmarks/serve_adapters.py --save
    python benchmarks/serve_adapters.py --clock cpu --threads 1 --save --label 1thread-cpuclock
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsify
from benchmarks.harness import Bar, Timing, begin, interleave, mib, parser, report
from sparsify.adapters import adapter as files
from sparsify.adapters.adapter import Adapter, Delta, tensor_hash


def model_of(fast: bool) -> nn.Module:
    if not fast:
        from sparsify.demo.pretrained import smollm2

        return smollm2()[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def write_adapter(model: nn.Module, channels: int, heads: int, seed: int, folder: Path) -> None:
    """An adapter as S2FT's training leaves it: columns of Down and, for whole heads, of O, with values of small weights."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    width = config.hidden_size // config.num_attention_heads
    deltas, bases = [], {}
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj.weight"):
            places = torch.randperm(parameter.shape[1], generator=generator)[:channels].sort().values
        elif name.endswith("o_proj.weight") and heads:
            units = torch.randperm(config.num_attention_heads, generator=generator)[:heads].sort().values
            places = (units[:, None] * width + torch.arange(width)).flatten()
        else:
            continue
        values = 0.01 * torch.randn(parameter.shape[0], places.numel(), generator=generator)
        deltas.append(Delta(name, "column", places, values))
        bases[name] = tensor_hash(parameter)
    files.save(Adapter(tuple(deltas), bases), folder)


def peft_model(model: nn.Module, folders: dict[str, Path], exported: Path) -> Any:
    """PEFT's model with the same adapters, and a folder in LoRA's form for each."""
    from peft import PeftModel

    loaded: Any = sparsify.load(model, folders, active=None)
    made: Any = None
    for name in folders:
        loaded.sparsify.export_lora(exported / name, name)
        if made is None:
            made = PeftModel.from_pretrained(model, exported / name, adapter_name=name)
        else:
            made.load_adapter(exported / name, adapter_name=name)
    return made.eval()


def lora_bytes(folder: Path, item: int) -> int:
    with files.TensorFile(folder / "adapter_model.safetensors", sparsify.AdapterError, check=False) as opened:
        return sum(torch.Size(part.shape).numel() for part in opened.parts.values()) * item


def switches(host: Any, names: list[str], count: int) -> Timing:
    """Seconds of leases, each of an adapter that is read already and in no slot."""
    found = []
    for name in itertools.islice(itertools.cycle(names), count):
        start = time.perf_counter()
        with host.sparsify.lease(name):
            found.append(time.perf_counter() - start)
    return Timing(tuple(found))


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rows", type=int, default=32)
    options.add_argument("--length", type=int, default=1)
    options.add_argument("--stored", type=int, default=1000)
    options.add_argument("--channels", type=int, default=63, help="of every Down")
    options.add_argument("--heads", type=int, default=0, help="of every O")
    options.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--no-peft", action="store_true")
    arguments = options.parse_args()
    begin(arguments)
    rows = 4 if arguments.fast else arguments.rows
    stored = 12 if arguments.fast else arguments.stored
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        root = Path(scratch)
        model: Any = model_of(arguments.fast).to(arguments.device, dtype)
        folders = {f"a{number}": root / f"a{number}" for number in range(rows)}
        for number, folder in enumerate(folders.values()):
            write_adapter(model, 7 if arguments.fast else arguments.channels, arguments.heads, number, folder)
        names = list(folders)
        ids = torch.randint(3, model.config.vocab_size, (rows, arguments.length), device=arguments.device)
        many = {f"s{number}": folders[names[number % rows]] for number in range(stored)}
        first: Any = sparsify.serve(model, folders, slots=rows, budget="1GiB")
        second: Any = sparsify.serve(model, many, slots=rows, budget="1GiB", host_budget="1GiB")
        live = list(many)[:: max(1, stored // rows)][:rows]

        def call(host: Any, **given: Any) -> Any:
            return host(input_ids=ids, use_cache=False, **given).logits

        variants = {
            "base": lambda: call(first),
            "one": lambda: call(first, adapter_names=names[0]),
            "mixed": lambda: call(first, adapter_names=names),
            "stored": lambda: call(second, adapter_names=live),
        }
        exported = root / "peft"
        if not arguments.no_peft:
            peft = peft_model(model_of(arguments.fast).to(arguments.device, dtype), folders, exported)
            variants["peft"] = lambda: call(peft, adapter_names=names)
            difference = float((variants["mixed"]() - variants["peft"]()).abs().max())
            effect = float((variants["mixed"]() - variants["base"]()).abs().max())
            assert difference < 0.02 * effect, (
                f"the two compute other things: they differ by {difference}, the adapters do by {effect}"
            )
        for name in list(many)[: rows + 8]:
            second.sparsify.lease(name).close()
        timings = interleave(
            variants,
            rounds=3 if arguments.fast else arguments.rounds,
            clock=arguments.clock,
            patience=arguments.patience,
        )
        switch = switches(second, list(many)[: rows + 8], 12 if arguments.fast else 80)
        image = first.sparsify.store.entries[names[0]].image
        status = second.sparsify.status()
        as_lora = 0 if arguments.no_peft else lora_bytes(exported / names[0], image.values.element_size())
    ours = image.nbytes
    table = [
        {
            "variant": name,
            "step ms": 1e3 * timing.median,
            "over one": timing.over(timings["one"]).median,
            "over base": timing.over(timings["base"]).median,
        }
        for name, timing in timings.items()
    ]
    bars = [
        Bar.of(f"{rows} adapters in a batch over one", timings["mixed"].over(timings["one"]), 1.3),
        Bar.of(f"{stored} stored, {rows} live, over one", timings["stored"].over(timings["one"]), 1.3),
        Bar(
            "a switch from host memory, ms", 1e3 * switch.median, 1.0, also=(1e3 * switch.minimum, 1e3 * switch.median)
        ),
    ]
    notes = [
        f"one adapter takes {mib(ours):.2f} MiB in its slot; evictions {status['evictions']}, loads {status['loads']}"
    ]
    if not arguments.no_peft:
        bars.append(Bar.of("PEFT's mixed batch over ours", timings["peft"].over(timings["mixed"]), 1.5, at_least=True))
        bars.append(Bar("bytes of the LoRA form over ours", as_lora / ours, 3.0, at_least=True))
        notes.append(f"its LoRA form takes {mib(as_lora):.2f} MiB")
    report("serve_adapters", arguments, table, bars=bars, notes=notes)


if __name__ == "__main__":
    main()

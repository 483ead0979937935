"""What vLLM makes of a PEFT LoRA folder, read before vLLM reads it: ranks, padding, and what it would refuse.

vLLM holds every adapter in slots of one rank, `--max-lora-rank`, and takes few numbers for it (`RANKS`). Two factors of rank 12 in a
server of rank 16 are padded with zeros: exact, and a third more memory. What it refuses, it refuses when the server starts, or worse,
at the first request for the adapter, with the whole folder. So it is said here, tensor by tensor, from the names and shapes alone:

<module>.lora_A.weight (r, m), .lora_B.weight (n, r)    served
score.weight, classifier.weight                         served for classification, one of them
a bias; a module in full; rows of an embedding          refused, with the reason
factors of an embedding, a convolution, packed experts  refused, with the reason

The rules are those of vLLM 0.32 (`vllm/lora/peft_helper.py`, `lora_model.py`); `tests/e2e/test_vllm.py` asks the engine itself.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.console import in_full, printable
from sparsify.errors import Refusal

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank` (also 1, where nothing of ours fits in)."""
HEADS = ("score", "classifier")
"""Modules that vLLM takes in full, of models that classify."""
WITHOUT_LORA = ("gpt2", "bloom", "falcon", "stablelm", "mamba")
"""Model types that vLLM runs by code of its own which takes no adapter at all."""
OTHER_WAYS = {
    "use_dora": "is DoRA", "lora_bias": "trains a bias beside the factors", "alora_invocation_tokens": "is Activated LoRA",
    "layer_replication": "repeats layers", "use_qalora": "is QALoRA", "use_bdlora": "is block-diagonal",
}  # fmt: skip
MERGE = "merge it into the model (`merge()`, `sparsify adapter merge`) and serve that"


def served_rank(rank: int | None) -> int | None:
    """The smallest `max_lora_rank` of vLLM that serves an adapter of this rank; None where there is none."""
    return next((r for r in RANKS if rank is not None and r >= rank), None)


@dataclass(frozen=True, kw_only=True)
class ServedLayer:
    """A linear that vLLM adapts."""

    module: str
    rank: int
    inputs: int
    outputs: int

    def numbers(self, rank: int | None = None) -> int:
        """How many numbers its two factors hold, or would hold when padded to `rank`."""
        return (rank or self.rank) * (self.inputs + self.outputs)


@printable
@dataclass(frozen=True, kw_only=True)
class VllmReport:
    """layers: what is served, in the folder's order. max_lora_rank: what the server must be started with; None where nothing serves.

    refusals: why vLLM would not take the folder; empty where it does. base: where the model lies, as far as the folder says so.
    """

    layers: tuple[ServedLayer, ...]
    max_lora_rank: int | None
    refusals: tuple[Refusal, ...]
    base: str

    @property
    def fine(self) -> bool:
        return not self.refusals

    @property
    def rank(self) -> int:
        """The largest rank of a layer; 0 without any."""
        return max((layer.rank for layer in self.layers), default=0)

    def padding(self) -> float:
        """By how much a slot is larger than the factors that lie in it: 0 for none, 1 for twice the size."""
        held = sum(layer.numbers() for layer in self.layers)
        slot = sum(layer.numbers(self.max_lora_rank) for layer in self.layers)
        return slot / held - 1 if held and self.max_lora_rank else 0.0

    def command(self, name: str, folder: str) -> str:
        """The line that serves the adapter `name` from `folder`."""
        words = ["vllm", "serve", self.base or "MODEL", "--enable-lora", "--max-lora-rank", str(self.max_lora_rank)]
        return shlex.join([*words, "--lora-modules", f"{name}={folder}"])

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "fine": self.fine,
            "rank": self.rank,
            "max_lora_rank": self.max_lora_rank,
            "padding": round(self.padding(), 4),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "refused": [dataclasses.asdict(refusal) for refusal in self.refusals],
        }

    def __str__(self) -> str:
        lines = [
            f"{layer.module}: rank {layer.rank}, "
            + (f"{self.max_lora_rank - layer.rank} rows of padding" if self.max_lora_rank else "not served")
            for layer in self.layers
        ]
        if self.fine:
            lines.append(
                f"{len(self.layers)} linears, rank {self.rank} at most: --max-lora-rank {self.max_lora_rank}, "
                f"a slot is {100 * self.padding():.0f} % larger than the factors"
            )
        lines += [f"vLLM refuses {in_full(refusal)}" for refusal in self.refusals]
        return "\n".join(lines)


def check_for_vllm(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    max_lora_rank: int | None = None,
    model_type: str | None = None,
) -> VllmReport:
    """What vLLM makes of a folder. config: of adapter_config.json. shapes: of every tensor, by name.

    max_lora_rank: of the server that there is; None asks for the smallest that serves. model_type: of the base, where it is known.
    """
    layers, refusals = [], list(whole_folder(config, model_type))
    heads: set[str] = set()
    said = tuple(f"{module}." for module in config.get("modules_to_save") or () if module not in HEADS)
    for name, shape in shapes.items():
        module, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
        if module.startswith(said) or (module.endswith(".bias") and config.get("bias", "none") != "none"):
            continue
        if reason := why_not(module, leaf, shape, heads):
            refusals.append(Refusal(module, reason))
        elif leaf == "A.weight":
            other = shapes.get(name.replace(".lora_A.", ".lora_B."))
            if other is None or len(other) != 2 or other[1] != shape[0]:
                refusals.append(Refusal(module, "lora_A has no lora_B that fits"))
            else:
                layers.append(ServedLayer(module=module, rank=shape[0], inputs=shape[1], outputs=other[0]))
    if len(heads) > 1:
        refusals.append(Refusal(", ".join(sorted(heads)), f"vLLM takes one head in full, not several; {MERGE}"))
    rank = max((layer.rank for layer in layers), default=0)
    most = served_rank(rank) if max_lora_rank is None else max_lora_rank
    if not layers and not refusals:
        refusals.append(Refusal("the folder", "it holds no factors of a linear"))
    if most is None:
        large = next(layer for layer in layers if layer.rank == rank)
        refusals.append(
            Refusal(
                large.module,
                f"rank {rank} is more than vLLM's largest, {RANKS[-1]}; train fewer units (`sparsify plan --max-lora-rank`), or {MERGE}",
            )
        )
    elif most not in RANKS and max_lora_rank is not None:
        refusals.append(Refusal("--max-lora-rank", f"{most} is none of vLLM's ranks, {', '.join(map(str, RANKS))}"))
    elif rank > most:
        refusals += [
            Refusal(layer.module, f"rank {layer.rank} is more than --max-lora-rank {most}; the server needs {served_rank(rank)}")
            for layer in layers
            if layer.rank > most
        ]  # fmt: skip
    return VllmReport(
        layers=tuple(layers),
        max_lora_rank=most,
        refusals=tuple(refusals),
        base=str(config.get("base_model_name_or_path") or ""),
    )


def whole_folder(config: Mapping[str, Any], model_type: str | None) -> list[Refusal]:
    """What the configuration alone rules out."""
    found = []
    if config.get("peft_type", "LORA") != "LORA":
        found.append(Refusal("the folder", f"it is {config['peft_type']}, and vLLM serves LoRA alone"))
    if model_type in WITHOUT_LORA:
        found.append(Refusal(f"the model type {model_type!r}", f"vLLM serves no adapters over it; {MERGE}"))
    elif config.get("fan_in_fan_out"):
        found.append(Refusal("fan_in_fan_out", f"vLLM serves no adapters over models of Conv1D; {MERGE}"))
    if config.get("bias", "none") != "none":
        found.append(Refusal("bias", f"biases trained, and vLLM serves low-rank changes alone; {MERGE}"))
    for module in config.get("modules_to_save") or ():
        if module not in HEADS:
            found.append(Refusal(str(module), f"it trained in full, and vLLM serves low-rank changes alone; {MERGE}"))
    for key, what in OTHER_WAYS.items():
        if config.get(key):
            found.append(Refusal(key, f"the adapter {what}, which vLLM does not serve"))
    if config.get("target_parameters"):
        packed = ", ".join(map(str, config["target_parameters"]))
        found.append(
            Refusal(packed, f"packed experts have another layout in vLLM, model by model; not served here; {MERGE}")
        )
    if config.get("trainable_token_indices"):
        found.append(Refusal("trainable_token_indices", f"vLLM has no place for single rows of an embedding; {MERGE}"))
    return found


def why_not(module: str, leaf: str, shape: tuple[int, ...], heads: set[str]) -> str | None:
    """Why vLLM has no place for one tensor; None where it has, or where `whole_folder` said it. heads: gets a head in full."""
    if not leaf:
        owner, _, end = module.rpartition(".")
        head = owner.rpartition(".")[2]
        if head in HEADS and end in ("weight", "bias"):
            heads.add(owner)
            return None
        if ".token_adapter" in module or module.endswith(".trainable_tokens_delta"):
            return None
        return f"it trained in full, and vLLM serves low-rank changes alone; {MERGE}"
    if leaf.startswith("embedding_"):
        return f"factors of an embedding are served over some architectures alone (Llama's, not Qwen2's); train linears, or {MERGE}"
    if leaf not in ("A.weight", "B.weight"):
        return f"vLLM does not know lora_{leaf}"
    if len(shape) != 2:
        return f"it is a convolution, and vLLM adapts linears alone; {MERGE}"
    return None


__all__ = ["RANKS", "ServedLayer", "VllmReport", "check_for_vllm", "served_rank"]

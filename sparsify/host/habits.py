"""Words that users bring from PEFT's models: names of verbs, their arguments, and verbs of the model itself.

model.sparsify.save_pretrained(…)                       an AttributeError that says `save_adapter(folder)`
model.sparsify.set_adapter(adapter_name="a")            set_adapter("a")
model.sparsify.merge_and_unload(progressbar=True)       merge_and_unload()
model.sparsify.load_adapter(folder, is_trainable=True)  an ArgumentError that says what makes it train
model.print_trainable_parameters()                      model.sparsify.print_trainable_parameters()
model.add_adapter(LoraConfig(…))                        refused: transformers would put PEFT's layers around ours
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from torch import nn

from sparsify.errors import SparsifyError
from sparsify.host.live_state import OnHost
from sparsify.plan.rules import ArgumentError, nearest

P = ParamSpec("P")
T = TypeVar("T")

WORDS = {
    "save_pretrained": "save_adapter(folder), or export_lora(folder) for a folder that PEFT reads",
    "from_pretrained": "sparsify.load(model, folder)",
    "unload": "restore(): the base, bit for bit",
    "get_base_model": "restore(), or plain() for a copy with what is active folded in",
    "merge_adapter": "merge()",
    "unmerge_adapter": "unmerge()",
    "add_weighted_adapter": "set_adapter({'a': 0.5, 'b': 0.5}), or fuse_adapters({'a': 0.5, 'b': 0.5}, 'name') to keep the sum",
    "get_nb_trainable_parameters": "count_parameters()",
    "get_model_status": "get_layer_status()",
    "enable_adapter_layers": "set_adapter(name)",
    "disable_adapter_layers": "set_adapter(None), or `with model.sparsify.disable_adapter(): …`",
    "enable_adapters": "set_adapter(name)",
    "disable_adapters": "set_adapter(None), or `with model.sparsify.disable_adapter(): …`",
    "active_adapter": "active_adapters",
    "set_adapters": "set_adapter({'a': 0.5, 'b': 0.5})",
    "delete_adapters": "delete_adapter(name)",
    "peft_config": "plan",
    "get_peft_model_state_dict": "current(), the adapter as tensors",
    "print_report": "report",
    "summary": "report",
}


def answer(word: str) -> str:
    """What to say about an attribute that the handle does not have."""
    hint = f"; here it is {WORDS[word]}" if word in WORDS else ""
    return f"model.sparsify has no {word!r}{hint}"


# --- arguments of verbs ---

#: PEFT's argument → ours, where the verb has it
SAME = {
    "adapter_name": ("name", "spec"), "model_id": ("directory", "adapters"), "peft_model_id": ("directory", "adapters"),
    "save_directory": ("directory",), "adapters": ("weights",),
}  # fmt: skip
#: arguments that say nothing here at these values
SILENT: dict[str, tuple[object, ...]] = {
    "progressbar": (True, False), "safe_merge": (True, False), "safe_serialization": (True,), "low_cpu_mem_usage": (True, False),
    "autocast_adapter_dtype": (True, False), "is_trainable": (False,), "adapter_names": (None,), "selected_adapters": (None,),
    "inference_mode": (True, False), "peft_config": (None,), "state_dict": (None,), "weights": (None,),
}  # fmt: skip
ADVICE = {
    "is_trainable": "what is loaded trains once set_adapter(name) makes it active, where the plan trains the same; sparsify.load gives a "
    "host that trains nothing: compile the plan, then load_adapter",
    "adapter_names": "set_adapter(…) first: what is active is folded in",
    "selected_adapters": "save_adapter(folder, name) writes one adapter",
    "safe_serialization": "files are safetensors",
    "peft_config": "what trains is the plan's; for other units compile another plan",
    "config": "what trains is the plan's; for other units compile another plan",
    "state_dict": "load_state_dict first, then save_adapter",
    "combination_type": "sums are weighted sums of changes",
    "torch_device": "the host is where its model is: model.to(device)",
    "device_map": "the host is where its model is: model.to(device)",
    "subfolder": "give the folder itself",
    "revision": "write owner/name@revision",
    "token": "log in with huggingface_hub (hf auth login)",
    "push_to_hub": "write the folder, then huggingface_hub.upload_folder",
}


def peft_words(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb that takes PEFT's words for its arguments, and answers those that mean nothing here. Raises ArgumentError."""
    known = inspect.signature(verb).parameters
    places = [p for p in known.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(verb)
    def call(*values: P.args, **named: P.kwargs) -> T:
        if len(values) > len(places):
            more = ADVICE["peft_config"] if verb.__name__ == "add_adapter" else f"it takes {', '.join(map(str, known))}"
            raise ArgumentError(f"{verb.__name__}: {len(values) - 1} values are given by position; {more}")
        if any(word not in known for word in named):
            named = in_our_words(verb.__name__, named, list(known))  # type: ignore[assignment]
        return verb(*values, **named)

    return call


def in_our_words(verb: str, named: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word, value in named.items():
        ours = word if word in known else next((w for w in SAME.get(word, ()) if w in known), None)
        if ours is None:
            if any(value is neutral for neutral in SILENT.get(word, ())):
                continue
            advice = f"; {ADVICE[word]}" if word in ADVICE else nearest(word, [w for w in known if w != "self"])
            raise ArgumentError(f"{verb}: no argument {word!r}{advice}")
        if ours in found:
            raise ArgumentError(f"{verb}: {ours} is given twice")
        found[ours] = value
    return found


# --- verbs of the model ---

FORWARDED = ("print_trainable_parameters", "merge_and_unload")
TRANSFORMERS = (
    "add_adapter", "load_adapter", "set_adapter", "enable_adapters", "disable_adapters", "active_adapters", "delete_adapter",
    "get_adapter_state_dict",
)  # fmt: skip


class Forwarded(OnHost):
    """A verb that PEFT's models have themselves, and the user's class has not."""

    def __init__(self, host: nn.Module, method: str) -> None:
        super().__init__(host)
        self.method = method

    def __call__(self, *values: object, **named: object) -> object:
        return getattr(self.host.__dict__["sparsify"], self.method)(*values, **named)


class Elsewhere(Forwarded):
    """A verb by which transformers would put PEFT's layers around a host's own, or look for them in vain."""

    def __call__(self, *values: object, **named: object) -> object:
        here = WORDS.get(self.method, self.method)
        raise SparsifyError(
            f"{self.method}: this model's adapters are sparsify's, not PEFT's: call model.sparsify.{here}; for PEFT's layers use "
            "model.sparsify.plain()"
        )


def take_words(host: nn.Module) -> None:
    """Put PEFT's verbs on a host: what its class lacks, and what transformers would do to another kind of model."""
    for word in FORWARDED:
        if not hasattr(type(host), word):
            host.__dict__[word] = Forwarded(host, word)
    for word in TRANSFORMERS:
        own = getattr(type(host), word, None)
        if str(getattr(own, "__module__", "")).startswith("transformers."):
            host.__dict__[word] = Elsewhere(host, word)


__all__ = ["WORDS", "answer", "peft_words", "take_words"]

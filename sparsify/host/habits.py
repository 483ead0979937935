"""Words of PEFT's models that the handle has under another name: the answer to `model.sparsify.save_pretrained(…)`."""

from __future__ import annotations

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


__all__ = ["WORDS", "answer"]

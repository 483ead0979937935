"""What makes a model's outputs: embeddings, the output projection, and the heads of Hugging Face's task models.

    BertForSequenceClassification   bert (the base), dropout, classifier            ─▶ classifier.*
    BertForMaskedLM                 bert, cls.predictions (transform, decoder)      ─▶ cls.*
    Wav2Vec2ForCTC                  wav2vec2, dropout, lm_head                      ─▶ lm_head.*
    T5ForConditionalGeneration      encoder, decoder, lm_head (no base)             ─▶ lm_head.*, by get_output_embeddings

A task model says what is not its head: `base_model_prefix` names the module that holds the base. What lies beside that and
holds no stack of blocks is the head. A plain module says nothing, and no head is guessed for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sparsify.model.blocks import repeated_blocks


def output_modules(host: nn.Module) -> Iterator[nn.Module]:
    """What `get_output_embeddings()` gives, of the model and of models inside of it."""
    for module in host.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        try:
            head = get_head() if callable(get_head) else None
        except (AttributeError, NotImplementedError):  # some classes have the method and no head
            head = None
        if isinstance(head, nn.Module):
            yield head


def task_heads(host: nn.Module) -> Iterator[nn.Module]:
    """Modules beside the base of a task model, without those that hold stacks of blocks (decoders)."""
    for module in host.modules():
        prefix = getattr(module, "base_model_prefix", None)
        base = getattr(module, prefix, None) if isinstance(prefix, str) and prefix else None
        if not isinstance(base, nn.Module) or base is module:
            continue
        for child in module.children():
            if child is not base and not repeated_blocks(child):
                yield child


def names_of(host: nn.Module, modules: Iterator[nn.Module]) -> set[str]:
    """Names of all parameters in `modules`, every alias included."""
    found = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in host.named_parameters(remove_duplicate=False) if id(p) in found}


def output_parameters(host: nn.Module) -> set[str]:
    """Names of the output projection's parameters, every alias included."""
    return names_of(host, output_modules(host))


def head_parameters(host: nn.Module) -> set[str]:
    """Names of the parameters of embeddings, output projection and task heads, every alias included."""
    embeddings = {id(p) for m in host.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    named = {name for name, p in host.named_parameters(remove_duplicate=False) if id(p) in embeddings}
    return named | output_parameters(host) | names_of(host, task_heads(host))

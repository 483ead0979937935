"""Names of graph inputs: identifiers, whatever the model's modules are called.

    "up.x=exec(…) and y.weight" ──▶ placeholder `p_up_x_exec_and_y_weight`; the qualified name stays in `Program.inputs` alone

FX writes the names of placeholders into Python source, unquoted. Modules are called what a `ModuleDict` key says: "en-de", "a b",
"class", or code. So a name of the model reaches a graph only through `identifier`, and only a graph's own namespace, which
numbers what it has seen, decides that it is unique.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from dataclasses import replace

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

LONGEST = 120  # characters; a longer name is cut


def identifier(text: str) -> str:
    """ASCII letters, digits and underscores that Python takes for a name. Not injective: see `placeholder`."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", text)[:LONGEST]
    if not name or name[0].isdigit():
        name = f"_{name}"
    return f"{name}_" if keyword.iskeyword(name) or keyword.issoftkeyword(name) else name


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters, line separators and lone surrogates as escapes: one line of any console and any XML."""
    hidden = {c for c in text if c not in keep and unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp", "Cf")}
    for character in hidden:
        text = text.replace(character, character.encode("unicode_escape").decode("ascii"))
    return text


def is_safe(text: str) -> bool:
    """Whether a name can stand in generated source as it is."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def placeholder(graph: fx.Graph, text: str) -> fx.Node:
    """A new input at the graph's insertion point, under an identifier made of `text` that no other node of the graph has."""
    node = graph.placeholder(identifier(text))
    node.target = node.name  # the parameter's name in the generated source; the graph has made `name` unique
    return node


def with_safe_targets(exported: ExportedProgram) -> tuple[ExportedProgram, dict[str, str]]:
    """The program with its tensors under names that can stand in source, and new name → old name; itself where they can already.

    `ExportedProgram.module()`, which `run_decompositions` and AOTInductor call, writes the path of every tensor into source.
    """
    signature = exported.graph_signature
    held = [*exported.state_dict, *exported.constants]
    held += [s.target for s in (*signature.input_specs, *signature.output_specs) if s.target is not None]
    if all(re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name) for name in held):
        return exported, {}
    new: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(held):
        free = base = identifier(name)
        number = 0
        while free in taken:
            number += 1
            free = f"{base}_{number}"
        taken.add(free)
        new[name] = free
    inputs = [replace(s, target=new.get(s.target, s.target)) for s in signature.input_specs]  # type: ignore[arg-type]
    outputs = [replace(s, target=new.get(s.target, s.target)) for s in signature.output_specs]  # type: ignore[arg-type]
    safe = ExportedProgram(
        root=exported.graph_module,
        graph=exported.graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={new[name]: tensor for name, tensor in exported.state_dict.items()},
        range_constraints=dict(exported.range_constraints),
        module_call_graph=[entry for entry in exported.module_call_graph if entry.fqn == ""],
        example_inputs=exported.example_inputs,
        constants={new[name]: value for name, value in exported.constants.items()},
        verifiers=exported.verifiers,
    )
    return safe, {short: name for name, short in new.items()}


def with_targets(exported: ExportedProgram, names: dict[str, str]) -> ExportedProgram:
    """The program with its tensors renamed by `names`, as they were before `with_safe_targets`. Changes it in place."""
    signature = exported.graph_signature
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.target is not None:
            spec.target = names.get(spec.target, spec.target)
    exported._constants = {names.get(name, name): value for name, value in exported.constants.items()}
    exported._state_dict = {names.get(name, name): value for name, value in exported.state_dict.items()}
    return exported


__all__ = ["identifier", "is_safe", "placeholder", "printable", "with_safe_targets", "with_targets"]

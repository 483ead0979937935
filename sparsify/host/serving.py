"""What `sparsify.load` needs besides a handle: names for folders, and the base that the adapters were trained on.

Nothing of an adapter asks for a traced graph: its changes lie in original coordinates of named weights. So the program of a
serving host is empty, and any module can be served. Only where an adapter's own plan quantised the base, the model is traced once
to find the weights that the rules match; they are replaced by what their packed forms stand for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import fx, nn
from torch.utils import _pytree as pytree

from sparsify.adapters import adapter as files
from sparsify.adapters import peft_format
from sparsify.errors import AdapterError, SparsifyError
from sparsify.files.hub import hub_folder, is_hub_name
from sparsify.files.strict_json import short
from sparsify.formats import pack, unpack
from sparsify.plan import Plan, Quantize, Rule
from sparsify.plan.name_patterns import matches
from sparsify.program import Captured, Program, Stage, canonical_names
from sparsify.pruning.rule import Prune, head_parameters

AdapterPath = str | os.PathLike[str]
AdapterPaths = AdapterPath | Sequence[AdapterPath] | Mapping[str, AdapterPath]


def name_folders(adapters: AdapterPaths, name: str | None) -> dict[str, Path]:
    """Name → folder. Raises AdapterError for what is no folder here, for names that are given twice, and for nothing at all."""
    if isinstance(adapters, str | os.PathLike):
        named = [("default" if name is None else name, adapters)]
    elif name is not None:
        raise AdapterError(
            f"load: name={name!r} belongs to one adapter; pass a mapping from name to folder for several"
        )
    elif isinstance(adapters, Mapping):
        named = list(adapters.items())
    elif isinstance(adapters, Sequence) and not isinstance(adapters, bytes | bytearray):
        named = [(Path(os.path.abspath(folder)).name if is_path(folder) else "", folder) for folder in adapters]
    else:
        raise AdapterError(
            f"load: expected a folder, a list of folders, or a mapping from name to folder, got {short(adapters)}"
        )
    if not named:
        raise AdapterError("load: no adapter is named")
    found: dict[str, Path] = {}
    for key, folder in named:
        if not is_path(folder) or not isinstance(key, str) or not key:
            raise AdapterError(f"load: expected a name and a folder, got {short(key)} and {short(folder)}")
        if key in found:
            raise AdapterError(f"load: two adapters would be called {key!r}; pass a mapping from name to folder")
        found[key] = check_folder(folder)
    return found


def is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


#: what an adapter consists of, ours and PEFT's, in a repository of a hub
HUB_FILES = (files.TENSORS, files.DOCUMENT, peft_format.CONFIG, peft_format.TENSORS)


def check_folder(folder: AdapterPath) -> Path:
    """The folder of an adapter; a name of a model hub (`owner/name`, `owner/name@revision`) becomes its folder in the hub's cache."""
    path = Path(folder)
    try:
        there = path.is_dir() or path.is_file()
    except (OSError, ValueError):
        there = False
    if not there and isinstance(folder, str) and is_hub_name(folder):
        path = hub_folder(folder, HUB_FILES, AdapterError)
    elif not there:
        raise AdapterError(f"load: {short(str(folder))} is no folder on this machine")
    if path.is_dir() and not peft_format.is_peft(path) and not (path / files.TENSORS).exists():
        raise AdapterError(
            f"load: {path} holds no adapter: neither {files.TENSORS}, which save_adapter writes, nor PEFT's {peft_format.CONFIG}"
        )
    return path


def plan_of(folder: Path) -> Plan | None:
    """The plan that an adapter carries; None for PEFT's folders, and for adapters without one."""
    if peft_format.is_peft(folder):
        return None
    text = files.load(folder).info.get("plan")
    if text is None:
        return None
    if not isinstance(text, str):
        what = f"the plan is not JSON: expected a string, got {type(text).__name__}"
        raise AdapterError(f"{folder}: the plan that the adapter carries cannot be read: {what}")
    try:
        return Plan.from_json(text)
    except SparsifyError as error:
        raise AdapterError(f"{folder}: the plan that the adapter carries cannot be read: {error}") from error


def bare_program(host: nn.Module, note: str) -> Program:
    """A program without a graph, for a model that is not traced."""
    graph = fx.Graph()
    graph.output(())
    return Program(
        graph_module=fx.GraphModule(nn.Module(), graph),
        inputs=(),
        host=host,
        captured=Captured(
            pytree.tree_flatten(((), {}))[1], pytree.tree_flatten(())[1], 0, ((), {}), canonical_names(host), {}
        ),
        stage=Stage.LOWERED,
        history=(note,),
    )


def serving_program(
    source: nn.Module, folders: Mapping[str, Path], select: Callable[[Plan], Program]
) -> tuple[Program, dict[str, str], Plan]:
    """The program of a serving host, hashes of the weights that were replaced, and the plan that all adapters carry (or none).

    select: runs the passes up to the selection for a plan. Raises AdapterError when the adapters were trained on differently
    quantised bases, or when their plan pruned a base that is not pruned here.
    """
    plans = {name: plan_of(folder) for name, folder in folders.items()}
    for name, plan in plans.items():
        for rule in plan.rules if plan is not None else ():
            if isinstance(rule, Prune):
                check_pruned(source, rule, f"{folders[name]}")
    quantised = {name: quantize_rules(plan) for name, plan in plans.items()}
    first = next(iter(quantised))
    for name, rules in quantised.items():
        if rules != quantised[first]:
            raise AdapterError(
                f"load: {first!r} and {name!r} were trained over differently quantised bases ({shown(quantised[first])}, {shown(rules)}); "
                "load them onto two hosts"
            )
    note = f"load: {', '.join(folders)}; the model is not traced"
    carried = plans[first]
    plan = carried if carried is not None and all(p == carried for p in plans.values()) else Plan.empty()
    if not quantised[first]:
        return bare_program(source, note), {}, plan
    found = select(Plan(quantised[first]))
    tensors, hashes = {}, {}
    for param, format in found.quantize.items():
        weight = found.tensor(param).detach()
        hashes[param] = files.tensor_hash(weight)
        tensors[param] = unpack(pack(weight, format), format, tuple(weight.shape), weight.dtype)
    note += f"; {len(tensors)} weights stand as {shown(quantised[first])} leaves them"
    return replace(bare_program(source, note), tensors=tensors), hashes, plan


def quantize_rules(plan: Plan | None) -> tuple[Rule, ...]:
    return tuple(rule for rule in plan.rules if isinstance(rule, Quantize)) if plan is not None else ()


def shown(rules: tuple[Rule, ...]) -> str:
    return ", ".join(map(str, rules)) or "not quantised"


def check_pruned(model: nn.Module, rule: Prune, where: str) -> None:
    """Refuse a dense model for an adapter whose plan pruned the base: it would compute over other weights than it was trained on."""
    zeros = total = 0.0
    dense = head_parameters(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not rule.matches(name) or module.weight.is_meta:
            continue
        if f"{name}.weight" in dense or any(matches(pattern, name) for pattern in rule.exclude):
            continue
        share = rule.sparsity_of(name)
        if share:
            total += share * module.weight.numel()
            zeros += min(float((module.weight.detach() == 0).sum()), share * module.weight.numel())
    if zeros < 0.5 * total or not total:
        raise AdapterError(
            f"{where}: the adapter's plan prunes the base ({rule}), and this model is not pruned so; load the adapter onto the pruned "
            "model (model.sparsify.plain(), or a checkpoint that save_sparse wrote)"
        )

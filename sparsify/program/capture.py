"""Capture: any `nn.Module` → a `Program` at stage CAPTURED, without writing to the module.

    model ──copy that shares tensors──▶ ──torch.export (non-strict, eval, caches off)──▶ ──in-place operations made
    functional──▶ ATen graph; every tensor a named input

Hugging Face models need no example: dummy inputs are made from the config. Whole operators (`aten.linear`,
`aten.scaled_dot_product_attention`) survive, and every parameter keeps its qualified name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

import sparsify.ops  # noqa: F401  (registers the operators that a host may already contain)
from sparsify.errors import CaptureError, Refusal
from sparsify.model.module_tree import copy_module_tree, first_line
from sparsify.model.sharded import back_to_pieces, zero_pieces
from sparsify.model.untouched import fake_in, untouched
from sparsify.program import Program, Stage
from sparsify.program.names import is_safe, with_safe_targets, with_targets

if TYPE_CHECKING:
    from sparsify.program.values import Batch, Inputs

CACHE_SWITCHES = ("use_cache",)
#: Sub-configurations of composite Hugging Face configurations.
SUB_CONFIGS = (
    "text_config", "vision_config", "audio_config", "thinker_config", "talker_config", "decoder", "encoder", "llm_config",
    "qformer_config", "language_config",
)  # fmt: skip
#: Settings that name the token which stands for a picture, a film or a sound: such a model also reads text alone.
PLACEHOLDER_TOKENS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id", "audio_token_index",
    "vision_start_token_id", "vision_end_token_id", "vision_token_id", "boi_token_index", "eoi_token_index", "boi_token_id",
    "eoi_token_id", "image_start_token_id", "image_end_token_id", "audio_start_token_id", "audio_end_token_id",
)  # fmt: skip
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "decoder_input_ids", "use_cache")
QUIET = ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "torch._subclasses", "torch._functorch")


def capture(model: nn.Module, example: Batch | None = None) -> Program:
    """Trace `model` into a `Program`.

    example: positional inputs as a tuple or list, keyword inputs as a mapping (a batch from a data loader), or one
        tensor. None is enough for Hugging Face models.

    A vision–language model whose picture path branches on values is traced on its text alone; the program then says so in its
    `refusals`. Raises CaptureError with the line of the model that stopped the trace and what to try.
    """
    model = unwrap(model)
    check_ready(model)
    args, kwargs = example_inputs(model, example)
    notes: tuple[Refusal, ...] = ()
    try:
        exported = trace(model, args, kwargs)
    except CaptureError as error:
        text = text_alone(model, args, kwargs)
        if text is None:
            raise
        try:
            exported = trace(model, (), text)
        except CaptureError:
            raise error from None
        left = sorted(set(kwargs) - set(text))
        args, kwargs = (), text
        notes = (
            Refusal(
                type(model).__name__,
                TEXT_ONLY.format(left=", ".join(left), unread=unread(exported), why=stopped(error)),
            ),
        )
    return replace(Program.from_export(exported, model, args, kwargs), refusals=notes)


TEXT_ONLY = (
    "it was traced on text alone, because the path of {left} could not be traced ({why}); structures in {unread} are not looked "
    "for, and nothing there moves"
)


def trace(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], training: bool = False
) -> torch.export.ExportedProgram:
    """Export a copy of `model`, in eval mode unless `training`, that shares its tensors; in-place operations come out functional.

    What the forward sets, registers, appends or caches stays in the copy. Raises CaptureError.
    """
    with untouched(model):
        shadow = shadow_of(model)
        with evaluating(shadow, training), torch.no_grad(), quiet():
            try:
                exported = torch.export.export(shadow, args, kwargs, strict=False)
                return functional(exported)
            except CaptureError:
                raise
            except Exception as error:
                failure = CaptureError(explain(model, error.error if isinstance(error, Stopped) else error, kwargs))
    raise failure


def functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program with `relu_(x)` as `relu(x)` and so on, whole operators kept; itself if nothing writes in place.

    A pass that moves a read past a write would be wrong, and a structure behind an in-place activation would not be found.
    """
    if not any(writes_in_place(node) for node in every_node(exported.graph_module)):
        return exported
    safe, names = with_safe_targets(exported)
    result = with_targets(safe.run_decompositions({}), names)
    read_through_scatters(result.graph)
    for node in result.graph.nodes:  # decomposed for the strides of fake tensors, which those of real ones need not be
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    result.graph_module.recompile()
    return result


def read_through_scatters(graph: torch.fx.Graph) -> None:
    """A slice of `slice_scatter(base, new)` reads `new` where it reads just that, and `base` where it reads nothing of it."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        while node.target is aten.slice.Tensor and getattr(node.args[0], "target", None) is aten.slice_scatter.default:
            scatter = node.args[0]
            read, written = slice_range(node, node.args[1:]), slice_range(node, scatter.args[2:])
            if read is None or written is None or read[0] != written[0]:
                break
            if read == written:
                node.replace_all_uses_with(scatter.args[1])
                break
            if read[2] > written[1] and written[2] > read[1]:
                break
            node.replace_input_with(scatter, scatter.args[0])
    graph.eliminate_dead_code()


def slice_range(node: torch.fx.Node, arguments: tuple[Any, ...]) -> tuple[int, int, int] | None:
    """(dim, start, stop) of a slice of `node`'s source by `(dim, start, end, step)`; None unless it is contiguous and static."""
    given: tuple[Any, ...] = (*arguments, *(0, None, None, 1)[len(arguments) :])
    dim, start, end, step = given
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    dim %= len(shape)
    size = shape[dim]
    if step != 1 or any(type(value) not in (int, type(None)) for value in (size, start, end)):
        return None
    start, stop, _ = slice(start, end).indices(size)
    return dim, start, max(start, stop)


def every_node(graph_module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def writes_in_place(node: torch.fx.Node) -> bool:
    """Whether a node changes the value of one of its arguments (`detach_` of a new constant does not)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    return target is not torch.ops.aten.detach_.default


def check_ready(model: nn.Module) -> None:
    """Raises CaptureError for a model without parameters, with parameters that have no shape yet, or broken by a trace."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise CaptureError(
                f"{name} has no shape yet (a lazy module): call the model once with a real batch, then sparsify.compile"
            )
    if next(model.parameters(), None) is None:
        raise CaptureError(f"{type(model).__name__} has no parameters: there is nothing to train, prune or quantise")
    broken = fake_in(model)
    if broken is not None:
        raise CaptureError(
            f"{broken} holds a fake tensor, which an earlier torch.export or torch.compile of this model left there: set it "
            "anew, or build the model again"
        )


def switch_off_caches(model: nn.Module) -> None:
    """Set `use_cache=False` in every configuration of a copy, for models that take no such argument."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for part in configs(config):
            for switch in CACHE_SWITCHES:
                if getattr(part, switch, None):
                    with contextlib.suppress(Exception):  # a configuration may be read-only
                        setattr(part, switch, False)


def configs(config: object) -> list[object]:
    """A configuration and the configurations inside it."""
    if config is None or isinstance(config, dict | str | type):
        return []
    found, pending = [], [config]
    while pending:
        part = pending.pop()
        if part is None or any(part is other for other in found) or isinstance(part, dict | str | int | type):
            continue
        found.append(part)
        pending += [getattr(part, name, None) for name in SUB_CONFIGS]
    return found


class Stopped(Exception):
    """The model's own error on its way out of a trace. Torch would hang the graph so far on it, and print that."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error

    def __setattr__(self, name: str, value: object) -> None:
        if name != "partial_fx_graph":
            super().__setattr__(name, value)


def give_plain_outputs(model: nn.Module) -> None:
    """Let a copy return tensors, containers and mappings of them, where its class returns objects that export does not know."""
    forward = model.forward

    @functools.wraps(forward)
    def plain_forward(*args: object, **kwargs: object) -> object:
        try:
            return plain_output(forward(*args, **kwargs))
        except Exception as error:
            raise Stopped(error) from None

    model.__dict__["forward"] = plain_forward


def plain_output(value: object, depth: int = 8) -> object:
    """`value` with objects that pytree does not know (dataclasses, caches, distributions) as dicts of their fields.

    Fields without a tensor in them are left out; so is what refers to itself.
    """

    def convert(leaf: object) -> object:
        if leaf is None or isinstance(leaf, torch.Tensor | int | float | bool | str | complex | torch.SymInt):
            return leaf
        if depth == 0:
            return None
        if is_dataclass(leaf) and not isinstance(leaf, type):
            members = {f.name: getattr(leaf, f.name, None) for f in fields(leaf)}
        elif isinstance(leaf, Mapping):
            members = {str(name): member for name, member in leaf.items()}
        elif isinstance(leaf, nn.Module | type) or callable(leaf):
            members = {}
        elif isinstance(leaf, set | frozenset):
            members = dict(enumerate(leaf))
        else:
            members = dict(getattr(leaf, "__dict__", {}))
        found = {name: plain_output(member, depth - 1) for name, member in members.items()}
        kept = {name: m for name, m in found.items() if any(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(m))}
        return kept or None

    return pytree.tree_map(convert, value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines and warnings of torch while it traces: what stops a trace is in the error."""
    names = {name for name in (*QUIET, *logging.root.manager.loggerDict) if name.startswith(QUIET)}
    # those without a level of their own take that of the logger above; setting one makes every logger forget what it knew
    before = [(x, x.level) for x in map(logging.getLogger, names) if x.level != logging.NOTSET or x.name in QUIET]
    for logger, _ in before:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assigned during export.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


def text_alone(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, object] | None:
    """The text among the inputs of a vision or audio language model, when there is something else too; else None."""
    config = getattr(model, "config", None)
    extra = [name for name, value in kwargs.items() if name not in TEXT_INPUTS and holds_tensor(value)]
    ids = kwargs.get("input_ids")
    if args or not extra or not isinstance(ids, torch.Tensor) or len(configs(config)) < 2:
        return None
    kept = {name: value for name, value in kwargs.items() if name in TEXT_INPUTS or not holds_tensor(value)}
    special = placeholder_tokens(config)
    if special:
        kept["input_ids"] = torch.where(
            torch.isin(ids, torch.tensor(special, device=ids.device)), ordinary(special), ids
        )
    return kept


def holds_tensor(value: object) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def placeholder_tokens(config: object) -> list[int]:
    """Ids of the tokens that stand for pictures and sounds in a model's text."""
    found = (getattr(part, name, None) for part in configs(config) for name in PLACEHOLDER_TOKENS)
    return sorted({token for token in found if isinstance(token, int)})


def ordinary(special: list[int]) -> int:
    """A small token id that stands for itself."""
    return next(token for token in range(3, 3 + len(special) + 1) if token not in special)


def unread(exported: torch.export.ExportedProgram) -> str:
    """The outermost modules of which the trace read no parameter, in words."""
    names = exported.graph_signature.inputs_to_parameters
    read = [names[n.name] for n in exported.graph.nodes if n.op == "placeholder" and n.name in names and n.users]
    idle = [names[n.name] for n in exported.graph.nodes if n.op == "placeholder" and n.name in names and not n.users]
    found: dict[str, None] = {}
    for name in idle:
        parts = name.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        found[next((p for p in prefixes if not any(r.startswith(p + ".") for r in read)), name)] = None
    return ", ".join(list(found)[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "") if found else "it"


def stopped(error: CaptureError) -> str:
    """The line of a CaptureError's text that says why."""
    lines = str(error).splitlines()
    return lines[1].strip() if len(lines) > 1 else lines[0]


def capture_training(program: Program) -> Program:
    """The same model and example traced in train mode: for what differs there, never for transforming. Raises CaptureError."""
    args, kwargs = program.example
    return Program.from_export(trace(program.host, args, kwargs, training=True), program.host, args, kwargs)


def shadow_of(model: nn.Module, tensors: Literal["copied", "shared"] = "shared") -> nn.Module:
    """The copy of `model` that is run in its stead: over the same tensors or copies of them, caches off, plain outputs."""
    shadow = copy_module_tree(model, tensors=tensors)
    switch_off_caches(shadow)
    give_plain_outputs(shadow)
    return shadow


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under `torch.compile` and DistributedDataParallel; other wrappers are refused."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        return unwrap(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise CaptureError(
            f"{type(model).__name__} wraps the model: call sparsify.compile on the model first, "
            "then wrap what it returns, so that only the trainable slices are synchronised"
        )
    if isinstance(model, nn.Module) and back_to_pieces(model):
        raise CaptureError(
            "fully_shard has cut the model's parameters into pieces: call sparsify.compile on the model first, then fully_shard "
            "the blocks of what it returns and what it returns itself"
        )
    if not isinstance(model, nn.Module):
        named = isinstance(model, str | os.PathLike)
        advice = f"; load it first: AutoModelForCausalLM.from_pretrained({os.fspath(model)!r})" if named else ""
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}{advice}")
    zero = next((name for name, parameter in model.named_parameters() if zero_pieces(parameter)), None)
    if zero is not None:
        raise CaptureError(
            f"{zero} lies in pieces of DeepSpeed's ZeRO-3, and what trains cannot be chosen in it: call sparsify.compile on the whole "
            "model, then deepspeed.initialize (load the model before the TrainingArguments or the Accelerator of ZeRO-3 are made)"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module has no Python forward to trace: pass the original nn.Module")
    return model


def example_inputs(model: nn.Module, example: Batch | None) -> Inputs:
    """Arguments of one forward call, caches switched off, tensors on the model's device.

    A mapping is keyword inputs where the forward takes them, and else its one positional input.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    signature = inspect.signature(model.forward)
    if example is None:
        kwargs = dummy_inputs(model)
        args: tuple[object, ...] = ()
    elif isinstance(example, Mapping):
        args, kwargs = (), dict(example)
        if not binds(signature, args, kwargs) and binds(signature, (kwargs,), {}):
            args, kwargs = (kwargs,), {}
    elif isinstance(example, torch.Tensor):
        args, kwargs = (example,), {}
    elif isinstance(example, tuple | list):
        args, kwargs = tuple(example), {}
    else:
        raise CaptureError(f"example: expected a mapping, a tuple, or a tensor, got {type(example).__name__}")
    accepted = signature.parameters
    required = {name for name, p in accepted.items() if p.default is p.empty}
    kwargs = {n: v for n, v in kwargs.items() if n not in ("labels", "return_loss") or n in required}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    parts = configs(getattr(model, "config", None))
    given = {name for name, _ in zip(accepted, args, strict=False)}
    for switch in CACHE_SWITCHES:
        if switch not in given and (
            switch in accepted or (open_ended and any(hasattr(part, switch) for part in parts))
        ):
            kwargs[switch] = False
    for name in kwargs:
        if not isinstance(name, str) or not is_safe(name):
            raise CaptureError(
                f"example: the input {name!r} is not called by a name of Python in ASCII letters: rename it"
            )
    check_leaves(args, kwargs)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"example: {type(model).__name__}.forward{cut(str(signature))} cannot be called with it: {error}; pass keyword "
            "inputs as a mapping, positional ones as a tuple"
        ) from None
    move = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t  # noqa: E731
    args, kwargs = pytree.tree_map(move, (args, kwargs))
    return args, kwargs


def cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def binds(signature: inspect.Signature, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def check_leaves(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Raises CaptureError for an input that a trace cannot take."""
    for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
        if leaf is None or isinstance(leaf, torch.Tensor | int | float | bool | str | complex):
            continue
        if isinstance(leaf, torch.dtype | torch.device | torch.layout | torch.memory_format):
            continue
        place = f"input {path[1].idx + 1}" if path[0].idx == 0 else f"input {path[1].key!r}"  # type: ignore[attr-defined]
        rest = pytree.keystr(path[2:])
        raise CaptureError(
            f"example: {place}{rest} is a {type(leaf).__name__}; pass tensors, numbers, strings, None, and lists, tuples and "
            "dicts of them"
        )


def dummy_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Small inputs of a Hugging Face model, from its config: two rows, seven tokens (pairwise different sizes).

    A model in whose text pictures or sounds have placeholders gets text alone.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        raise CaptureError(
            f"{type(model).__name__} is not a Hugging Face model: pass example=… (a batch as a mapping, or a tuple "
            "of positional inputs)"
        )
    accepted = inspect.signature(model.forward).parameters
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "vision_config", "audio_config"))]
    parts += [part for part in configs(config) if not any(part is other for other in parts)]
    special = placeholder_tokens(config)

    def setting(*names: str) -> Any:
        for part in parts:
            for name in names:
                value = getattr(part, name, None) if part is not None else None
                if value is not None:
                    return value
        return None

    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}

    def tokens(length: int) -> torch.Tensor:
        high = min(int(setting("vocab_size") or 32), embedded(model))
        limit = setting("max_position_embeddings", "n_positions")
        length = min(length, int(limit)) if isinstance(limit, int) and limit > 0 else length
        ids = torch.randint(min(3, high - 1), high, (2, length), generator=generator)
        if special:
            ids = torch.where(torch.isin(ids, torch.tensor(special)), ordinary(special), ids)
        return ids.to(device)

    if "input_ids" in accepted and model.main_input_name != "input_features":
        inputs["input_ids"] = tokens(7)
        needed = [n for n, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if special and len(configs(config)) > 1 and set(needed) <= {"input_ids"}:
            return inputs  # pictures and sounds come with placeholders in the text; the text alone is an input too
        count = setting("num_query_tokens", "image_seq_length")
        token = setting("image_token_id", "image_token_index")
        if special and "pixel_values" in needed and isinstance(count, int) and isinstance(token, int):
            inputs["input_ids"] = torch.cat([torch.full((2, count), token, device=device), inputs["input_ids"]], dim=1)
    if "pixel_values" in accepted and setting("image_size") is not None:
        size = setting("image_size")
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (2, setting("num_channels") or 3, height, width)
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(device, dtype)
    if "input_features" in accepted and setting("num_mel_bins") is not None:
        frames = 2 * int(setting("max_source_positions") or 50)
        shape = (2, int(setting("num_mel_bins")), frames)
        inputs["input_features"] = torch.randn(shape, generator=generator).to(device, dtype)
    if "input_values" in accepted:
        inputs["input_values"] = torch.randn(2, 800, generator=generator).to(device, dtype)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = tokens(5)
    if not inputs:
        raise CaptureError(
            f"cannot make inputs for {type(model).__name__} from its config (its main input is "
            f"'{model.main_input_name}'): pass example=…"
        )
    return inputs


def embedded(model: nn.Module) -> int:
    """Rows of the table that a model looks its tokens up in; without bound where it has none."""
    try:
        return len(model.get_input_embeddings().weight)  # type: ignore[operator, union-attr]
    except (AttributeError, NotImplementedError, TypeError):
        return 2**31


@contextlib.contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Eval mode for the trace (no dropout in the graph), or train mode; every module's own flag is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, training in modes:
            module.training = training


def explain(model: nn.Module, error: Exception, inputs: Mapping[str, object] | None = None) -> str:
    """Which line of the model stopped the trace, in which submodule's class, and what to try; a few lines.

    inputs: the keyword inputs of the trace.
    """
    files = {}
    for module in model.modules():
        with contextlib.suppress(TypeError, OSError):
            files[inspect.getsourcefile(type(module))] = type(module).__name__
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files and "/torch/" not in f.filename]
    line = (own[-1].line or "").strip()[:200] if own else ""
    where = f" at {own[-1].filename}:{own[-1].lineno}, in {own[-1].name}: `{line}`" if own else ""
    text = str(error).lower()
    data_dependent = any(word in text for word in ("data-dependent", "data dependent", "unbacked"))
    data_dependent |= "DataDependent" in type(error).__name__
    pictures = [name for name, value in (inputs or {}).items() if name not in TEXT_INPUTS and holds_tensor(value)]
    if pictures and "input_ids" in (inputs or {}) and len(configs(getattr(model, "config", None))) > 1:
        hint = (
            f"an example of text alone, without {', '.join(pictures)}: the language model is found and trained, the rest stays as "
            'it is: example={"input_ids": …}'
        )
    elif data_dependent:
        hint = "the code branches on the values of a tensor: branch on shapes or config instead, or use torch.where"
    else:
        hint = (
            "call the model once with the same example outside sparsify; if that works, pass a more typical batch "
            "as example=…, or replace the line by tensor operations that torch.export can trace"
        )
    reason = f"{type(error).__name__}: {first_line(error)}"
    return f"in stage 'capture': {type(model).__name__} could not be traced{where}\n  {reason}\n  try: {hint}"


__all__ = ["Stage", "capture", "dummy_inputs", "evaluating", "example_inputs", "unwrap"]

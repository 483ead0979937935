"""`sparsify.compile`: from a model and a plan to a host that trains only what the plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import nn

from sparsify.calibration.statistics import repeatable
from sparsify.console import stage
from sparsify.errors import AdapterError, PlanError
from sparsify.host.habits import peft_words
from sparsify.host.handle import Handle, Mix
from sparsify.host.install import install
from sparsify.host.native_forward import install_native
from sparsify.host.quantized_bases import PackedBase, check_host, check_plan, dense_twin, refuse_packed, without_marks
from sparsify.host.serving import AdapterPaths, name_folders, serving_program
from sparsify.lowering.cpu.options import CpuOptions
from sparsify.passes.base import Context, Pass, PassResult, run_passes
from sparsify.passes.detect.find_structures import find_structures
from sparsify.passes.insert_partial import insert_partial
from sparsify.passes.lower_reference import lower_reference
from sparsify.passes.permute_weights import permute_weights
from sparsify.passes.prove_units import prove_units
from sparsify.passes.prune import prune
from sparsify.passes.select_units import select_units
from sparsify.passes.train_experts import write_out_experts
from sparsify.passes.train_in_full import trained_in_full
from sparsify.plan import Plan, Quantize, Rule
from sparsify.plan.habits import FROM_PEFT, is_peft_config
from sparsify.program import Program, Stage
from sparsify.program.capture import capture, unwrap

if TYPE_CHECKING:
    from sparsify.calibration.statistics import Loss
    from sparsify.program.values import Batch

Model = TypeVar("Model", bound=nn.Module)


def find_pass(program: Program, context: Context) -> PassResult:
    """CAPTURED → STRUCTURED."""
    detection = find_structures(program.graph, program.tensor_names)
    note = f"find-structures: {len(detection.structures)} found, {len(detection.declined)} declined"
    found = program.evolve(note, structures=detection.structures, declined=detection.declined)
    return PassResult(found, changed=bool(detection.structures or detection.declined))


PIPELINE = (
    Pass("find-structures", Stage.CAPTURED, Stage.STRUCTURED, find_pass),
    Pass("prove-units", Stage.STRUCTURED, Stage.STRUCTURED, prove_units),
    Pass("prune", Stage.STRUCTURED, Stage.STRUCTURED, prune, preserves="nothing"),
    Pass("select", Stage.STRUCTURED, Stage.SELECTED, select_units),
    Pass("permute-weights", Stage.SELECTED, Stage.PERMUTED, permute_weights, preserves="rounding"),
    Pass("insert", Stage.PERMUTED, Stage.EXPANDED, insert_partial, preserves="rounding"),
    Pass("lower", Stage.EXPANDED, Stage.LOWERED, lower_reference),
)


def up_to_selection(pipeline: Sequence[Pass] | None = None) -> tuple[Pass, ...]:
    """The passes that look and choose, without those that move and insert (of PIPELINE unless given)."""
    return tuple(step for step in (PIPELINE if pipeline is None else pipeline) if step.writes <= Stage.SELECTED)


def analyse(model: nn.Module, example: Batch | None = None) -> Program:
    """Capture a model and find its coupled structures, without a plan and without changing anything."""
    program = capture(model, example)
    return replace(find_pass(program, Context(Plan([Rule()]))).program, stage=Stage.STRUCTURED)


def compile(
    model: Model,
    plan: Plan,
    *,
    example: Batch | None = None,
    calibration: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    donate: bool = False,
    progress: bool = True,
    resume_dir: str | Path | None = None,
    cpu: CpuOptions | None = None,
    pipeline: Sequence[Pass] | None = None,
) -> Model:
    """Apply a plan to a model: a new host of the same class, in which only what the plan names trains.

    model: any `nn.Module`; it is not written to (the host shares its frozen tensors).
    example: one batch for the trace; Hugging Face models need none.
    calibration: batches for data-driven selections (a generator is read once, and kept for every rule).
    loss: `loss(outputs, batch)` for gradient scores (default `outputs.loss`).
    resume_dir: a folder in which an interrupted pruning is kept and continued.
    cpu: with `Plan(target="cpu")`: the numbers of tokens that must be fast, and whether speed or memory matters.
    pipeline: the passes to run, PIPELINE unless given; `insert_after(PIPELINE, "select", Pass(…))` of `sparsify.passes.base` adds one
        of your own (`examples/write_a_pass.py`). For inference, those up to the selection run.
    progress: show bars, and stages that take long, on stderr.
    donate: free the model's tensors as they are replaced (peak memory = model + one tensor); `model` is unusable afterwards.

    Returns the host; `host.sparsify` has `report`, `program`, and the adapter verbs.
    Raises PlanError (a rule matches nothing), RefusedError (a named target cannot serve), CaptureError (the model cannot be traced).
    """
    if not isinstance(plan, Plan):
        advice = FROM_PEFT if is_peft_config(plan) else "write Plan([…rules…])"
        raise PlanError(f"compile: expected a Plan, got {type(plan).__name__}; {advice}")
    source = unwrap(model)
    if "sparsify" in source.__dict__:
        if not plan.for_inference:
            raise PlanError(
                "compile: this model is compiled already; compile the original, or call model.sparsify.restore() first"
            )
        source = source.__dict__["sparsify"].plain()
    check_host(source)
    source, bases = dense_twin(source)
    check_plan(plan, bases)
    context = Context(plan, repeatable(calibration), loss, donate, progress, resume_dir)
    if plan.target == "cpu":
        return compile_for_cpu(source, context, example, cpu or CpuOptions(), pipeline)  # type: ignore[return-value]
    if cpu is not None:
        raise PlanError(
            f"compile: cpu=CpuOptions(…) belongs to Plan(target='cpu'), this plan's target is {plan.target!r}"
        )
    if plan.for_inference:
        return compile_for_cuda(source, context, example, pipeline)  # type: ignore[return-value]
    source = write_out_experts(source, plan)
    with stage("tracing the model", progress):
        captured = with_bases(capture(source, example), bases)
    return compile_for_training(captured, source, context, pipeline)  # type: ignore[return-value]


def with_bases(program: Program, bases: dict[str, PackedBase]) -> Program:
    """A captured program that knows which weights came packed, under their canonical names."""
    known = {program.aliases.get(name, name): base for name, base in bases.items()}
    return program.replaced(bases=known, quantize={name: base.format for name, base in known.items()})


def compile_for_training(
    captured: Program, source: nn.Module, context: Context, pipeline: Sequence[Pass] | None = None
) -> nn.Module:
    """Run a pipeline (PIPELINE unless given) over a captured program and install the result into a copy of the host."""
    plan = context.plan
    program = run_passes(captured, PIPELINE if pipeline is None else pipeline, context)
    if program.stage is not Stage.LOWERED:
        raise PlanError(f"compile: the pipeline ends at stage {program.stage.name}; a host is made from LOWERED")
    flags = {name: p.requires_grad for name, p in source.named_parameters()}
    train = tuple(sorted(trained_in_full(program, tuple(plan.train))))
    host, layouts = install(program, tuple(plan.train), whole=not plan.adapts)
    program = program.on(host)
    host.train(source.training)
    host.__dict__["sparsify"] = Handle(host, program, plan, layouts, train, flags, dict(program.hashes))
    return host


@peft_words
def load(
    model: Model,
    adapters: AdapterPaths,
    *,
    name: str | None = None,
    active: bool | str | Mapping[str, float] | None = True,
    strict: bool = True,
    example: Batch | None = None,
) -> Model:
    """A host that serves saved adapters and trains nothing: no plan is needed, and neither calibration nor a trace.

    adapters: a folder that `save_adapter` wrote or a PEFT LoRA folder, or `owner/name[@revision]` of a model hub (downloaded by
        `huggingface_hub` unless HF_HUB_OFFLINE=1); a list of folders (called by their last name); or a mapping
        from name to folder.
    name: what a single adapter is called; "default" if not given.
    active: True for the first adapter, False or None for the base, a name, or weights of a mix (`{"a": .5, "b": .5}`).
    strict: refuse an adapter that was trained on another base (PEFT's files do not say on which).
    example: one batch for a trace, which is needed only where adapters were trained over a quantised base and the model is not a
        Hugging Face model.

    The changes are added to dense weights of the host; the model that is passed in is not written to. What trained in full is the
    trained value, bit for bit; trained channels and entries are `base + change` in the weight's dtype, as `load_adapter` makes them on
    the host that trained; low-rank parts are folded in, as by `merge`. So outputs agree with the trained host's to rounding of the
    weight's dtype. An adapter over a quantised base (Quantize in its plan) gets the weights that the packed ones stand for, dense.

    Returns the host in eval mode; `host.sparsify` has `load_adapter`, `set_adapter`, `merge`, `export_lora` and the rest, and the
    plan that the adapters carry.
    Raises AdapterError: no such folder, damaged or hostile files, another base, adapters of differently changed bases.
    """
    source = unwrap(model)
    if "sparsify" in source.__dict__:
        raise AdapterError(
            "load: this model is compiled already; add adapters with model.sparsify.load_adapter, or load onto the original model"
        )
    refuse_packed(source)
    source = without_marks(source)
    folders = name_folders(adapters, name)
    program, hashes, plan = serving_program(
        source, folders, lambda plan: run_passes(capture(source, example), up_to_selection(), Context(plan))
    )
    flags = {key: p.requires_grad for key, p in source.named_parameters()}
    host, layouts = install(program, ())
    program = program.on(host)
    host.eval()
    handle = Handle(host, program, plan, layouts, (), flags, hashes, active=Mix({}), serving=True)
    host.__dict__["sparsify"] = handle
    for key, folder in folders.items():
        handle.load_adapter(folder, key, strict=strict)
    spec = next(iter(folders)) if active is True else active or None
    if spec is not None:
        handle.set_adapter(spec)
    return host  # type: ignore[return-value]


def compile_for_cpu(
    source: nn.Module,
    context: Context,
    example: Batch | None,
    options: CpuOptions,
    pipeline: Sequence[Pass] | None = None,
) -> nn.Module:
    """Prune if the plan says so, then replace linears by generated sparse kernels where they are measured to be faster."""
    from sparsify.lowering.cpu.lower import lower_program

    chosen = {f.name: getattr(options, f.name) for f in fields(options)}
    if example is None:  # numbers of tokens that the user names say what counts, and the dummy example is none of them
        chosen["compare"] = "dummy" if options.compare and options.tokens is None else False
    lower = partial(lower_program, **chosen)
    return compile_for_inference(source, context, example, lower, pipeline, options.tied == "copy")


def tied_heads(program: Program, plan: Plan) -> set[str]:
    """Modules that share an embedding's weight and that a `Quantize` rule without exceptions takes."""
    rules = [rule for rule in plan.rules if isinstance(rule, Quantize) and not rule.exclude]
    groups = [[name.rpartition(".")[0] for name in program.names_of(linear.weight)] for linear in program.linears()]
    return {
        name for names in groups if len(names) > 1 and any(rule.matches(*names) for rule in rules) for name in names
    }


def compile_for_cuda(
    source: nn.Module, context: Context, example: Batch | None, pipeline: Sequence[Pass] | None = None
) -> nn.Module:
    """Prune if the plan says so, then replace linears by generated Triton kernels where they read fewer bytes."""
    from sparsify.lowering.cuda.lower import lower_program

    return compile_for_inference(source, context, example, lower_program, pipeline)


def compile_for_inference(
    source: nn.Module,
    context: Context,
    example: Batch | None,
    lower: Callable[..., tuple[object, Program | None]],
    pipeline: Sequence[Pass] | None = None,
    copies_tied: bool = False,
) -> nn.Module:
    """Prune and quantise, put the result into a copy of the host, and lower it. lower: `lower_program` of a target. copies_tied: a head
    that shares an embedding's weight gets a packed copy."""
    plan = context.plan
    with stage("tracing the model", context.progress):
        captured = capture(source, example)
    program = run_passes(captured, up_to_selection(pipeline), context)
    wrong = {f for f in program.quantize.values() if f != "int8"}
    if wrong:
        raise PlanError(
            f"Plan(target='{plan.target}'): the {plan.target.upper()} kernels read int8, not {sorted(wrong)[0]}; "
            "use Quantize(format='int8')"
        )
    quantize: dict[str, Literal["int8"]] = {param.rpartition(".")[0]: "int8" for param in program.quantize}
    quantize |= dict.fromkeys(tied_heads(program, plan) if copies_tied else (), "int8")
    host, layouts = install(program.replaced(quantize={}), ())
    host.eval()
    for parameter in host.parameters():
        parameter.requires_grad_(False)
    dense = program.replaced(host=host, tensors={}, quantize={})
    with stage(f"lowering for {plan.target}", context.progress):
        report, lowered = lower(
            host, dense, quantize=quantize, check=plan.check == "numeric", progress=context.progress
        )
    flags = {name: p.requires_grad for name, p in source.named_parameters()}
    assert lowered is not None  # it was given a program
    done = lowered.replaced(quantize=program.quantize)
    handle = host.__dict__["sparsify"] = Handle(host, done, plan, layouts, (), flags, cpu=report)
    step = getattr(report, "native", None)
    if callable(step):
        install_native(host, handle.lock, step)
    return host

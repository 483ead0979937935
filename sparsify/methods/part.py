"""What a kind of trained part is: everything that the rest of the package asks of one, in two classes.

    TrainedPart    frozen, in `Program.parts`: which weight, which tensors, which node; how it is checked, described and counted
    LivePart       beside one host module: its values as adapters see them (snapshot, reset, deltas, fill, mix), attach and detach

The third side of a kind is the module class that carries it (`sparsify.modules.adapted.AdaptedMixin`): its forward, its leaves, its
fold into the weight. One file holds all three: `channels` (S2FT, PaCA), `sparse_lowrank` (RoSA, LoRA), and those of methods from outside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from sparsify.errors import VerifyError
from sparsify.model.linears import owner_name
from sparsify.program.repeats import Line

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch.fx.node import Argument

    from sparsify.adapters.adapter import Delta
    from sparsify.modules.adapted import AdaptedMixin
    from sparsify.modules.layout import Layout
    from sparsify.plan import LinearRule
    from sparsify.program import ConvolutionNode, EmbeddingNode, LinearNode, Program
    from sparsify.program.graph_editor import GraphEditor

Snapshot = dict[str, Tensor]
Part = TypeVar("Part", bound="TrainedPart", covariant=True)
Module = TypeVar("Module", bound="AdaptedMixin", covariant=True)


def leaf_of(param: str) -> str:
    return param.rpartition(".")[2]


def beside(param: str, leaf: str) -> str:
    """Qualified name of a tensor that lies beside a weight: `a.weight`, `lora_A` → `a.lora_A`."""
    owner = owner_name(param)
    return f"{owner}.{leaf}" if owner else leaf


def master_dtype(weight: Tensor) -> torch.dtype:
    """Trained parameters are fp32 over a 16-bit base, and in the base's dtype else."""
    return torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype


class TrainedPart(ABC):
    """One trained part of one weight, as a frozen value; subclasses are frozen dataclasses.

    In original coordinates until the weights are permuted (`placed`), in current ones afterwards.

    param: qualified name of the weight. rule: index of the plan's rule that chose it.
    module_kind: what the classes that carry it are called: `module_kind + "Linear"`. mixin: what makes them so.
    operators: operator of the graph → what computes it when no kernel is chosen.
    """

    param: str
    rule: int
    module_kind: ClassVar[str]
    mixin: ClassVar[type[AdaptedMixin]]
    operators: ClassVar[Mapping[OpOverload, str]]

    @property
    def owner(self) -> str:
        """Qualified name of the module that holds the weight."""
        return owner_name(self.param)

    def trained_names(self) -> tuple[str, ...]:
        """Qualified names of the parameters that train."""
        return tuple(beside(self.param, leaf) for leaf in self.mixin.trained_leaves)

    def kind_of(self, module: nn.Module) -> str:
        """What a module that holds the weight is called as a carrier of the part; tied weights are held by several."""
        return self.module_kind

    # --- from the plan into the graph ------------------------------------------------------------------------------------------

    def placed(self, program: Program) -> TrainedPart:
        """The part in the coordinates of a permuted program; itself where no place depends on them."""
        return self

    @abstractmethod
    def initial(
        self, weight: Callable[[], Float[Tensor, "*experts p q"]], program: Program, seed: int
    ) -> dict[str, Tensor]:
        """Values of its tensors by qualified name, such that the forward is the base's. weight: gives the stored weight."""

    @abstractmethod
    def insert(self, editor: GraphEditor, linear: LinearNode) -> None:
        """Put the operator that computes the linear and the part in the linear's place."""

    def insert_lookup(self, editor: GraphEditor, lookup: EmbeddingNode) -> None:
        """Put the operator in the place of a look-up of the weight's rows. Raises VerifyError for a kind that has none."""
        raise VerifyError(f"{self.param}: a part of kind {self.module_kind} does not train rows of an embedding")

    def insert_convolution(self, editor: GraphEditor, found: ConvolutionNode) -> None:
        """Put the operator in the place of a convolution with the weight. Raises VerifyError for a kind that has none."""
        raise VerifyError(f"{self.param}: a part of kind {self.module_kind} does not train in a convolution")

    def packed_arguments(self, editor: GraphEditor, linear: LinearNode) -> dict[str, Argument]:
        """What `quantized_linear` takes of the part, by schema name. Raises VerifyError for a kind that needs a dense weight."""
        raise VerifyError(f"{self.param}: a part of kind {self.module_kind} does not train over a packed weight")

    # --- what the grammar asks ---------------------------------------------------------------------------------------------

    def check(self, program: Program, read: set[str]) -> None:
        """Raise VerifyError unless its tensors are as it says. read: names of tensors that an operator of ours reads."""
        for name in self.trained_names():
            if name not in read:
                raise VerifyError(f"{owner_name(name)}: {leaf_of(name)} is read by no sparsify operator")

    def check_node(self, node: fx.Node) -> None:  # noqa: B027  (a kind without settings has none to check)
        """Raise VerifyError unless the operator that stands for it has its settings."""

    # --- what people read ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def text(self) -> str:
        """What is computed: `+ 2·BA (rank 8)`."""

    def row(self) -> str | None:
        """Its row among what the report says was chosen; None where another row says it already."""
        return f"{self.param}: {self.text()} (rule {self.rule})"

    def note(self) -> tuple[str, str]:
        """The tensor that gives its operation away in a printed graph, and what stands behind the operation (a `Line` of three
        pieces says in the second what is the layer's own)."""
        return self.param, self.text()

    def mark(self) -> str:
        """What a drawing says of the weight beside the channels that train; empty for nothing."""
        return self.text()

    @classmethod
    def section(
        cls, parts: Sequence[TrainedPart], program: Program, ids: Callable[[Sequence[int]], str]
    ) -> tuple[str, list[str]]:
        """Title and lines of all parts of the kind in a printed program. ids: spells a selection of channels out."""
        return f"{cls.module_kind}: {len(parts)}", [
            Line.about(part.param, f"@{part.param} {part.text()}") for part in parts
        ]

    @classmethod
    def counted(cls, count: int) -> str:
        """How the history of a program counts parts of the kind."""
        return f"{count} {cls.module_kind} parts"

    def saved_bytes(self, x: Float[Tensor, "*t m"]) -> int | None:
        """Bytes of the linear's input that backward keeps for it alone; None for all of x, kept once however many read it."""
        return None

    # --- into the host ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def attach(self, module: AdaptedMixin, tensors: Mapping[str, Tensor]) -> None:
        """Give a module, whose class is right already, its tensors by leaf, and its settings."""

    @abstractmethod
    def live(self, module: AdaptedMixin, layout: Layout, seed: int) -> LivePart[TrainedPart, AdaptedMixin]:
        """The part beside its host module, whose values are the base's now."""


class OutsidePart(TrainedPart):
    """A part of a method from outside the package, see `sparsify.methods.register`.

    Its plan rule chooses linears one by one; `from_rule` makes the part of each, in original coordinates.
    """

    @classmethod
    def why_not(cls, rule: LinearRule, program: Program, linear: LinearNode) -> str | None:
        """Why a linear that the rule matches cannot have the part; None if it can. Called before `from_rule`."""
        if linear.weight in program.quantize:
            return f"{type(rule).__name__} needs the dense weight, and this one is packed ({program.quantize[linear.weight]})"
        if linear.weight in program.masks:
            return f"{type(rule).__name__} does not keep a mask, and entries of this weight are pruned"
        return None

    @classmethod
    @abstractmethod
    def from_rule(cls, rule: LinearRule, index: int, program: Program, linear: LinearNode) -> OutsidePart:
        """The part that the plan's rule number `index` asks for. Raises PlanError for a rule that does not say enough."""


class LivePart(ABC, Generic[Part, Module]):
    """A trained part beside its module. Values enter and leave as deltas in original coordinates.

    base_known: whether what the base holds under the part is known (a state dict with another base may have come).
    twins: other modules that hold the weight (an output head that is tied to its embedding), and the part with it.
    """

    part: Part
    module: Module
    layout: Layout
    base_known: bool = True
    twins: tuple[AdaptedMixin, ...] = ()
    #: kinds of deltas that a mix gives to the part itself; others are added to the stored weight
    takes: tuple[str, ...] = ()
    #: whether folding it writes entries of the weight that are not scratch, so that merge keeps the weight
    overwrites_base: bool = True
    #: whether folding it may put something on entries that a mask pruned
    fills_pruned: bool = True
    #: whether it keeps values of the base, so that it must hear of another one
    keeps_base: bool = True

    #: whether its support may be chosen, or brought by a state dict, after the host was made (`sparsify.methods.supports`)
    takes_support: bool = False

    @property
    def param(self) -> str:
        return self.part.param

    @property
    def modules(self) -> tuple[AdaptedMixin, ...]:
        """Every module that carries the part."""
        return (self.module, *self.twins)

    @abstractmethod
    def tensors(self) -> dict[str, nn.Parameter]:
        """The trained parameters by leaf, wherever they are now."""

    def parameters(self) -> list[nn.Parameter]:
        return list(self.tensors().values())

    def snapshot(self) -> Snapshot:
        return {name: p.detach().clone() for name, p in self.tensors().items()}

    def restore(self, snapshot: Snapshot) -> None:
        for name, parameter in self.tensors().items():
            parameter.detach().copy_(snapshot[name])

    @abstractmethod
    def reset(self) -> None:
        """The base is back, in the part and (dense) in the weight."""

    def restore_base(self, stored: Float[Tensor, "*experts p q"]) -> None:
        """Put base values under the part into a copy of the stored weight."""

    def take_base(self, weight: Float[Tensor, "*experts p q"]) -> None:
        """A state dict brought another base, this one as it lies here: take the values that the part keeps of it."""

    @abstractmethod
    def deltas(self, snapshot: Snapshot | None = None) -> list[Delta]:
        """What training changed, or what a snapshot holds."""

    @abstractmethod
    def fits(self, deltas: Sequence[Delta]) -> bool:
        """Whether deltas of this weight change exactly what the part trains."""

    @abstractmethod
    def fill(self, deltas: Sequence[Delta]) -> None:
        """Base plus fitting deltas; bit for bit the trained values on the base that they were trained on."""

    def mix(self, weighted: Sequence[tuple[float, Delta]]) -> None:
        """Base plus a weighted sum of fitting deltas, over a packed base, which has nothing else to add to; not what `mix_beside` takes."""
        raise NotImplementedError

    def mix_beside(self, weighted: Sequence[tuple[float, Delta]]) -> None:
        """Deltas of the kinds that it `takes`, by parameters in the place of its own, which `unmix` puts back."""
        raise NotImplementedError

    def unmix(self) -> None:
        """Undo `mix_beside`: the same parameters are the module's again."""

    def remembered(self) -> dict[str, Tensor]:
        """What it keeps of the base beside the module, by attribute: ranks of which only the first has the base get the first one's."""
        return {name: value for name, value in vars(self).items() if type(value) is Tensor}

    @abstractmethod
    def read_back(self) -> None:
        """After changes were added to the stored weight: compute with that weight."""

    @abstractmethod
    def detach(self) -> None:
        """Take the tensors from the module, for a merge; `attach` brings the same objects back."""

    @abstractmethod
    def attach(self) -> None:
        """Undo `detach`."""


__all__ = ["LivePart", "OutsidePart", "Snapshot", "TrainedPart", "beside", "leaf_of", "master_dtype"]

"""Options of one rule on a command line, for the commands that take a plan without a plan file.

--method lora --rank 8 --match q_proj  ──▶  the plan file that says {rule: LoRA, rank: 8, match: q_proj}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.plan import plan_file
from sparsify.plan.plan_file import PlanFile

Fraction = Annotated[
    float | None, typer.Option(help="S2FT: trained share of the parameters of O and Down. Default: 0.03.")
]
Rank = Annotated[int | None, typer.Option(help="LoRA, RoSA, PaCA.")]
Units = Annotated[int | None, typer.Option(help="S2FT: heads or channels of each structure instead of a fraction.")]
Density = Annotated[float | None, typer.Option(help="RoSA: share of scattered entries.")]
Alpha = Annotated[float | None, typer.Option(help="LoRA, RoSA: the low-rank part is scaled by alpha / rank.")]
Where = Annotated[str | None, typer.Option(help="S2FT: ffn, attention or both.")]
Select = Annotated[str | None, typer.Option(help="S2FT, PaCA: how units are scored.")]
Match = Annotated[
    list[str] | None, typer.Option(help="Where: q_proj, '*.mlp', 'model.layers.{0-15}.*', 're:…'. Repeatable.")
]


def given_options(match: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """What was given, under the names of the rule's fields; what was not is left to the rule."""
    found = {name: value for name, value in options.items() if value is not None}
    return found | ({"match": match[0] if len(match) == 1 else list(match)} if match else {})


def is_plan_file(path: Path) -> bool:
    """Whether a word names a plan file and not a model's folder."""
    return path.suffix in (".yaml", ".yml") and not path.is_dir()


def written(
    model: str, method: str, options: dict[str, Any], training: dict[str, Any], data: str | None, changes: list[str]
) -> PlanFile:
    """The plan file that the options say. Raises PlanError."""
    rule = plan_file.rule_named(method, "--method").__name__
    if rule == "S2FT" and not {"fraction", "units"} & set(options):
        options = {"fraction": 0.03, **options}
    document: dict[str, Any] = {"model": model, "rules": [{"rule": rule, **options}], "training": training}
    if data:
        document["data"] = {"path": data}
    return plan_file.from_document(plan_file.changed(document, changes, "the options"), "the options")


__all__ = ["given_options", "is_plan_file", "written"]

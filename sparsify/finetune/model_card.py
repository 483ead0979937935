"""The README.md of an adapter: base, plan, what trains, and the losses that were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify.console import visible
from sparsify.version import __version__

if TYPE_CHECKING:
    from sparsify.finetune.run import Outcome
    from sparsify.plan.plan_file import PlanFile


def model_card(file: PlanFile, outcome: Outcome, report: str) -> str:
    """Markdown with the front matter that model hubs read. What was not measured is not mentioned."""
    import json
    from pathlib import Path

    base = file.model
    name = Path(outcome.folder).name
    methods = list(dict.fromkeys(type(rule).__name__ for rule in file.rules))
    share = 100 * outcome.trainable / max(outcome.total, 1)
    lines = [
        "---",
        f"base_model: {json.dumps(base, ensure_ascii=False)}",
        "library_name: sparsify",
        "tags:",
        *(f"- {method.lower()}" for method in methods),
        "---",
        "",
        f"# {name}",
        "",
        f"An adapter for `{base}`, trained by {', '.join(methods)} with sparsify {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| trained parameters | {outcome.trainable:,} of {outcome.total:,} ({share:.4f} %) |",
        f"| rows, learned tokens of one pass | {outcome.rows:,}, {outcome.learned_tokens:,} |",
        f"| steps | {outcome.steps:,} |",
    ]
    if outcome.losses:
        (first, before), (last, after) = outcome.losses[0], outcome.losses[-1]
        lines.append(f"| training loss | {before:.4f} (step {first}), {after:.4f} (step {last}) |")
    if outcome.evaluations:
        step, loss = outcome.evaluations[-1]
        lines.append(f"| loss on held-out rows | {loss:.4f} (step {step}) |")
    lines += [
        "",
        "```python",
        "import sparsify",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base, ensure_ascii=False)})",
        f"model = sparsify.load(model, {json.dumps(str(outcome.folder), ensure_ascii=False)})",
        "```",
        "",
        "## Plan",
        "",
        "```yaml",
        file.to_yaml().rstrip(),
        "```",
        "",
        "## Report",
        "",
        "```",
        report,
        "```",
    ]
    return visible("\n".join(lines)) + "\n"


__all__ = ["model_card"]

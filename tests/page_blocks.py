"""Python blocks of a documentation page, as `tests/documents/test_pages.py` runs them.

A page's blocks share one namespace, from top to bottom. HTML comments, which readers do not see, say what is not in the text:

    <!-- given: model, batches -->     names that are there before the next block, made anew (GIVEN)
    <!-- not run: why -->              the next block is only compiled
    <!-- slow -->                      the next block runs with `-m slow` alone, in the page's place, and nothing after it needs it
    <!-- raises: PlanError -->         the next block ends with this error
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_folder
import torch
import transformers as hf
from torch import Tensor, nn

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^( *)```(?:python|py)\b[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!-- (given|not run|slow|raises)(?:: ?([^>]*?))? -->")


@dataclass(frozen=True)
class Block:
    """line: of its fence in the page. given: names to make before it. not_run, raises: as the comments say."""

    line: int
    source: str
    given: tuple[str, ...] = ()
    not_run: str = ""
    slow: bool = False
    raises: str = ""


def blocks(text: str) -> Iterator[Block]:
    """The Python blocks of a page, each with the comments between it and the block before."""
    end = 0
    for found in BLOCK.finditer(text):
        said = dict(COMMENT.findall(text[end : found.start()]))
        indent = len(found[1])
        source = "\n".join(line[indent:] for line in found[2].splitlines())
        given = tuple(name.strip() for name in said.get("given", "").split(",") if name.strip())
        line = text.count("\n", 0, found.start()) + 1
        yield Block(line, source + "\n", given, said.get("not run", ""), "slow" in said, said.get("raises", ""))
        end = found.end()


def compiled(page: Path, block: Block) -> Any:
    """Code whose tracebacks name the page and its lines."""
    tree = ast.parse(block.source, filename=str(page))
    return compile(ast.increment_lineno(tree, block.line), str(page), "exec")


# --- what pages take for given -----------------------------------------------------------------------------------------------


def rows(count: int = 4, length: int = 8) -> Tensor:
    return torch.randint(6, 24, (count, length), generator=torch.Generator().manual_seed(0))


def decoder() -> nn.Module:
    """A Llama of two layers with random weights, as Hugging Face makes it."""
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(small_folder.config()).eval()


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": rows(4)[i : i + 2], "labels": rows(4)[i : i + 2]} for i in (0, 2)]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A data set as Trainer takes it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": rows()[i], "labels": rows()[i]}


GIVEN: dict[str, Callable[[], Any]] = {
    "model": decoder,
    "base": decoder,
    "teacher": decoder,
    "batches": batches,
    "batch": lambda: batches()[0],
    "dataset": Rows,
    "tokenizer": small_folder.tokenizer,
    "conversations": lambda: small_folder.conversations(4),
}

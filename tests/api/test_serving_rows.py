"""An adapter is chosen by a token's place: linears whose tokens are not those of one row after another, and rows that get lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_bench import BASE
from torch import Tensor, nn

import sparsify
from sparsify import AdapterError
from sparsify.adapters import adapter as files
from sparsify.adapters.adapter import Adapter, Delta


def write_columns(folder: Path, weights: Mapping[str, Tensor], channel: int = 1) -> Path:
    """An adapter that changes one column of each weight by ones."""
    deltas = tuple(
        Delta(name, "column", torch.tensor([channel]), torch.ones(len(weight), 1)) for name, weight in weights.items()
    )
    return files.save(Adapter(deltas, {name: files.tensor_hash(weight) for name, weight in weights.items()}), folder)


class Experts(nn.Module):
    """Two of eight linears a token, each called with the tokens that were sent to it, as they lie in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
        self.head = nn.Linear(8, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        chosen = self.router(x).topk(2, -1).indices
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            places = (chosen == number).any(-1).nonzero().flatten()
            if places.numel():
                y = y.index_add(0, places, expert(x[places]))
        return self.head((x + y).view(*ids.shape, 8))


def test_an_expert_that_gets_as_many_tokens_of_either_row_by_chance_takes_no_addend():
    by_chance = 0
    for seed in range(3):
        torch.manual_seed(seed)
        model, ids = Experts().eval(), torch.randint(0, 50, (2, 16))
        chosen = model.router(model.embed(ids)).topk(2, -1).indices
        counts = torch.stack([(row.flatten() == torch.arange(8)[:, None]).sum(1) for row in chosen])
        by_chance += int(((counts[0] == counts[1]) & (counts[0] > 0)).sum())
        host: Any = sparsify.serve(model, example=ids, budget="64KiB")
        declined = {refusal.where for refusal in host.sparsify.declined}
        assert declined == {"embed.weight", *(f"experts.{number}.weight" for number in range(8))}
    assert by_chance > 0


class Tied(nn.Module):
    """An encoder whose weight is read by the decoder, too; `part`: only a part of it, which does not begin where it begins."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.part = part
        self.encoder, self.other = nn.Linear(6, 4), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        read = self.encoder.weight.data[1:] if self.part else self.encoder.weight
        return self.other(nn.functional.linear(self.encoder(x)[..., -len(read) :].relu(), read.t()))


@pytest.mark.parametrize("part", [False, True])
def test_a_weight_that_something_else_reads_takes_no_addend(tmp_path, part):
    model, x = Tied(part).eval(), torch.randn(2, 3, 6)
    host: Any = sparsify.serve(model, example=x, budget="64KiB")
    for name in ("encoder", "other"):
        weights = {f"{name}.weight": model.get_parameter(f"{name}.weight")}
        host.sparsify.add(name, write_columns(tmp_path / name, weights))
    with pytest.raises(AdapterError, match=r"encoder.weight takes no addend: it is read outside of its linear's own"):
        host(x, adapter_names="encoder")
    with torch.no_grad():
        assert float((host(x, adapter_names=["other", BASE]) - model(x))[0].abs().max()) > 1e-3


def test_a_row_that_a_model_refuses_says_nothing():
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, ids: Tensor) -> Tensor:
            if not bool(((ids == 2).sum(1) == 1).all()):
                raise ValueError("every row has one end")
            return self.head(self.embed(ids))

    host: Any = sparsify.serve(Ends().eval(), example=torch.tensor([[3, 4, 2], [5, 2, 6]]), budget="64KiB")
    assert [refusal.where for refusal in host.sparsify.declined] == ["embed.weight"]


def test_one_weight_under_two_names_in_a_file_is_refused(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    model, x = Twice().eval(), torch.randn(2, 3, 4)
    weights = {f"{name}.weight": model.first.weight for name in ("first", "second")}
    host: Any = sparsify.serve(model, {"both": write_columns(tmp_path / "both", weights)}, example=x, budget="64KiB")
    with pytest.raises(AdapterError, match=r"first.weight is changed twice \(column\): the file has it under two"):
        host(x, adapter_names="both")
    host.sparsify.add("one", write_columns(tmp_path / "one", {"second.weight": model.first.weight}))
    with torch.no_grad():
        found = host(x, adapter_names="one")
        model.first.weight[:, 1] += 1
        torch.testing.assert_close(found, model(x))

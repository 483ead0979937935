"""Two gloo processes with other calibration data, other numbers of batches, or none: the same masks and weights, or the same error."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import processes
import tiny

import sparsify
from sparsify import S2FT, PaCA, Plan, PlanError, Prune, RoSA, SparsifyError
from sparsify.calibration.ranks import from_rank, sum_over_ranks, together
from sparsify.pruning.on_disk import prune_on_disk
from sparsify.train.rosa import collect_masks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WANDA = Prune(sparsity=0.5, method="wanda")
SPARSEGPT = Prune(sparsity=0.5, method="sparsegpt")
RULES: dict[str, Any] = {
    "wanda": WANDA,
    "sparsegpt": SPARSEGPT,
    "2:4": Prune(pattern="2:4", method="sparsegpt"),
    "sensitivity": Prune(sparsity=0.5, method="wanda", allocation="sensitivity"),
    "random": Prune(sparsity=0.5, method="random"),
}


def model() -> nn.Module:
    torch.manual_seed(11)
    return tiny.Mlp().eval()


def batch(seed: int) -> Tensor:
    return torch.randn(9, 12, generator=torch.Generator().manual_seed(seed)) * (1 + torch.arange(12) % (2 + seed % 5))


BATCHES = [batch(seed) for seed in range(5)]
SHARES = ([BATCHES[:2], BATCHES[2:]], [[], BATCHES], [BATCHES, None])  # of rank 0, of rank 1


def run(rule: Any, batches: Any, **options: Any) -> Any:
    return sparsify.compile(
        model(),
        Plan([rule]),
        example=BATCHES[0],
        calibration=batches,
        loss=lambda y, _: y.square().mean(),
        progress=False,
        **options,
    )


def result(host: Any) -> dict[str, Any]:
    program = host.sparsify.program
    return {
        "masks": {n: m.clone() for n, m in program.masks.items()},
        "weights": {n: p.detach().clone() for n, p in host.named_parameters()},
        "layers": [(s.name, s.tokens, s.sparsity, s.error) for s in program.pruned],
        "chosen": [s.channels for s in program.slices] + [p.index.tolist() for p in program.lowranks if p.count],
    }


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except SparsifyError as error:
        return type(error).__name__, str(error)
    return "", ""


def spoiled() -> Tensor:
    x = batch(7)
    x[0, 0] = float("nan")
    return x


def worker(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    torch.manual_seed(1000 + rank)
    found: dict[str, Any] = {}
    for name, rule in RULES.items():
        for number, shares in enumerate(SHARES):
            if number == 0 or name == "sparsegpt":
                found[f"{name} {number}"] = result(run(rule, shares[rank]))
    resumed = [result(run(SPARSEGPT, SHARES[0][rank], resume_dir=f"{results}/resume")) for _ in range(2)]
    found["resumed"] = resumed
    for number, shares in enumerate(SHARES):
        found[f"paca {number}"] = result(run(PaCA(rank=3, select="activation", permute=False), shares[rank]))
        found[f"rosa {number}"] = result(run(RoSA(rank=0, density=0.05), shares[rank]))
    found["s2ft 0"] = result(run(S2FT(fraction=0.2, select="gradient", budget="structure"), SHARES[0][rank]))
    host = run(RoSA(rank=2, density=0.05), None)
    collect_masks(host, SHARES[1][rank], loss=lambda y, _: y.square().mean(), progress=False)
    found["collected"] = result(host)

    bad = [spoiled()] if rank == 1 else [batch(1), batch(2)]  # rank 1 alone has a NaN
    rules = (SPARSEGPT, RULES["sensitivity"], RoSA(rank=0, density=0.05))
    found["refusals"] = [refusal(lambda rule=rule: run(rule, bad)) for rule in rules]
    empty = [batch(1)[:0]] if rank == 1 else [batch(1)]
    found["refusals"] += [refusal(lambda rule=rule: run(rule, empty)) for rule in rules]
    found["refusals"] += [refusal(lambda rule=rule: run(rule, [])) for rule in rules]

    def fails(y: Tensor, _: Any) -> Tensor:
        if rank == 1:
            raise ValueError("the loss of this rank is broken")
        return y.sum()

    found["own"] = "", ""
    try:
        sparsify.compile(
            model(),
            Plan([RoSA(rank=0, density=0.05)]),
            example=BATCHES[0],
            calibration=BATCHES,
            loss=fails,
            progress=False,
        )
    except Exception as error:
        found["own"] = type(error).__name__, str(error)
    found["on disk"] = refusal(lambda: prune_on_disk_of(Path(results) / str(rank)))
    found["sums"] = sum_over_ranks(torch.tensor([1.5 + rank])), from_rank(1, torch.tensor([rank > 0, False]))
    with together():
        pass
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def prune_on_disk_of(folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(model().state_dict(), folder / "model.safetensors")
    plan = Plan([Prune(sparsity=0.5, method="magnitude")])
    prune_on_disk(folder, folder / "out", plan, build=model, example=BATCHES[0], progress=False)


@pytest.fixture(scope="module")
def ranks() -> tuple[dict[str, Any], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        processes.spawn(worker, (f"{directory}/store", directory), 2)
        first, second = (torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in (0, 1))
    return first, second


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    tiny.assert_same(a["masks"], b["masks"])
    tiny.assert_same(a["weights"], b["weights"])
    assert a["layers"] == b["layers"]
    assert a["chosen"] == b["chosen"]


def test_masks_and_weights_are_the_same_bits_on_both_ranks(ranks: Any) -> None:
    first, second = ranks
    names = [n for n in first if n.split()[0] in (*RULES, "paca", "rosa", "s2ft", "collected")]
    assert len(names) == 5 + 2 + 3 + 3 + 1 + 1
    for name in names:
        assert_equal(first[name], second[name])
    for name in ("resumed",):
        for a, b in zip(first[name], second[name], strict=True):
            assert_equal(a, b)
        assert_equal(first[name][0], first[name][1])


def test_they_are_those_of_one_process_with_all_batches(ranks: Any) -> None:
    first, _ = ranks
    for name, rule in RULES.items():
        alone = result(run(rule, BATCHES))
        for number in range(3):
            joint = first.get(f"{name} {number}")
            if joint is None:
                continue
            tiny.assert_same(joint["masks"], alone["masks"])
            for n, weight in alone["weights"].items():
                torch.testing.assert_close(joint["weights"][n], weight, atol=1e-5, rtol=1e-4)
            assert [(n, t) for n, t, _, _ in joint["layers"]] == [(n, t) for n, t, _, _ in alone["layers"]]
    own = result(run(WANDA, SHARES[0][0]))
    assert any(not torch.equal(own["masks"][n], m) for n, m in first["wanda 0"]["masks"].items()), "the data decides"
    for name, rule in (
        ("rosa", RoSA(rank=0, density=0.05)),
        ("paca", PaCA(rank=3, select="activation", permute=False)),
    ):
        assert [first[f"{name} {n}"]["chosen"] for n in range(3)] == [result(run(rule, BATCHES))["chosen"]] * 3


def test_an_error_on_one_rank_is_raised_on_both(ranks: Any) -> None:
    first, second = ranks
    assert len(first["refusals"]) == 9
    for place, ((kind, text), (other, told)) in enumerate(zip(first["refusals"], second["refusals"], strict=True)):
        assert kind == other, (place, text, told)
        assert kind in ("SparsifyError", "PlanError"), (place, text, told)
        if place < 3:
            assert "rank 1: " in text
            assert "calibration batch 0" in text
            assert "nan" in (text + told).lower()
        elif place < 6:
            assert "rank 1: calibration batch 0 is empty" in text
            assert "calibration batch 0 is empty" in told
        else:
            assert "calibration" in text
            assert text == told
    assert first["own"][0] == "SparsifyError"
    assert "rank 1: the loss of this rank is broken" in first["own"][1]
    assert second["own"] == ("ValueError", "the loss of this rank is broken")


def test_pruning_on_disk_is_for_one_process(ranks: Any) -> None:
    for found in ranks:
        assert found["on disk"][0] == PlanError.__name__
        assert "runs in one process" in found["on disk"][1]
        assert found["sums"][0].tolist() == [4.0]
        assert found["sums"][1].tolist() == [True, False]

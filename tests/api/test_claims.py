"""`benchmarks/claims.py`: its tasks, its grid that goes on where it stopped, and verdicts on records whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import claim_adapters, claim_page, claims  # noqa: E402
from benchmarks.claim_adapters import Setting  # noqa: E402
from benchmarks.claim_tasks import ARITHMETIC, SORTING, TASKS, WORDS, batches, digest, pool  # noqa: E402
from benchmarks.claims import best_on  # noqa: E402
from benchmarks.grid import Grid, OutOfTime  # noqa: E402


def test_answers_are_right() -> None:
    for question, answer in ARITHMETIC.distinct(3, 200):
        start = re.search(r"has (\d+)", question)
        assert start is not None
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", answer)
        assert len(steps) == 2
        assert steps[0][0] == start[1]
        assert steps[1][0] == steps[0][3]
        assert answer.endswith(f"Answer: {steps[1][3]}")
        for left, sign, right, value in steps:
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign] == int(
                value
            )
            assert int(value) > 0
    assert len(set(WORDS)) == len(WORDS)
    for question, answer in SORTING.distinct(3, 50):
        given = question.removeprefix("Words: ").removesuffix("\nSorted:").split(", ")
        assert answer.strip().split(", ") == sorted(given)


def test_training_rows_are_few_and_none_is_held_out() -> None:
    for task in TASKS.values():
        rows = pool(task, 5, 40)
        held = {question for question, _ in task.distinct(77, 100, held_out=True)}
        assert not held & {question for question, _ in rows}
        order = batches(rows, 12, 8, 1)
        assert order == batches(rows, 12, 8, 1) != batches(rows, 12, 8, 2)
        assert {row for part in order[:5] for row in part} == set(rows)  # an epoch sees every row


def test_methods_train_the_same_number() -> None:
    layer = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    layer |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    assert sum(n * m for n, m in layer.values()) == claim_adapters.WEIGHTS
    lora = claim_adapters.RANK * sum(n + m for n, m in layer.values())
    assert lora == claim_adapters.TRAINED == 576 * (claim_adapters.CHANNELS + 64 * claim_adapters.HEADS)
    paca = claim_adapters.COLUMNS * sum(n for n, _ in layer.values())
    assert abs(paca / lora - 1) < 0.02


class Letters:
    """A tokenizer of letters."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(c) % 30 for c in text]}


def test_both_forms_of_a_batch_have_one_loss() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparsify.demo.language_training import answer_loss, encode, loss_of_answers

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = [("abc", "de"), ("fghij", "k"), ("l", "mnop")]
    inputs, labels = encode(Letters(), rows)
    expected = answer_loss(model(**inputs).logits, labels)
    few = loss_of_answers(model, inputs, labels)  # the head on the answers' tokens alone
    torch.testing.assert_close(few, expected)
    weight = model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (few, expected)))
    torch.testing.assert_close(model(**claim_adapters.labelled(Letters(), rows)).loss, expected)


def test_training_takes_groups_and_tells_every_step() -> None:
    """What `claims.py` adds to the demo's loop: rates by group, and someone who looks on and leaves the model in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparsify.demo.language_training import train

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    still, moving = list(model.model.parameters()), list(model.lm_head.parameters())
    told: list[int] = []

    def seen(step: int) -> None:
        assert model.training
        model.eval()
        told.append(step)

    batch = [("abc", "de"), ("fghij", "k")]
    groups = [{"params": still, "lr": 0.0}, {"params": moving, "lr": 1e-2}]
    run = train(model, Letters(), [batch] * 4, lr=1.0, name="x", groups=groups, seen=seen)  # type: ignore[arg-type]
    assert told == [1, 2, 3, 4]
    assert len(run.losses) == 4
    assert {n for n, p in model.named_parameters() if not torch.equal(p, start[n])} == {"lm_head.weight"}


def test_other_rows_are_another_task() -> None:
    assert digest(ARITHMETIC) == digest(ARITHMETIC) != digest(SORTING)
    changed = dataclasses.replace(SORTING, row=lambda draw: (SORTING.row(draw)[0], " none"))
    assert digest(changed) != digest(SORTING)


def test_rates_are_tried_outwards_until_the_best_is_inside() -> None:
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return abs(rate - 0.03)

    best, found = best_on((0.001, 0.003, 0.01, 0.03, 0.1), 0.003, loss)
    assert best == 0.03
    assert asked == [0.001, 0.003, 0.01, 0.03, 0.1]
    assert set(found) == set(asked)
    assert best_on((1.0, 2.0, 3.0), 2.0, lambda rate: -rate)[0] == 3.0  # the grid's own end


def test_a_run_is_made_once_and_kept_whole(tmp_path: Path) -> None:
    grid = Grid(tmp_path, Setting())
    first = grid.cell("a-1", {"rate": 1e-3, "seeds": (0, 1)}, lambda: {"end": {"loss": 1.0}})
    assert first["end"] == {"loss": 1.0}

    def never() -> dict[str, Any]:
        raise AssertionError

    assert grid.cell("a-1", {"rate": 1e-3, "seeds": (0, 1)}, never) == first
    assert grid.cell("a-1", {"rate": 2e-3, "seeds": (0, 1)}, lambda: {"end": {"loss": 2.0}})["end"] == {"loss": 2.0}
    with pytest.raises(ZeroDivisionError):
        grid.cell("b-1", {}, lambda: {"end": 1 / 0})
    assert [path.name for path in tmp_path.iterdir()] == ["a-1.json"]
    late = Grid(tmp_path, Setting(), deadline=time.monotonic() - 1)
    assert late.cell("a-1", {"rate": 2e-3, "seeds": (0, 1)}, never)["end"] == {"loss": 2.0}
    with pytest.raises(OutOfTime, match="b-1"):
        late.cell("b-1", {}, never)


@pytest.mark.parametrize(
    ("differences", "margin", "expected"),
    [
        ([-1.0, -1.1, -0.9], 0.0, "holds"),
        ([1.0, 1.1, 0.9], 0.0, "does not"),
        ([-1.0, 1.0, 0.1], 0.0, "open"),
        ([-1.0, -1.1], 0.0, "open"),
        ([0.01, 0.02, 0.015], 0.1, "holds"),
        ([0.2, 0.21, 0.22], 0.1, "does not"),
        ([], 0.0, "open"),
    ],
)
def test_a_verdict_needs_two_standard_errors(differences: list[float], margin: float, expected: str) -> None:
    assert claim_page.decide(differences, margin)[0] == expected


def test_forgetting_is_compared_where_both_have_learnt_as_much() -> None:
    start = {"step": 0, "loss": 1.0, "text": 3.0}
    path = [{"step": 5, "loss": 0.1, "text": 3.2}, {"step": 9, "loss": 0.01, "text": 4.2}]
    assert claim_page.text_at(path, start, 0.1) == pytest.approx(0.2)
    assert claim_page.text_at(path, start, 10**-1.5) == pytest.approx(0.7)
    assert claim_page.text_at(path, start, 10**-0.5) == pytest.approx(0.1)
    runs: dict[str, Any] = {"sorting-base": {"path": [start]}}
    for seed in range(3):
        further = [{"loss": 0.1, "text": 3.1 + 0.01 * seed}, {"loss": 0.001, "text": 9.0}]
        runs[f"sorting-s2ft-{seed}"] = {"path": further}  # forgets most, but later than the other one ever gets
        runs[f"sorting-lora-{seed}"] = {"path": [{"loss": 0.1, "text": 3.4}]}
        runs[f"sorting-lora-third-{seed}"] = {"path": [{"loss": 0.2, "text": 3.01}]}  # never gets there
        runs[f"sorting-s2ft-third-{seed}"] = {"path": [{"loss": 0.1, "text": 3.3}]}  # gets there, having forgotten more
    found = claim_page.forgetting(runs, "sorting", "s2ft", "lora", "less")
    assert (found.verdict, found.pairs) == ("holds", 3)
    assert found.difference == pytest.approx(-0.29)


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    for seed in range(3):
        for loss, exact in (("ce", 0.5), ("ce+sq", 0.8 + 0.01 * seed)):
            record = {"end": {"exact": exact, "loss": 1.0}, "fit": 0.0, "date": "2026-01-01"}
            (tmp_path / f"squarehead-0.75-{loss}-{seed}.json").write_text(json.dumps(record), encoding="utf-8")
    found = {(v.statement, v.where): v for v in claim_page.verdicts(tmp_path)}
    assert found["SquareHead recovers more than cross-entropy", "0.75 zeros, 48 rows"].verdict == "holds"
    assert found["SquareHead recovers more than cross-entropy + KL", "0.75 zeros, 48 rows"].verdict == "open"
    assert found["RoSA learns more than LoRA", "sorting"].pairs == 0
    text = claim_page.page_text(tmp_path, [])
    assert "| 0.75  | ce+sq" in text
    assert "81.0 ± 0.6 %" in text


def test_the_page_in_the_documentation_is_made_from_the_records() -> None:
    page = ROOT / "docs" / "claims.md"
    pictures = sorted(p.stem for p in (ROOT / "docs" / "claims").glob("*.svg"))
    ordered = [name for name in TASKS if name in pictures]
    assert page.read_text(encoding="utf-8") == claim_page.page_text(claims.FOLDER, ordered)

"""The language model demo's questions: right answers, held-out ones never trained on."""

from __future__ import annotations

import datetime
import sqlite3
from itertools import islice

import pytest

from sparsify.demo.language_tasks import COLUMNS, DATES, SQL, TABLES, LanguageTask, calibration_text, general_text


@pytest.mark.parametrize("task", [SQL, DATES], ids=lambda task: task.name)
def test_no_held_out_question_is_trained_on(task: LanguageTask) -> None:
    learnt = {question for seed in (0, 1) for question, _ in islice(task.rows(seed), 3000)}
    held_out = task.distinct(77, 200, held_out=True)
    assert not learnt & {question for question, _ in held_out}
    assert len({question for question, _ in held_out}) == 200


@pytest.mark.parametrize("task", [SQL, DATES], ids=lambda task: task.name)
def test_a_seed_gives_the_same_rows_and_another_one_others(task: LanguageTask) -> None:
    first, again, other = (list(islice(task.rows(seed), 50)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_a_question_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for question, answer in islice(SQL.rows(3), 5000):
        assert answers.setdefault(question, answer) == answer


def test_answers_are_sql() -> None:
    database = sqlite3.connect(":memory:")
    for table in TABLES:
        database.execute(f"CREATE TABLE {table} ({', '.join(f'{column} INTEGER' for column in COLUMNS)})")
    for _, answer in SQL.distinct(4, 500):
        database.execute(answer)


def test_answers_are_dates() -> None:
    for question, answer in DATES.distinct(4, 500):
        day = datetime.date.fromisoformat(answer.strip())
        assert str(day.year) in question
        assert day.strftime("%B")[:3] in question
        assert str(day.day) in question


def test_pruning_does_not_see_the_text_that_judges_it() -> None:
    judge = " ".join(general_text().split())
    pieces = [piece for piece in calibration_text(20_000).split("\n") if len(piece) > 200]
    assert pieces
    assert not [piece for piece in pieces if piece[:120] in judge]

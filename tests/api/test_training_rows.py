"""Rows of training data: what of each is learned, and what cannot be used named by file and line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import small_folder
import torch
import transformers as hf

from sparsify.errors import PlanError
from sparsify.finetune.packing import best_fit, check_packing, pack_rows
from sparsify.finetune.rows import Collator, Rows, Sample, read_rows
from sparsify.finetune.stream import Stream

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_folder.tokenizer()


def words(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def learned(tokenizer: Any, sample: Any) -> str:
    assert len(sample.ids) == len(sample.labels)
    assert all(label in (IGNORED, token) for token, label in zip(sample.ids, sample.labels, strict=True))
    return words(tokenizer, [label for label in sample.labels if label != IGNORED])


TURNS = [
    {"role": "system", "content": "a mat"}, {"role": "user", "content": "what sat"}, {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "what is blue"}, {"role": "assistant", "content": "the sky"},
]  # fmt: skip

LEARNED = [
    ({"text": "the cat sat"}, "<s> the cat sat </s>", "<s> the cat sat </s>", None, None),
    ({"prompt": "what is the sky", "completion": "blue sky"}, "<s> what is the sky blue sky </s>", "blue sky </s>", "<s> what is the sky", "blue sky"),
    (
        {"messages": TURNS},
        "<begin> system a mat <end> <begin> user what sat <end> <begin> assistant the cat <end> <begin> user what is blue <end> <begin> assistant the sky <end>",
        "the cat <end> the sky <end>",
        "<begin> system a mat <end> <begin> user what sat <end> <begin> assistant the cat <end> <begin> user what is blue <end> <begin> assistant",
        "the sky",
    ),
    (
        {"prompt": TURNS[1:4], "completion": TURNS[4:]},
        "<begin> user what sat <end> <begin> assistant the cat <end> <begin> user what is blue <end> <begin> assistant the sky <end>",
        "the sky <end>",
        "<begin> user what sat <end> <begin> assistant the cat <end> <begin> user what is blue <end> <begin> assistant",
        "the sky",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "ids", "labels", "prompt", "reference"), LEARNED, ids=lambda v: "" if isinstance(v, str) else None
)
def test_what_is_learned_of_a_row(
    tokenizer: Any, tmp_path: Path, row: Any, ids: str, labels: str, prompt: Any, reference: Any
) -> None:
    (sample,) = read_rows(small_folder.write_rows(tmp_path / "a.jsonl", [row]), tokenizer, length=99).samples
    assert words(tokenizer, sample.ids) == ids
    assert learned(tokenizer, sample) == labels
    assert (None if sample.prompt is None else words(tokenizer, sample.prompt)) == prompt
    assert sample.reference == reference


def test_rows_are_cut_and_those_with_nothing_left_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "the cat sat on a mat", "completion": "blue"},
        {"prompt": "the", "completion": "sky is blue and red"},
    ]
    found = read_rows(small_folder.write_rows(tmp_path / "a.jsonl", rows), tokenizer, length=4)
    assert (len(found), found.skipped, found.cut) == (1, 1, 2)
    assert learned(tokenizer, found.samples[0]) == "sky is"
    assert "1 cut" not in str(found)
    assert "2 cut; 1 skipped" in str(found)
    with pytest.raises(PlanError, match="of all 2 nothing is left to learn after 2 tokens"):
        read_rows(tmp_path / "a.jsonl", tokenizer, length=2)


REFUSED: list[tuple[str, str]] = [
    ('{"conversations": []}', "a.jsonl, line 1: expected 'messages'.*'conversations' is called 'messages' here"), ('{"prompt": "a"}', "found 'prompt'"),
    ('{"text": 3}', "'text' must be a string, got int"), ('{"prompt": [], "completion": "a"}', "'prompt' must be a string, got list"),
    ('{"messages": []}', "must be a list"), ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"), ("[1]", "expected an object"),
    ('{"text": "a", "text": "b"}', "stands there twice"), ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "line 2: has no 'text'"), ("{", "not JSON"), ("", "is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "word"), REFUSED, ids=[w[:30] for _, w in REFUSED])
def test_rows_that_cannot_be_used_are_named(tokenizer: Any, tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(PlanError, match=word):
        read_rows(tmp_path / "a.jsonl", tokenizer, length=99)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    forgetful = small_folder.tokenizer()
    forgetful.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    path = small_folder.write_rows(tmp_path / "a.jsonl", [{"messages": TURNS}])
    with pytest.raises(PlanError, match="line 1: the chat template rewrites earlier turns"):
        read_rows(path, forgetful, length=99)


def test_folders_and_splits(tokenizer: Any, tmp_path: Path) -> None:
    for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 1)):
        small_folder.write_rows(tmp_path / f"{name}.jsonl", small_folder.pairs(count))
    assert len(read_rows(tmp_path, tokenizer, length=99)) == 5
    assert len(read_rows(tmp_path, tokenizer, length=99, split="test")) == 1
    with pytest.raises(PlanError, match="no split 'tst'; did you mean 'test'"):
        read_rows(tmp_path, tokenizer, length=99, split="tst")
    (tmp_path / "other").mkdir()
    with pytest.raises(PlanError, match=r"no \.jsonl or \.parquet file there"):
        read_rows(tmp_path / "other", tokenizer, length=99)
    for place, word in (
        (tmp_path / "none.jsonl", "not there"),
        (Path("/dev/null"), "a device"),
        (tmp_path / "a.csv", "rows are read from"),
    ):
        if place.suffix == ".csv":
            place.write_text("a,b")
        with pytest.raises(PlanError, match=word):
            read_rows(place, tokenizer, length=99)


def test_parquet_and_saved_data_sets(tokenizer: Any, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = arrow.Table.from_pylist([{**row, "id": 3} for row in small_folder.pairs(5)])
    expected = [
        s.ids
        for s in read_rows(
            small_folder.write_rows(tmp_path / "a.jsonl", small_folder.pairs(5)), tokenizer, length=99
        ).samples
    ]
    parquet.write_table(table, tmp_path / "a.parquet")
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    with arrow.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (saved / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"})
    )
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    for place in (tmp_path / "a.parquet", saved, tmp_path / "saved"):
        assert [s.ids for s in read_rows(place, tokenizer, length=99).samples] == expected
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../a.jsonl"}]}))
    with pytest.raises(PlanError, match="expected the names of Arrow files in this folder"):
        read_rows(saved, tokenizer, length=99)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(PlanError, match=r"a\.parquet: damaged"):
        read_rows(tmp_path / "a.parquet", tokenizer, length=99)


def test_batches_are_padded_and_the_padding_is_not_learned() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    found = Collator(9)(rows)
    assert found["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    left = Collator(9, left=True)(rows)
    assert torch.equal(left["input_ids"][1], torch.tensor([9, 9, 8]))
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_held_out_rows_are_the_seeds(tokenizer: Any, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(small_folder.WORDS, k=6))} for _ in range(20)]
    found = read_rows(small_folder.write_rows(tmp_path / "a.jsonl", rows), tokenizer, length=99)
    train, held = found.split(0.25, 3)
    assert (len(train), len(held)) == (15, 5)
    assert sorted(map(str, [*train.samples, *held.samples])) == sorted(map(str, found.samples))
    assert held.samples != found.split(0.25, 4)[1].samples
    with pytest.raises(PlanError, match="one row cannot be divided"):
        held.split(0.5, 0)[1].split(0.5, 0)[0].split(0.5, 0)[0].split(0.5, 0)


# --- packing ---


def sizes(packs: list[list[Sample]]) -> list[int]:
    return [sum(len(sample.ids) for sample in pack) for pack in packs]


def test_every_row_goes_where_the_least_room_is_left() -> None:
    draw = random.Random(0)
    samples = [Sample([n] * draw.randint(1, 40), [n]) for n in range(300)]
    packs = best_fit(samples, 41)
    assert sorted(s.ids[0] for pack in packs for s in pack) == list(range(300))
    assert max(sizes(packs)) <= 41
    rooms: list[int] = []  # the same, by looking at every pack
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        size = len(sample.ids)
        room = min((r for r in rooms if r >= size), default=None)
        if room is None:
            rooms.append(41 - size)
        else:
            rooms[rooms.index(room)] -= size
    assert sorted(41 - size for size in sizes(packs)) == sorted(rooms)
    assert best_fit(samples, 41) == packs


def some_rows(tokenizer: Any, path: Path) -> Rows:
    texts = ["the cat sat on a mat", "blue sky", "what is red and what is blue", "a rose", "dogs saw the cat"]
    rows: list[Any] = [{"text": text} for text in texts]
    return read_rows(small_folder.write_rows(path / "a.jsonl", rows), tokenizer, length=20)


def test_packed_rows_learn_what_they_learn_alone(tokenizer: Any, tmp_path: Path) -> None:
    rows, collate = some_rows(tokenizer, tmp_path), Collator(0)
    packed = pack_rows(rows, 20)
    assert len(packed) == 2
    assert sizes(packed.packs) != [20, 20], "or nothing is padded"
    assert "5 rows of text" in str(packed)
    assert "packed into 2" in str(packed)
    model: Any = hf.LlamaForCausalLM(small_folder.config(use_cache=False)).double().eval()  # as Trainer sets it
    found = []
    for source in (rows, packed):
        model.zero_grad()
        batch = collate([source[i] for i in range(len(source))])
        assert ("attention_mask" in batch) == (source is rows)
        assert int((batch["labels"][:, 1:] != IGNORED).sum()) == rows.learned
        loss = model(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)  # the loss is fp32
    check_packing(model, rows.samples, collate)


class Forgetful(hf.LlamaForCausalLM):
    """Takes positions and does not look at them."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **named: Any) -> Any:
        return super().forward(input_ids=input_ids, **named)


class Without(hf.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize(("kind", "word"), [(Forgetful, "sees the row before it"), (Without, "takes no position_ids")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_which_packed_rows_see_each_other_is_refused(
    kind: Any, word: str, dtype: torch.dtype, tokenizer: Any, tmp_path: Path
) -> None:
    rows, collate = some_rows(tokenizer, tmp_path), Collator(0)
    torch.manual_seed(0)
    with pytest.raises(PlanError, match=word):
        check_packing(kind(small_folder.config()).to(dtype), rows.samples, collate)
    check_packing(hf.LlamaForCausalLM(small_folder.config()).to(dtype), rows.samples, collate)


# --- streaming ---


def test_a_stream_reads_no_further_than_its_window(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"cat {'sat ' * (n % 7)}"}) for n in range(60)]
    lines[49] = '{"text": 3}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    stream = Stream(str(tmp_path / "a.jsonl"), tokenizer, 20, window=10)
    rows = iter(stream)
    found = [next(rows) for _ in range(40)]
    assert (stream.taken, len(stream.first(49))) == (40, 49)
    again = iter(Stream(str(tmp_path / "a.jsonl"), tokenizer, 20, window=10))
    assert [next(again) for _ in range(40)] == found
    with pytest.raises(PlanError, match=r"a.jsonl, line 50: 'text' must be a string"):
        next(rows)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_has_the_rows_of_its_file_in_every_pass(packing: bool, tokenizer: Any, tmp_path: Path) -> None:
    small_folder.write_rows(tmp_path / "a.jsonl", small_folder.pairs(25))
    rows = read_rows(tmp_path / "a.jsonl", tokenizer, length=20)
    stream = Stream(str(tmp_path / "a.jsonl"), tokenizer, 20, packing=packing, window=10)
    tokens = sorted(token for sample in rows.samples for token in sample.ids)
    passes = []
    source = iter(stream)
    for number in (1, 2):
        seen: list[Any] = []
        while sum(len(row["input_ids"]) for row in seen) < len(tokens):
            seen.append(next(source))
        assert sorted(token for row in seen for token in row["input_ids"]) == tokens
        assert (stream.taken, stream.learned) == (25 * number, rows.learned * number)
        passes.append(seen)
    assert (len(passes[0]) < 25) == packing
    assert passes[0] != passes[1], "another order"


def test_a_stream_of_nothing_does_not_go_on_for_ever(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "the cat sat", "completion": "mat"}\n')
    stream = Stream(str(tmp_path / "a.jsonl"), tokenizer, 2)
    for read in (stream.first, lambda: next(iter(stream))):
        with pytest.raises(PlanError, match="no row that can be learned"):
            read()

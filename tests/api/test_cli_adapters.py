"""`sparsify adapter` and the verbs over trained adapters, on folders of both kinds: what is written is what Python would compute."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import small_folder
import tiny
import torch
import transformers as hf
from typer.testing import CliRunner, Result

import sparsify
from sparsify import S2FT, LoRA, RoSA
from sparsify.adapters import adapter as adapters
from sparsify.cli import app

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def call(*arguments: str | Path, stdin: str | None = None) -> Result:
    return RUNNER.invoke(app, [os.fspath(a) for a in arguments], input=stdin)


def fine(*arguments: str | Path, stdin: str | None = None) -> str:
    done = call(*arguments, stdin=stdin)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: str | Path) -> str:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, rows.jsonl, adapters a/ b/ (S2FT), lora/, rosa/ and peft/ (of lora)."""
    path = tmp_path_factory.mktemp("given")
    small_folder.write_model(path / "model")
    small_folder.write_rows(path / "rows.jsonl", small_folder.pairs(3))
    rules: dict[str, Any] = {
        "a": S2FT(0.2, structure="ffn"), "b": S2FT(0.2, structure="ffn", select="weight"), "lora": LoRA(3, match="q_proj"),
        "rosa": RoSA(2, density=0.02, mask="magnitude", match="o_proj"),
    }  # fmt: skip
    for seed, (name, rule) in enumerate(rules.items()):
        host: Any = tiny.lower(model_of(path), rule)
        tiny.disturb(host, 0.3, seed)
        host.sparsify.save_adapter(path / name)
        if name == "lora":
            host.sparsify.export_lora(path / "peft")
    return path


def model_of(path: Path, name: str = "model") -> Any:
    return hf.LlamaForCausalLM.from_pretrained(path / name).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20).reshape(2, 8)).logits


def with_adapter(given: Path, *names: str, spec: Any = None) -> Any:
    host = sparsify.load(model_of(given), {name: given / name for name in names}, active=None)
    host.sparsify.set_adapter(spec or names[0])
    return host


# --- looking ---


def test_ls_lists_what_lies_below(given: Path, tmp_path: Path) -> None:
    rows = json.loads(fine("adapter", "ls", given, "--json"))
    assert [Path(row["folder"]).name for row in rows] == ["a", "b", "lora", "peft", "rosa"]
    for row in rows:
        if row["made_by"] != "PEFT":
            deltas = adapters.load(row["folder"]).deltas
            assert row["numbers"] == sum(d.values.numel() + (d.a.numel() if d.a is not None else 0) for d in deltas)
            assert row["weights"] == len({d.param for d in deltas})
    assert [row["methods"] for row in rows] == ["S2FT", "S2FT", "LoRA", "LORA r=3", "RoSA"]
    text = fine("adapter", "ls", given)
    assert "made by" in text
    assert "peft" in text
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter.safetensors").write_bytes(b"nothing")
    (row,) = json.loads(fine("adapter", "ls", tmp_path, "--json"))
    assert row["note"].startswith("cannot be read: ")
    assert fine("adapter", "ls", tmp_path / "broken" / "..", "--json")
    (tmp_path / "empty").mkdir()
    assert fine("adapter", "ls", tmp_path / "empty") == "no adapters\n"


def test_the_old_way_to_call_it_is_show(given: Path) -> None:
    for name in ("a", "peft"):
        assert fine("adapter", given / name) == fine("adapter", "show", given / name)
        assert (
            fine("adapter", given / name, "--json")
            == fine("adapter", "--json", given / name)
            == fine("adapter", "show", given / name, "--json")
        )


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("list", "here it is `sparsify adapter ls`"),
        ("info", "adapter show`"),
        ("mrge", "no folder and no verb; here it is `sparsify adapter merge`"),
        ("convert", "adapter export`"),
    ],
)
def test_other_words_are_answered(word: str, answer: str) -> None:
    assert answer in refused("adapter", word, "x")
    assert "give a folder, or a verb (show, ls, verify, merge, fuse, export)" in refused("adapter")


def test_verify_finds_a_flipped_bit_and_another_base(given: Path, tmp_path: Path) -> None:
    assert "a: fine; 2 weights; hashes, names and shapes" in fine("adapter", "verify", given / "a")
    assert json.loads(fine("adapter", "verify", given / "a", "--base", given / "model", "--json"))["fine"] is True
    assert "PEFT's files have no hashes" in fine("adapter", "verify", given / "peft")
    other = model_of(given)
    tiny.perturb(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    assert "is not the base tha" in refused("adapter", "verify", given / "a", "--base", tmp_path / "other")
    copy = tmp_path / "copy"
    copy.mkdir()
    data = bytearray((given / "a" / "adapter.safetensors").read_bytes())
    data[-3] ^= 4
    (copy / "adapter.safetensors").write_bytes(data)
    assert refused("adapter", "verify", copy)
    assert "a model, not an adapter" in refused("adapter", "verify", given / "model")


# --- making ---


@pytest.mark.parametrize(
    ("names", "options", "spec"),
    [
        (("peft",), (), "peft"),
        pytest.param(("a",), (), "a", marks=pytest.mark.slow),  # the day from the shell merges one of ours
        pytest.param(("a", "b"), (), {"a": 0.5, "b": 0.5}, marks=pytest.mark.slow),  # the next one is a sum too
        (("a", "lora"), ("--mix", "a=1,lora=-0.5"), {"a": 1.0, "lora": -0.5}),
    ],
)
def test_merge_writes_the_model_that_the_adapter_makes(
    given: Path, tmp_path: Path, names: tuple[str, ...], options: tuple[str, ...], spec: Any
) -> None:
    arguments = ["adapter", "merge", given / "model", *(given / n for n in names), "-o", tmp_path / "out", *options]
    assert "would write" in fine(*arguments, "--dry-run")
    assert not (tmp_path / "out").exists()
    assert json.loads(fine(*arguments, "--json"))["adapters"] == (spec if isinstance(spec, dict) else {spec: 1.0})
    torch.testing.assert_close(
        logits(model_of(tmp_path, "out")), logits(with_adapter(given, *names, spec=spec)), atol=1e-5, rtol=1e-5
    )
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == small_folder.TEMPLATE
    assert "holds a model already" in refused(*arguments)


def test_a_merge_that_fails_leaves_nothing(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf.LlamaForCausalLM, "save_pretrained", interrupted)
    done = call("adapter", "merge", given / "model", given / "a", "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_fuse_is_the_weighted_sum(given: Path, tmp_path: Path) -> None:
    fine("adapter", "fuse", f"{given / 'a'}=0.25", f"{given / 'b'}=0.75", "-o", tmp_path / "ab")
    served = sparsify.load(model_of(given), tmp_path / "ab")
    torch.testing.assert_close(
        logits(served), logits(with_adapter(given, "a", "b", spec={"a": 0.25, "b": 0.75})), atol=1e-5, rtol=1e-5
    )
    assert "give the model too" in refused("adapter", "fuse", given / "a", given / "peft", "-o", tmp_path / "x")
    fine("adapter", "fuse", given / "lora", given / "peft", "-o", tmp_path / "same", "--model", given / "model")
    same = sparsify.load(model_of(given), tmp_path / "same")
    torch.testing.assert_close(logits(same), logits(with_adapter(given, "lora")), atol=1e-5, rtol=1e-5)
    assert "expected folder=weight" in refused("adapter", "fuse", f"{given / 'a'}=x", "-o", tmp_path / "x")
    assert "holds files already" in refused("adapter", "fuse", given / "a", "-o", tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param("a", marks=pytest.mark.slow), "lora"]
)  # the day from the shell exports S2FT
def test_export_is_what_peft_computes(given: Path, tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    arguments = ["adapter", "export", given / "model", given / name, "-o", tmp_path / "out", "--to", "vllm"]
    assert json.loads(fine(*arguments, "--json", "--dry-run"))["written"] is False
    assert not (tmp_path / "out").exists()
    rank = {"a": 8, "lora": 3}[name]
    text = fine(*arguments).splitlines()
    assert text[0] == f"written to {tmp_path / 'out'}: PEFT LoRA of rank {rank}"
    served = f"vllm serve {given / 'model'} --enable-lora --max-lora-rank 8 --lora-modules {name}={tmp_path / 'out'}"
    assert text[-1] == served
    assert f"rank {rank} at most: --max-lora-rank 8" in text[-2]
    host = peft.PeftModel.from_pretrained(model_of(given), tmp_path / "out").eval()
    torch.testing.assert_close(logits(host), logits(with_adapter(given, name)), atol=1e-5, rtol=1e-5)


def test_what_vllm_makes_of_a_folder(given: Path, tmp_path: Path) -> None:
    found = json.loads(fine("adapter", "verify", given / "peft", "--for", "vllm", "--json"))
    assert found["fine"]
    assert found["vllm"]["max_lora_rank"] == 8
    assert {(layer["rank"], layer["inputs"], layer["outputs"]) for layer in found["vllm"]["layers"]} == {(3, 24, 24)}
    text = fine("adapter", "verify", given / "peft", "--for", "vllm", "--max-lora-rank", "16")
    assert "model.layers.0.self_attn.q_proj: rank 3, 13 rows of padding" in text
    assert f"--max-lora-rank 16 --lora-modules peft={given / 'peft'}" in text
    assert "reads PEFT's folders" in refused("adapter", "verify", given / "lora", "--for", "vllm")
    assert "expected vllm" in refused("adapter", "verify", given / "peft", "--for", "tgi")
    assert "--for vllm beside it" in refused("adapter", "verify", given / "peft", "--max-lora-rank", "8")
    few = [
        "adapter",
        "export",
        given / "model",
        given / "a",
        "-o",
        tmp_path / "few",
        "--to",
        "vllm",
        "--max-lora-rank",
        "8",
    ]
    fine(*few)
    many = [*few[:-1], "9"]
    many[5] = tmp_path / "many"
    assert "9 is none of vLLM's ranks" in refused(*many)
    assert not (tmp_path / "many").exists()
    assert "--to vllm beside it" in refused(
        "adapter", "export", given / "model", given / "a", "-o", tmp_path / "x", "--max-lora-rank", "8"
    )


def test_scattered_entries_are_refused_or_merged_into_a_base(given: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    arguments = ["adapter", "export", given / "model", given / "rosa", "-o", tmp_path / "out"]
    assert "scattered entries" in refused(*arguments)
    assert list(tmp_path.iterdir()) == []
    fine(*arguments, "--sparse", "merge")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    host = peft.PeftModel.from_pretrained(model_of(tmp_path / "out", "base"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(host), logits(with_adapter(given, "rosa")), atol=1e-5, rtol=1e-5)


# --- using ---


def test_eval_measures_the_base_and_every_adapter(given: Path) -> None:
    found = json.loads(
        fine(
            "eval", given / "model", given / "rows.jsonl", "-a", given / "a", "-a", f"second={given / 'lora'}", "--json"
        )
    )
    assert list(found) == ["base", "a", "second"]
    tokenizer = small_folder.tokenizer()
    for name, folder in (("base", None), ("a", "a"), ("second", "lora")):
        model = model_of(given) if folder is None else with_adapter(given, folder)
        total, count, right = 0.0, 0, 0
        for row in small_folder.pairs(3):
            before, after = (
                tokenizer(row["prompt"])["input_ids"],
                [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], 2],
            )
            ids = torch.tensor([before + after])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            total -= sum(float(logs[len(before) - 1 + i, token]) for i, token in enumerate(after))
            count += len(after)
            answer = model.generate(
                torch.tensor([before]), max_new_tokens=len(after) + 8, do_sample=False, pad_token_id=0
            )
            right += tokenizer.decode(answer[0, len(before) :], skip_special_tokens=True).strip() == row["completion"]
        assert found[name]["loss"] == pytest.approx(total / count, rel=1e-5)
        assert (found[name]["tokens"], found[name]["exact"], found[name]["asked"]) == (count, right, 3)
    text = fine("eval", given / "model", given / "rows.jsonl", "--no-exact")
    assert f"{found['base']['loss']:.4f}" in text
    assert "did you mean 'messages'" in refused("eval", given / "model", given / "rows.jsonl", "--format", "mesages")
    assert "two adapters would be called 'a'" in refused(
        "eval", given / "model", given / "rows.jsonl", "-a", given / "a", "-a", given / "a"
    )


def test_generate_writes_what_the_model_says(given: Path) -> None:
    host, tokenizer = with_adapter(given, "a"), small_folder.tokenizer()
    ids = torch.tensor([tokenizer("what is")["input_ids"]])
    expected = tokenizer.decode(
        host.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :],
        skip_special_tokens=True,
    )
    arguments = ["generate", given / "model", "-a", given / "a", "-n", "6"]
    assert fine(*arguments, "-p", "what is").strip() == expected.strip()
    assert fine(*arguments, stdin="what is").strip() == expected.strip()
    assert fine("generate", given / "model", "what is", *arguments[2:]).strip() == expected.strip()
    assert "given twice" in refused("generate", given / "model", "a", "-p", "b")
    assert json.loads(fine(*arguments, "-p", "what is", "--json"))["text"] == expected
    drawn = [
        json.loads(fine(*arguments, "-p", "what is", "--json", "--temperature", "1.5", "--seed", s))["text"]
        for s in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "the prompt is empty" in refused(*arguments, "-p", " ")
    assert "--mix: no --adapter" in refused("generate", given / "model", "-p", "a", "--mix", "a=1")
    assert "no adapter is called 'c'" in refused(*arguments, "-p", "a", "--mix", "c=1")
    assert "positions" in refused(*arguments, "-p", "the " * 90)


def test_chat_keeps_the_conversation(given: Path) -> None:
    said = fine("chat", given / "model", "-n", "4", stdin="what is\n\n/reset\nwhat is\nthe sky\n").splitlines()
    host, tokenizer = model_of(given), small_folder.tokenizer()

    def answer(*turns: tuple[str, str]) -> str:
        text = tokenizer.apply_chat_template(
            [{"role": r, "content": c} for r, c in turns], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        return tokenizer.decode(
            host.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :],
            skip_special_tokens=True,
        )

    first = answer(("user", "what is"))
    second = answer(("user", "what is"), ("assistant", first), ("user", "the sky"))
    assert said == [first, first, second]
    lines = fine("chat", given / "model", "-n", "4", "--json", stdin="what is\nthe sky\n").splitlines()
    turns = [{"prompt": "what is", "text": first, "turn": 1}, {"prompt": "the sky", "text": second, "turn": 2}]
    assert [json.loads(line) for line in lines] == turns

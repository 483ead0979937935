"""`sparsify prune`: what it writes, what it refuses, and that an interrupted run resumes to the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
import transformers as hf
import zoo
from methods import model_of
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from sparsify import Plan, Prune
from sparsify.cli import app
from sparsify.files.tensor_file import FolderTensors
from sparsify.pruning import sequential
from sparsify.pruning.sparse_checkpoint import model_hash, open_sparse
from sparsify.pruning.texts import calibration_batches

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs"]
TEXT = " ".join(random.Random(0).choices(WORDS, k=400))


def small_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token per word, numbers from 3 on; 1 in front of every text when special tokens are asked for; 2 is unknown."""
    words = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {word: 3 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama/`, `t5/`, `vit/` with weights, tokenizers and a note, and calibration files."""
    path = tmp_path_factory.mktemp("models")
    for name, family in (("llama", "Llama"), ("t5", "T5 (gated)"), ("vit", "ViT")):
        model: Any = model_of(family)
        model.save_pretrained(path / name)
    for name in ("llama", "t5"):
        small_tokenizer().save_pretrained(path / name)
    (path / "llama" / "NOTES.md").write_text("ours")
    (path / "llama" / "pytorch_model.bin").write_text("old weights")
    (path / "text.txt").write_text(TEXT)
    lines = [{"text": TEXT[i : i + 40], "target": TEXT[i + 3 : i + 20]} for i in range(0, 400, 40)]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def call(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, ["prune", *map(str, arguments)])


def same_as_compiled(out: Path, source: Path, rule: Prune, data: list[dict[str, Tensor]] | None) -> Any:
    """The folder holds what `sparsify.compile` makes of the source; returns the compiled host."""
    kind = type(model_of("T5 (gated)" if source.name == "t5" else "Llama"))
    dense: Any = kind.from_pretrained(source)  # type: ignore[attr-defined]
    host: Any = tiny.lower(dense.eval(), rule, calibration=data)
    again: Any = kind.from_pretrained(out)  # type: ignore[attr-defined]
    tiny.assert_same(dict(again.named_parameters()), dict(host.named_parameters()))
    return host


def batches_of(folder: Path, file: str, name: str = "llama", **options: Any) -> list[dict[str, Tensor]]:
    config = hf.AutoConfig.from_pretrained(folder / name)
    return calibration_batches(folder / file, config, small_tokenizer(), **options)


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["memory", "stream"])
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--method", "sparsegpt", "--sparsity", "0.6"], Prune(sparsity=0.6)),
        (["--method", "wanda", "--pattern", "2:4"], Prune(method="wanda", pattern="2:4")),
        (["--method", "random", "--seed", "3"], Prune(method="random", seed=3)),
        (
            ["--method", "magnitude", "--match", "*.mlp.*", "--exclude", "*.1.*", "--allocation", "uniform"],
            Prune(method="magnitude", match="*.mlp.*", exclude=("*.1.*",)),
        ),
    ],
    ids=["sparsegpt", "wanda", "random", "magnitude"],
)
def test_the_folder_is_the_pruned_model(
    folder: Path, tmp_path: Path, options: list[str], rule: Prune, stream: list[str]
) -> None:
    seed = rule.seed
    data = batches_of(folder, "text.txt", samples=5, sequence=16, seed=seed) if rule.needs_calibration else None
    more = ["--calibration", folder / "text.txt", "--samples", "5", "--sequence", "16"] if data else []
    out = tmp_path / "new" / "out"
    done = call(folder / "llama", "--out", out, *options, *more, *stream, "--all")
    assert done.exit_code == 0, done.output
    dense: Any = hf.LlamaForCausalLM.from_pretrained(folder / "llama")
    host: Any = tiny.lower(dense.eval(), rule, calibration=data, seed=seed)
    again: Any = hf.LlamaForCausalLM.from_pretrained(out)
    tiny.assert_same(dict(again.named_parameters()), dict(host.named_parameters()))
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert hf.AutoTokenizer.from_pretrained(out)("the cat")["input_ids"] == [1, 3, 4]
    assert (out / "NOTES.md").read_text() == "ours"
    assert not (out / "pytorch_model.bin").exists()
    masks = host.sparsify.program.masks
    record = json.loads((out / "pruning.json").read_text())
    assert [layer["name"] for layer in record["layers"]] == [layer.name for layer in host.sparsify.program.pruned]
    assert record["settings"]["method"] == rule.method
    assert record["settings"].get("tokens") == (80 if data else None)
    assert str(tmp_path) not in (out / "pruning.json").read_text()
    shown = [line.split() for line in done.stdout.splitlines()]
    for layer in host.sparsify.program.pruned:
        (line,) = [words for words in shown if words and words[0] == layer.name]
        assert line[1] == f"{layer.sparsity:.2%}"
        assert line[2] == f"{layer.error:.2e}"
        assert line[4] == f"{masks[layer.name].numel() * 4 / 1024:,.1f}"
    total = sum(m.numel() for m in masks.values())
    zeros = sum(int((~m).sum()) for m in masks.values()) / total
    assert f"{len(masks)} weights pruned, {zeros:.1%} zeros: {total * 4 / 2**20:.2f} MiB dense" in done.stdout
    assert "not pruned: lm_head.weight" in done.stdout or rule.match != "*"


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["memory", "stream"])
def test_a_sparse_file_opens_to_the_same_bits(folder: Path, tmp_path: Path, stream: list[str]) -> None:
    options = ["--calibration", folder / "text.txt", "--sequence", "16", "--samples", "4"]
    assert call(folder / "llama", "--out", tmp_path / "dense", *options).exit_code == 0
    done = call(folder / "llama", "--out", tmp_path / "sparse", *options, *stream, "--sparse")
    assert done.exit_code == 0, done.output
    assert not list((tmp_path / "sparse").rglob("*.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "sparse"]
    size = (tmp_path / "sparse" / "model.sparse").stat().st_size
    assert f"model.sparse: {size / 2**20:.2f} MiB" in done.stdout
    expected = dict(FolderTensors(tmp_path / "dense"))
    found = open_sparse(tmp_path / "sparse" / "model.sparse", base=folder / "llama")
    tiny.assert_same(found.dense(), expected)
    assert found.base == model_hash(model_of())
    assert len(found.masked) == 14
    config = hf.AutoConfig.from_pretrained(tmp_path / "sparse")
    tiny.assert_same(found.load_into(hf.LlamaForCausalLM(config)).state_dict(), expected)
    file = str(tmp_path / "sparse" / "model.sparse")
    expanded = RUNNER.invoke(app, ["checkpoint", file, "--dense", str(tmp_path / "again")])
    assert expanded.exit_code == 0, expanded.output
    again: Any = hf.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    tiny.assert_same(again.state_dict(), expected)
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "again")("mat")["input_ids"] == [1, 8]
    assert not (tmp_path / "again" / "model.sparse").exists()
    refused = RUNNER.invoke(app, ["checkpoint", file, "--dense", str(tmp_path / "again")])
    assert refused.exit_code == 2
    assert "holds a model already" in refused.output


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["memory", "stream"])
def test_dtype_is_that_of_the_written_weights(folder: Path, tmp_path: Path, stream: list[str]) -> None:
    out = tmp_path / "out"
    assert call(folder / "llama", "-o", out, "--method", "magnitude", "--dtype", "bf16", *stream).exit_code == 0
    again: Any = hf.LlamaForCausalLM.from_pretrained(out)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    host: Any = tiny.lower(tiny.build("Llama", torch.bfloat16), Prune(method="magnitude"))
    tiny.assert_same(dict(again.named_parameters()), dict(host.named_parameters()))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_encoder_decoder_is_calibrated_with_pairs(folder: Path, tmp_path: Path) -> None:
    options = ["--calibration", folder / "pairs.jsonl", "--samples", "6", "--sequence", "7", "--sparsity", "0.5"]
    done = call(folder / "t5", "--out", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    data = batches_of(folder, "pairs.jsonl", "t5", samples=6, sequence=7)
    assert sum(len(batch["labels"]) for batch in data) == 6
    same_as_compiled(tmp_path / "out", folder / "t5", Prune(sparsity=0.5), data)
    seen = {layer["tokens"] for layer in json.loads((tmp_path / "out" / "pruning.json").read_text())["layers"]}
    assert seen == {
        int(sum(batch["attention_mask"].sum() for batch in data)),
        int(sum((batch["labels"] != -100).sum() for batch in data)),
    }


# --- interruption ---


def prune_and_die(arguments: list[str], layer: int) -> None:
    """The command is killed by the operating system while it prunes its `layer`-th weight."""
    torch.set_num_threads(1)
    original, calls = sequential.sparsegpt_prune, 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == layer:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    sequential.sparsegpt_prune = killed  # type: ignore[assignment]
    app(arguments)


@pytest.mark.parametrize(
    ("stream", "redone"),
    [
        pytest.param([], 4, id="memory"),
        pytest.param(["--stream"], 7, id="stream", marks=pytest.mark.slow),
        pytest.param(["--stream", "--sparse"], 7, id="sparse"),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    folder: Path, tmp_path: Path, stream: list[str], redone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--calibration", folder / "text.txt", "--sequence", "16", "--samples", "4", "--sparsity", "0.6", *stream]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(folder / "llama", "--out", whole, *options).exit_code == 0
    command = [str(part) for part in ("prune", folder / "llama", "--out", out, *options)]
    process = processes.start(prune_and_die, command, 11)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    refused = RUNNER.invoke(app, command)
    assert refused.exit_code == 2
    assert "holds an unfinished run: go on with --resume, or delete it" in " ".join(refused.output.split())
    other = RUNNER.invoke(app, [*command, "--resume", "--seed", "9"])
    assert other.exit_code == 2
    assert "another pruning run" in other.output
    calls, original = 0, sequential.sparsegpt_prune

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(sequential, "sparsegpt_prune", counted)
    done = RUNNER.invoke(app, [*command, "--resume"])
    assert done.exit_code == 0, done.output
    assert calls == redone  # what was finished is not done again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    if "--sparse" in stream:
        tiny.assert_same(open_sparse(out / "model.sparse").dense(), open_sparse(whole / "model.sparse").dense())
    else:
        tiny.assert_same(dict(FolderTensors(out)), dict(FolderTensors(whole)))
    first, second = (json.loads((path / "pruning.json").read_text()) for path in (out, whole))
    assert [(la["name"], la["error"]) for la in first["layers"]] == [
        (la["name"], la["error"]) for la in second["layers"]
    ]


def test_control_c_says_how_to_go_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--calibration", folder / "text.txt", "--sequence", "16", "--samples", "4"]

    def press(after: int) -> Result:
        original, calls = sequential.sparsegpt_prune, 0

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(sequential, "sparsegpt_prune", interrupted)
            return call(folder / "llama", "--out", tmp_path / "out", *options)

    early = press(0)
    assert early.exit_code == 130
    assert "--resume" not in early.stderr
    assert not list(tmp_path.iterdir())  # nothing was finished: nothing is left behind
    later = press(9)
    assert later.exit_code == 130
    assert f"interrupted; the same command with --resume goes on from {tmp_path / 'out.partial'}" in later.stderr
    assert call(folder / "llama", "--out", tmp_path / "out", *options, "--resume").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_while_writing_leaves_no_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (folder / "llama", "--out", tmp_path / "out", "--method", "magnitude", "--stream")

    def full_disk(*_: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("sparsify.cli.prune.write_record", full_disk)
        failed = call(*arguments)
    assert failed.exit_code == 1
    assert "no space" in failed.stderr
    assert not (tmp_path / "out").exists()
    done = call(*arguments, "--resume")
    assert done.exit_code == 0, done.output
    same_as_compiled(tmp_path / "out", folder / "llama", Prune(method="magnitude"), None)


# --- what is printed ---


def loss_of(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Mean loss per predicted token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            labels = batch.get("labels", batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
            shift = 0 if "labels" in batch else 1
            tokens = int((labels[:, shift:] != -100).sum())
            total += float(model(**{**batch, "labels": labels}).loss) * tokens
            count += tokens
    return total / count


@pytest.mark.parametrize("held_out", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "file"), [("llama", "text.txt"), ("t5", "pairs.jsonl")])
def test_the_loss_before_and_after_is_that_of_the_two_folders(
    folder: Path, tmp_path: Path, name: str, file: str, held_out: bool
) -> None:
    from sparsify.pruning.texts import split_batches

    samples = 4 if held_out else 1000
    out, options = tmp_path / "out", ["--calibration", folder / file, "--samples", str(samples), "--sequence", "9"]
    done = call(folder / name, "-o", out, *options)
    assert done.exit_code == 0, done.output
    config = hf.AutoConfig.from_pretrained(folder / name)
    given, others = split_batches(folder / file, config, small_tokenizer(), samples=samples, held_out=16, sequence=9)
    batches = others if held_out else given[:2]
    kind: Any = hf.LlamaForCausalLM if name == "llama" else hf.T5ForConditionalGeneration
    dense, pruned = (loss_of(kind.from_pretrained(path).eval(), batches) for path in (folder / name, out))
    recorded = json.loads((out / "pruning.json").read_bytes())["loss"]
    assert recorded["dense"] == pytest.approx(dense, abs=1e-5)
    assert recorded["pruned"] == pytest.approx(pruned, abs=1e-5)
    assert abs(dense - pruned) > 1e-5
    count = sum(len(batch["input_ids"]) for batch in batches)
    assert (recorded["held_out"], recorded["samples"]) == (held_out, count)
    which = "held-out" if held_out else "calibration"
    assert f"loss: {dense:.4f} dense, {pruned:.4f} pruned on {count} {which} samples (perplexity " in done.stdout


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--no-loss"], "--no-loss"),
        pytest.param(["--stream"], "it would need the whole model in memory (--stream)", marks=pytest.mark.slow),
        ([], "there is no --calibration text"),
    ],
)
def test_why_there_is_no_loss(folder: Path, tmp_path: Path, options: list[str], why: str) -> None:
    text = ["--calibration", folder / "text.txt", "--samples", "2"] if options else []
    done = call(folder / "llama", "-o", tmp_path / "out", "--method", "magnitude", *text, *options)
    assert done.exit_code == 0, done.output
    assert f"loss: not measured, {why}\n" in done.stdout
    assert json.loads((tmp_path / "out" / "pruning.json").read_bytes())["loss"] is None


def test_a_loss_that_sees_its_answers_is_none() -> None:
    """A masked language model's loss on its own input says nothing: found by trying, not by the class's name."""
    from sparsify.cli.prune import Losses

    batch = {"input_ids": tiny.tokens(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    batch["attention_mask"][1:, 5:] = 0
    bert: Any = hf.BertForMaskedLM(hf.BertConfig(**dict[str, Any](zoo.ENCODER))).eval()
    losses = Losses([batch], False, False, False)
    losses.dense = losses.measure(bert)
    assert str(losses) == "loss: not measured, its outputs see the tokens that they would have to predict"
    model: Any = tiny.build("Llama").train()
    losses = Losses([batch], False, False, False)
    losses.dense = losses.pruned = losses.measure(model)
    assert losses.dense == pytest.approx(loss_of(model.eval(), [batch]), abs=1e-6)
    assert "on 3 calibration samples (perplexity +0.0 %)" in str(losses)
    losses = Losses([batch], False, False, False)
    assert losses.measure(nn.Linear(2, 2)) != losses.measure(nn.Linear(2, 2))
    assert "Linear has none for text (TypeError" in str(losses)


def test_a_summary_by_kind_of_weight_and_every_line_with_all(folder: Path, tmp_path: Path) -> None:
    options = [folder / "llama", "--method", "magnitude", "-o"]
    short, long = call(*options, tmp_path / "a"), call(*options, tmp_path / "b", "--all")
    down = "model.layers.*.mlp.down_proj.weight"
    (line,) = [line.split() for line in short.stdout.splitlines() if line.startswith(down)]
    layers = json.loads((tmp_path / "a" / "pruning.json").read_bytes())["layers"]
    errors = {layer["name"]: layer["error"] for layer in layers if layer["name"].endswith("down_proj.weight")}
    worst = max(errors, key=errors.__getitem__)
    assert line[1:3] == [str(len(errors)), "75.00%"]
    assert line[3:5] == [f"{sum(errors.values()) / len(errors):.2e}", f"{errors[worst]:.2e}"]
    assert line[6:] == ["in", worst]
    assert "model.layers.0.mlp.down_proj.weight 7" not in short.stdout
    for name in errors:
        assert sum(line.startswith(name) for line in long.stdout.splitlines()) == 1
    assert down not in long.stdout


@pytest.mark.slow
def test_many_refusals_are_counted(folder: Path, tmp_path: Path) -> None:
    tensors = dict(FolderTensors(folder / "llama"))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "config.json").write_bytes((folder / "llama" / "config.json").read_bytes())
    extra = {f"old\n.{i}": torch.ones(3) for i in range(9)}
    save_file(tensors | extra, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    done = call(tmp_path / "more", "-o", tmp_path / "out", "--method", "magnitude")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith("not pruned: ")]
    assert len(lines) == 5
    assert lines[-1] == "not pruned: 6 more (--all lists them)"
    assert r"old\n.0: the model has no such tensor" in done.stdout


def test_too_little_calibration_for_wanda_is_said_with_numbers(folder: Path, tmp_path: Path) -> None:
    options = [
        folder / "llama",
        "--method",
        "wanda",
        "--calibration",
        folder / "text.txt",
        "--sequence",
        "9",
        "--no-loss",
    ]
    done = call(*options, "-o", tmp_path / "few", "--samples", "4")
    assert done.exit_code == 0, done.output
    assert "warning: too little calibration: model.layers.0." in done.stderr
    assert "saw 36 tokens (14 of 14 weights fewer than 128), so its means of squares are off by 24%" in done.stderr
    done = call(*options, "-o", tmp_path / "enough", "--samples", "15")
    assert done.exit_code == 0, done.output
    assert "warning" not in done.stderr


def test_too_little_calibration_for_sparsegpt_is_one_line(folder: Path, tmp_path: Path) -> None:
    options = ["--calibration", folder / "text.txt", "--sequence", "9", "--samples", "2", "--no-loss"]
    done = call(folder / "llama", "-o", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "with fewer calibration tokens than inputs" in line
    assert "18 tokens for a Hessian" in line


# --- refusals ---


def test_help_names_every_option() -> None:
    shown = RUNNER.invoke(app, ["prune", "--help"])
    assert shown.exit_code == 0
    for option in (
        "--out", "--sparsity", "--method", "--pattern", "--match", "--exclude", "--allocation", "--calibration", "--samples",
        "--sequence", "--seed", "--dtype", "--stream", "--sparse", "--resume", "--no-loss", "--all",
    ):  # fmt: skip
        assert option in shown.output
    assert "prune" in RUNNER.invoke(app, ["--help"]).output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["no-such-folder"], 2, "'no-such-folder' does not exist"),
        (["FOLDER"], 2, "has no config.json: it is not a Hugging Face checkpoint"),
        (["LLAMA", "--out", "FOLDER"], 2, "is there already: choose another --out, or delete it"),
        (["LLAMA"], 2, "--method sparsegpt looks at inputs: give --calibration FILE (.txt or .jsonl)"),
        (["LLAMA", "--method", "wanda"], 2, "--method wanda looks at inputs"),
        (["LLAMA", "--method", "best"], 2, "Prune(method='best'): expected one of 'sparsegpt', 'wanda'"),
        (["LLAMA", "--method", "magnitude", "--sparsity", "1.0"], 2, "sparsity"),
        (["LLAMA", "--method", "magnitude", "--pattern", "4:2"], 2, "4:2"),
        (["LLAMA", "--method", "magnitude", "--pattern", "3:8", "--match", "model.layers.0.self_attn.q_proj"], 2, "model.layers.0.self_attn.q_proj.weight"),
        (["LLAMA", "--method", "wanda", "--pattern", "3:8", "--match", "model.layers.0.self_attn.q_proj", "--calibration", "TEXT", "--stream"], 2, "q_proj.weight"),
        (["LLAMA", "--method", "magnitude", "--dtype", "int8"], 2, "--dtype int8: expected auto, fp32, bf16, fp16"),
        (["LLAMA", "--method", "magnitude", "--match", "*.nothing"], 2, "serves nothing"),
        (["LLAMA", "--calibration", "no.txt"], 2, "'no.txt' does not exist"),
        (["LLAMA", "--calibration", "TEXT", "--sequence", "65"], 2, "--sequence 65: the model has 19 positions"),
        (["LLAMA", "--calibration", "NOTES"], 2, "calibration is a .txt file (one text) or a .jsonl file"),
        (["T5", "--calibration", "TEXT"], 2, "an encoder–decoder needs inputs and targets"),
        (["VIT", "--calibration", "TEXT"], 2, "the model takes pixel_values, not text"),
    ],
)  # fmt: skip
def test_what_is_refused(folder: Path, tmp_path: Path, options: list[str], code: int, message: str) -> None:
    names = {
        "FOLDER": folder, "LLAMA": folder / "llama", "T5": folder / "t5", "VIT": folder / "vit", "TEXT": folder / "text.txt",
        "NOTES": folder / "llama" / "NOTES.md",
    }  # fmt: skip
    given = [str(names.get(option, option)) for option in options]
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    done = call(*given, *out)
    assert done.exit_code == code, done.output
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1, 2]", 'line 2: expected an object such as {"text": "…"}, got list'),
        (
            '{"words": "a"}',
            "line 2: expected 'text', 'messages', 'input_ids', or 'prompt' and 'completion', found words",
        ),
        ('{"input_ids": [1, -2]}', "line 2: 'input_ids' must be a list of token ids"),
        ('{"input_ids": [1, 999]}', "token id 999, but the model's vocabulary has"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "line 2: 'messages' need a tokenizer with a chat template",
        ),
    ],
)
def test_lines_that_cannot_be_used_are_named(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "the cat sat"}\n' + line + "\n")
    done = call(folder / "llama", "--out", tmp_path / "out", "--calibration", path)
    assert done.exit_code == 2
    assert "error: bad.jsonl" in done.output
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


# --- calibration files ---


def test_a_text_is_cut_into_windows_that_the_seed_chooses(folder: Path) -> None:
    every = batches_of(folder, "text.txt", sequence=9, samples=1000)
    rows = torch.cat([batch["input_ids"] for batch in every])
    ids = small_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    assert rows.flatten().tolist() == ids[: len(ids) // 9 * 9]
    assert [len(batch["input_ids"]) for batch in every] == [8] * 5 + [4]
    assert all(bool(batch["attention_mask"].all()) for batch in every)
    chosen = [batches_of(folder, "text.txt", sequence=9, samples=5, seed=s)[0]["input_ids"] for s in (0, 1, 0)]
    assert torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[1])
    known = {tuple(row) for row in rows.tolist()}
    assert all(tuple(row) in known for row in torch.cat(chosen).tolist())
    short = batches_of(folder, "text.txt", sequence=0)[0]["input_ids"]
    assert short.shape[1] == 19  # the model's positions


def test_lines_are_padded_and_the_padding_left_out(tmp_path: Path, folder: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    lines = [
        {"text": "the cat sat"},
        {"input_ids": [7, 8, 9, 10, 11, 12]},
        {"messages": [{"role": "user", "content": "a mat"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    (batch,) = calibration_batches(path, hf.AutoConfig.from_pretrained(folder / "llama"), tokenizer, sequence=5)
    assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 0], [7, 8, 9, 10, 11], [7, 8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert "labels" not in batch


def test_targets_become_labels(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the cat", "target": "sat"}\n{"text": "a", "labels": [5, 6, 7]}\n')
    config = hf.AutoConfig.from_pretrained(folder / "t5")
    (batch,) = calibration_batches(path, config, small_tokenizer())
    assert batch["labels"].tolist() == [[1, 5, -100], [5, 6, 7]]
    path.write_text('{"text": "the cat"}\n')
    with pytest.raises(ValueError, match=r"line 1: an encoder–decoder needs 'target' \(text\) or 'labels'"):
        calibration_batches(path, config, small_tokenizer())


def test_a_model_without_a_tokenizer_takes_token_ids(folder: Path, tmp_path: Path) -> None:
    model: nn.Module = tiny.build("Llama")
    model.save_pretrained(tmp_path / "bare")  # type: ignore[operator]
    done = call(tmp_path / "bare", "--out", tmp_path / "out", "--calibration", folder / "text.txt")
    assert done.exit_code == 2
    assert "has no tokenizer" in done.output
    path = tmp_path / "ids.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in tiny.tokens(5, 9).tolist()))
    done = call(tmp_path / "bare", "--out", tmp_path / "out", "--calibration", path, "--samples", "9")
    assert done.exit_code == 0, done.output
    assert "calibration: 5 samples (of 9 asked for), 45 tokens" in done.stderr
    data = calibration_batches(path, hf.AutoConfig.from_pretrained(tmp_path / "bare"), None)
    same_as_compiled(tmp_path / "out", tmp_path / "bare", Prune(), data)


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["memory", "stream"])
def test_tensors_that_are_missing_or_not_the_model_s(folder: Path, tmp_path: Path, stream: list[str]) -> None:
    """Nothing starts at random, and what the model has no place for is named."""
    tensors = dict(FolderTensors(folder / "llama"))
    options = ["--method", "magnitude", *stream]
    for name in ("more", "fewer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((folder / "llama" / "config.json").read_bytes())
    save_file(tensors | {"old.weight": torch.ones(3)}, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    done = call(tmp_path / "more", "--out", tmp_path / "a", *options)
    assert done.exit_code == 0, done.output
    assert "not pruned: old.weight: the model has no such tensor, so it is not written" in done.stdout
    assert set(FolderTensors(tmp_path / "a")) == set(tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "fewer" / "model.safetensors", {"format": "pt"})
    done = call(tmp_path / "fewer", "--out", tmp_path / "b", *options)
    assert done.exit_code == 2
    assert "has no tensor 'model.layers.1.mlp.up_proj.weight'" in done.output
    assert not (tmp_path / "b").exists()


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    config: Any = hf.LlamaConfig(**dict[str, Any](zoo.SMALL))
    config.save_pretrained(tmp_path / "q")
    document = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(document | {"quantization_config": {"bits": 4}}))
    done = call(tmp_path / "q", "--out", tmp_path / "out", "--method", "magnitude")
    assert done.exit_code == 2
    assert "is quantised: prune the model that it was made from" in " ".join(done.output.split())


def test_the_plan_is_what_the_options_say() -> None:
    from sparsify.cli.prune import rule_of

    rule = rule_of(None, "wanda", "1:4", "*.mlp.*", ["*.0.*"], "uniform", 7)
    assert rule == Prune(sparsity=0.75, method="wanda", pattern="1:4", match="*.mlp.*", exclude=("*.0.*",), seed=7)
    assert Plan([rule]).rules == (rule,)

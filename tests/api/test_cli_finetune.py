"""`sparsify finetune`: an adapter that learned its rows, a run that was stopped and is the same run in the end, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import small_folder
import tiny
import torch
import transformers as hf
from typer.testing import CliRunner, Result

import sparsify
from sparsify import PlanError, RoSA
from sparsify.adapters import adapter as adapters
from sparsify.cli import app
from sparsify.finetune.rows import read_rows
from sparsify.finetune.run import finetune, needs_data, sparsify_train, trainer_arguments
from sparsify.plan import plan_file

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
PLAN = """
model: {model}
rules:
- {{rule: S2FT, fraction: 0.2, structure: ffn}}
- {{rule: LoRA, rank: 4, match: [q_proj, v_proj]}}
data: {{path: {data}, eval: 0.25}}
training: {{steps: 8, batch: 3, length: 32, learning_rate: 0.05, save_every: 2, log_every: 2}}
output: {output}
"""


def call(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [os.fspath(a) for a in arguments])


def refused(done: Result) -> str:
    assert done.exit_code == 2, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and train.jsonl."""
    path = tmp_path_factory.mktemp("given")
    small_folder.write_model(path / "model")
    small_folder.write_rows(path / "train.jsonl", small_folder.pairs())
    return path


def write_plan(given: Path, folder: Path) -> Path:
    path = folder / "plan.yaml"
    path.write_text(PLAN.format(model=given / "model", data=given / "train.jsonl", output=folder / "out"))
    return path


@pytest.fixture(scope="module")
def finished(given: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder with plan.yaml and out/, and what the command printed."""
    path = tmp_path_factory.mktemp("finished")
    done = call("finetune", write_plan(given, path), "--json")
    assert done.exit_code == 0, done.output
    return path, json.loads(done.stdout)


def test_the_adapter_learned_its_rows(given: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = finished
    assert printed["steps"] == 8
    assert (printed["rows"], printed["resumed_from"]) == (9, 0)
    assert [step for step, _ in printed["losses"]] == [2, 4, 6, 8]
    assert printed["losses"][-1][1] < 0.6 * printed["losses"][0][1]
    assert [step for step, _ in printed["evaluations"]] == [8]
    assert json.loads((folder / "out" / "training.json").read_text()) == printed
    found = adapters.load(folder / "out")
    assert {d.kind for d in found.deltas} == {"column", "lora"}
    assert sum(d.values.numel() + (d.a.numel() if d.a is not None else 0) for d in found.deltas) == printed["trainable"]

    base = hf.LlamaForCausalLM.from_pretrained(given / "model").eval()
    host = sparsify.load(base, folder / "out")
    rows = read_rows(given / "train.jsonl", small_folder.tokenizer(), length=32)
    ids, labels = (torch.tensor([getattr(s, f) for s in rows.samples[:1]]) for f in ("ids", "labels"))
    assert host(input_ids=ids, labels=labels).loss < 0.7 * base(input_ids=ids, labels=labels).loss


def test_the_card_says_what_was_measured(given: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = finished
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert f'base_model: "{given / "model"}"' in card
    assert f"{printed['trainable']:,} of {printed['total']:,}" in card
    (first, before), (last, after) = printed["losses"][0], printed["losses"][-1]
    assert f"| training loss | {before:.4f} (step {first}), {after:.4f} (step {last}) |" in card
    assert f"{printed['evaluations'][0][1]:.4f} (step 8)" in card
    yaml = card.partition("```yaml\n")[2].partition("```")[0]
    (folder / "from card.yaml").write_text(yaml)
    assert (
        plan_file.read(folder / "from card.yaml")
        == plan_file.read(folder / "plan.yaml")
        == plan_file.read(folder / "out" / "plan.yaml")
    )


def as_killed(finished: Path, folder: Path, last: int) -> Path:
    """A copy of a finished run as it was when checkpoint `last` was its newest, with the next one begun."""
    shutil.copytree(finished / "out", folder / "out")
    for name in ("README.md", "training.json", "adapter.json", "adapter.safetensors"):
        (folder / "out" / name).unlink()
    begun = folder / "out" / "checkpoints" / "checkpoint-8"
    assert (begun / "trainer_state.json").exists()
    for place in (folder / "out" / "checkpoints").iterdir():
        if int(place.name.rpartition("-")[2]) > last:
            (place / "trainer_state.json").unlink()  # the last file that is written
    return folder


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(
    given: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, printed = finished
    as_killed(folder, tmp_path, 6)
    text = (folder / "plan.yaml").read_text().replace(str(folder / "out"), str(tmp_path / "out"))
    (tmp_path / "plan.yaml").write_text(text)
    assert "holds an unfinished run already: go on with it (--resume" in refused(
        call("finetune", tmp_path / "plan.yaml")
    )
    other = call("finetune", tmp_path / "plan.yaml", "--resume", "--set", "training.batch=2")
    assert "began with another plan: training.batch was 3, now 2" in refused(other)
    done = call(
        "finetune",
        tmp_path / "plan.yaml",
        "--resume",
        "--json",
        "--set",
        "training.log_every=2",
        "--set",
        "output.keep=9",
    )
    assert done.exit_code == 0, done.output
    assert "checkpoint-8 is not complete and is passed over" in done.stderr
    again = json.loads(done.stdout)
    assert again["resumed_from"] == 6
    assert again["losses"] == printed["losses"]
    first, second = adapters.load(folder / "out"), adapters.load(tmp_path / "out")
    for a, b in zip(first.deltas, second.deltas, strict=True):
        assert a.param == b.param
        assert torch.equal(a.values, b.values)


def launched(launcher: str, plan: Path, words: list[str], folder: Path) -> list[tuple[int, str]]:
    """Exit codes and errors of two processes that learn together: as torchrun sets them up, or started by a launcher itself."""
    script = ["-m", "sparsify.cli", "finetune", str(plan), *words]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    if launcher == "accelerate launch":
        shared["ACCELERATE_USE_CPU"] = "true"
    if launcher != "by hand":
        binary = str(Path(sys.executable).parent / launcher.split()[0])
        options = {
            "torchrun": ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port],
            # without MPI `--cpu` starts one process, whatever number it is given; `--multi_gpu` starts them as torchrun does
            "accelerate launch": ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                                  "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", port],
        }[launcher]  # fmt: skip
        repository = str(Path(sparsify.__file__).parents[1])
        path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [binary, *options, *script],
            cwd=folder,
            env={**shared, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=900,
        )
        return [(done.returncode, done.stderr)]
    started = []
    for rank in range(2):
        files = [str(folder / f"{stream} {rank}") for stream in ("out", "err")]
        own = {**shared, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(processes.start(processes.as_main, script, own, str(folder), *files))
    for process in started:
        process.join(600)
        process.kill()
    return [(process.exitcode, (folder / f"err {rank}").read_text()) for rank, process in enumerate(started)]


@pytest.mark.slow  # the command alone is what the default run sees, and `test_ddp.py` a host under DDP
@pytest.mark.parametrize("launcher", ["by hand", "torchrun", "accelerate launch"])
def test_two_processes_learn_what_one_does_with_their_rows(launcher: str, given: Path, tmp_path: Path) -> None:
    """DDP; the first process writes and speaks."""
    places = [tmp_path / name for name in ("two", "one")]
    for place in places:
        place.mkdir()
    plan = write_plan(given, places[0])
    small = ["--set", "training.steps=2", "--set", "training.batch=2", "--set", "training.accumulate=1"]
    ended = launched(launcher, plan, small, tmp_path)
    assert [code for code, _ in ended] == [0] * len(ended), ended
    if launcher == "by hand":
        assert ["step" in text for _, text in ended] == [True, False]
    done = call("finetune", write_plan(given, places[1]), "--set", "training.steps=2", "--set", "training.batch=4")
    assert done.exit_code == 0, done.output
    two, one = (adapters.load(place / "out") for place in places)
    for a, b in zip(two.deltas, one.deltas, strict=True):
        assert a.param == b.param
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-3)


def test_an_interrupt_says_how_to_go_on(given: Path, tmp_path: Path) -> None:
    class Interrupt(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    file = plan_file.read(write_plan(given, tmp_path), ["training.steps=4", "training.log_every=10"])
    model = hf.LlamaForCausalLM.from_pretrained(given / "model")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        finetune(model, small_folder.tokenizer(), file, callbacks=[Interrupt()])
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]
    outcome = finetune(model, small_folder.tokenizer(), file, resume=True)
    assert (outcome.resumed_from, outcome.steps) == (2, 4)
    assert [step for step, _ in outcome.losses] == [
        4
    ]  # fewer steps than between two losses: the last is said all the same
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(given: Path, tmp_path: Path) -> None:
    plan = write_plan(given, tmp_path)
    done = call("finetune", plan, "--dry-run", "--json", "--set", "training.steps=null", "--set", "training.epochs=2")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["rows"], found["held_out"], found["steps"]) == (9, 3, 6)
    assert "9 rows of prompt-completion" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("model=nowhere", "'nowhere' does not exist"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl: not there"),
        ("rules.0.fraction=7", "rules.0: S2FT"),
        ("data.format=messages", "has no 'messages'"),
    ],
)
def test_what_cannot_be_used_ends_before_any_work(given: Path, tmp_path: Path, change: str, word: str) -> None:
    assert word in refused(call("finetune", write_plan(given, tmp_path), "--set", change))
    assert not (tmp_path / "out").exists()


def test_models_that_write_no_text_and_folders_in_use_are_refused(given: Path, tmp_path: Path) -> None:
    hf.BertModel(
        hf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path / "bert")
    plan = write_plan(given, tmp_path)
    assert "BertModel does not write text" in refused(call("finetune", plan, "--set", f"model={tmp_path / 'bert'}"))
    shutil.copytree(given / "model", tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()
    assert "has no tokenizer" in refused(call("finetune", plan, "--set", f"model={tmp_path / 'mute'}"))
    assert "holds files already" in refused(call("finetune", plan, "--set", f"output={given}"))
    assert "holds no run" in refused(call("finetune", plan, "--resume"))


def test_rules_that_choose_by_data_get_rows() -> None:
    from sparsify import S2FT, LoRA, PaCA, Plan, RoSA

    looks = [S2FT(0.1, select="activation"), PaCA(4, select="gradient"), RoSA(4), RoSA(4, mask="fisher")]
    blind = [S2FT(0.1), PaCA(4), RoSA(4, mask="magnitude"), RoSA(4, density=0.0), LoRA(4)]
    assert [needs_data(Plan([rule])) for rule in looks] == [True] * 4
    assert [needs_data(Plan([rule])) for rule in blind] == [False] * 5


def test_sparse_values_and_low_rank_factors_have_rates_of_their_own(given: Path, tmp_path: Path) -> None:
    plan = write_plan(given, tmp_path)
    rates = [
        "training.learning_rate=0.001",
        "training.sparse_learning_rate=0.0002",
        "training.lora_learning_rate=0.0007",
    ]
    file = plan_file.read(plan, [*rates, "training.weight_decay=0.1"])
    host = tiny.lower(tiny.llama(), RoSA(rank=2, density=0.05, mask="random", match="*.q_proj"), train=["model.norm"])
    trainer = hf.Trainer(model=host, args=trainer_arguments(file))
    sparsify_train(trainer, file.training)
    trainer.create_optimizer()
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert found == {"sparse": (0.0002, 0.0), "lora": (0.0007, 0.1), "rest": (0.001, 0.1)}
    with pytest.raises(PlanError, match=r"training.lora_learning_rate.*above 0"):
        plan_file.read(plan, ["training.lora_learning_rate=0"])


# --- packing and streaming ---


def test_packed_streams_resume_as_if_they_had_not_been_stopped(given: Path, tmp_path: Path) -> None:
    """Twelve rows in a window of which several passes are made, so that what resumes must find its place in another pass."""
    changes = ["training.steps=5", "training.batch=1", "training.length=20", "data.eval=null"]
    for name, stop in (("whole", 9), ("stopped", 3)):

        class Interrupt(hf.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, at: int = stop, **_: Any) -> None:
                if state.global_step == at:
                    raise KeyboardInterrupt

        flags = [*changes, "training.packing=true", "data.streaming=true", f"output={tmp_path / name}"]
        file = plan_file.read(write_plan(given, tmp_path), flags)
        model = hf.LlamaForCausalLM.from_pretrained(given / "model")
        try:
            outcome = finetune(model, small_folder.tokenizer(), file, callbacks=[Interrupt()])
        except KeyboardInterrupt:
            outcome = finetune(model, small_folder.tokenizer(), file, resume=True)
            assert outcome.resumed_from == 2
        assert outcome.rows >= 5 * 2, "several rows in each"
    whole, stopped = (adapters.load(tmp_path / name) for name in ("whole", "stopped"))
    for a, b in zip(whole.deltas, stopped.deltas, strict=True):
        assert torch.equal(a.values, b.values)


def test_the_shell_says_what_would_be_packed_or_streamed(given: Path, tmp_path: Path) -> None:
    plan = write_plan(given, tmp_path)
    free = ("--dry-run", "--json", "--set", "training.steps=null", "--set", "data.eval=null")
    alone = json.loads(call("finetune", plan, *free).stdout)
    packed = json.loads(call("finetune", plan, *free, "--packing").stdout)
    assert packed["plan"]["training"]["packing"] is True
    assert (alone["rows"], alone["learned_tokens"]) == (packed["rows"], packed["learned_tokens"])
    assert packed["steps"] < alone["steps"]
    assert "number of steps is needed" in refused(call("finetune", plan, *free, "--streaming"))
    assert "the path of other rows" in refused(call("finetune", plan, "--streaming", "--dry-run"))
    stream = call("finetune", plan, "--streaming", "--dry-run", "--json", "--set", "data.eval=null")
    found = json.loads(stream.stdout)
    assert (found["rows"], found["steps"]) == (None, 8)
    assert "read while training" in stream.stderr
    assert "it is training.packing here" in refused(call("finetune", plan, "--set", "sample_packing=true"))

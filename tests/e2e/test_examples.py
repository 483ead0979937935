"""Every example runs as a script, as a reader would start it: one of them in a fresh interpreter, all of them so with -m slow."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import processes
import pytest

from sparsify.demo.pretrained import why_missing

EXAMPLES = Path(__file__).parents[2] / "examples"

#: script → (arguments, what its output must contain)
SCRIPTS: dict[str, tuple[list[str], list[str]]] = {
    "s2ft_minilm.py": (
        ["--fast", "--out", "{tmp}"],
        ["sparsify report: BertModel", "trainable%: 0.79", "step 5: loss"],
    ),
    "tiny_decoder.py": (["--fast"], ["trained on code: loss", "adapter on:", "off is the base again"]),
    "trainer.py": (["--fast", "--out", "{tmp}"], ["before:", "after:", "saved and read back as a plain model"]),
    "chat_trl.py": (["--fast", "--out", "{tmp}"], ["adapter: ", "before: ", "after: "]),
    "inspect_graph.py": (["llama", "--svg", "{tmp}/graph.svg"], ["found      2 attention, 2 ffn", "» %", "drawn in"]),
    "serve_mixed_batch.py": (
        [],
        [
            "threes    [3, 3, 3, 3, 3]",
            "fours     [4, 4, 4, 4, 4]",
            "fives     [5, 5, 5, 5, 5]",
            "refused: no adapter is called 'sixes'; ",
            "slots 2 of 2 live, 0 held",
        ],
    ),
    "write_a_pass.py": (
        [],
        [
            "prove-units → prune → select → budget → permute-weights",
            "budget: 3 of 6 structures dropped",
            "the budget of 400 trained parameters is spent on later layers",
            "360 parameters train, the budget is 400",
            "the outputs are the model's: True",
            "in pass 'careless' (5/8): output 0 drifted by ",
        ],
    ),
    "prune_and_distil.py": (
        ["--fast", "--out", "{tmp}"],
        [
            "prune: 36 weights, 75.0% zeros",
            "after pruning:",
            "after 8 steps: cosine",
            "times smaller",
            "same embeddings: True",
        ],
    ),
    "deploy.py": (
        ["--fast", "--out", "{tmp}"],
        ["packaged:", "the base's package equals the host", "adapter exchanged"],
    ),
    "write_a_format.py": (
        [],
        [
            "4 weights packed: 30.0 KiB → 5.0 KiB (0.up.weight: mxfp4",
            "saved and loaded: True",
            "unmerged: True",
            "without the adapter, the packed base again: True",
        ],
    ),
    "write_a_method.py": ([], ["2.weight: DoRA (rank 4, scale 2)", "restored: the base, bit for bit: True"]),
    "serve_adapters.py": (
        ["--fast", "--out", "{tmp}"],
        ["mean shift", "merged into plain", "restored, bit for bit: True"],
    ),
}


def run(script: str, *arguments: str, fresh: bool = False) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(EXAMPLES / script), *arguments]
    if fresh:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, env=environment)
    else:
        done = processes.run_python(*command, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_tested() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(SCRIPTS) | {
        "ray_train.py",
        "ray_serve.py",
    }  # which test_ray.py starts


def check(script: str, folder: Path, fresh: bool) -> None:
    if script == "chat_trl.py" and why_missing():
        pytest.skip(why_missing())
    arguments, expected = SCRIPTS[script]
    output = run(script, *(a.replace("{tmp}", str(folder)) for a in arguments), fresh=fresh)
    for text in expected:
        assert text in output, output


#: long ones → where the default run does the same: prune, distil, save and read back in tests/e2e/test_demo.py and
#: tests/api/test_sparse_checkpoint.py; Trainer in tests/api/test_trainer.py; a decoder that generates with an adapter in
#: tests/property/test_equivalence.py; TRL in tests/e2e/test_trl.py. Their imports and options are still read here.
LONG = ("prune_and_distil.py", "trainer.py", "tiny_decoder.py", "chat_trl.py")
READ = (*LONG, "deploy.py", "s2ft_minilm.py")  # the last two are long too: tests/README.md


@pytest.mark.parametrize("script", [s if s not in LONG else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS])
def test_example(script: str, tmp_path: Path) -> None:
    check(script, tmp_path, fresh=False)


@pytest.mark.parametrize("script", READ)
def test_a_long_example_is_read_to_its_options(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has loaded what they import: they end before they do anything."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert not ended.value.code
    assert "--fast" in capsys.readouterr().out


# the others differ from this one in what they import, and `test_example` runs them to the end
FRESH = [s if s == "serve_adapters.py" else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS]


@pytest.mark.parametrize("script", FRESH)
def test_example_in_a_fresh_interpreter(script: str, tmp_path: Path) -> None:
    check(script, tmp_path, fresh=True)


# Conv1D, pictures, declined heads; bert and qwen3 take the way of the llama in `test_example`
@pytest.mark.parametrize(
    "family", ["gpt2", "vit", "bloom", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "qwen3"))]
)
def test_inspect_other_families(family: str, tmp_path: Path) -> None:
    target = tmp_path / "graph.svg"
    assert "drawn in" in run("inspect_graph.py", family, "--svg", str(target), "--text", str(tmp_path / "graph.txt"))
    ET.fromstring(target.read_text())
    assert "graph(" in (tmp_path / "graph.txt").read_text()


def test_inspect_config_file_on_meta(tmp_path: Path) -> None:
    """A config of another model, deep, without any memory for weights."""
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "mistral", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, '
        '"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1000}'
    )
    text = tmp_path / "graph.txt"
    output = run("inspect_graph.py", str(tmp_path), "--meta", "--svg", str(tmp_path / "graph.svg"), "--text", str(text))
    assert "ffn model.layers.7.mlp: 1536 channels" in output
    assert "  ffn model.layers.{0…7}.mlp: 1536 channels" in text.read_text()

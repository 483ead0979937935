"""The benchmarks run, and count what they say they count. Times are not tested."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.benchmarks, pytest.mark.slow]  # `test_benchmark_scripts` is the smoke test of the default run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    bf16_products,
    compile_time,
    cpu_decode,
    cpu_linear,
    harness,
    layouts,
    packed_reads,
    skinny_products,
    train_step,
)
from benchmarks.peer import Peer, named_environments, resident  # noqa: E402
from benchmarks.peers import decoder_loop  # noqa: E402
from benchmarks.random_decoder import Decoder, block_tensors, quantize_rows, random_tensor  # noqa: E402
from sparsify.kernels.cpu import dispatch  # noqa: E402
from sparsify.kernels.cpu.build import load_kernels  # noqa: E402
from sparsify.kernels.cpu.codegen import Variant, generate  # noqa: E402

TINY = train_step.Case(train_step.PRESETS["tiny"], torch.float32, "cpu")


# --- harness ----------------------------------------------------------------------------------------------------------


def test_saved_bytes_count_a_storage_once_in_full_and_no_parameters():
    x = torch.randn(10, 6)
    w = torch.randn(4, 6, requires_grad=True)
    with harness.saved_for_backward([w]) as saved:
        y = torch.nn.functional.linear(x, w)  # saves x for dW
        z = torch.nn.functional.linear(x[:, :], w)  # the same storage again
    assert saved.bytes == x.untyped_storage().nbytes() == 240
    with harness.saved_for_backward([w]) as saved:
        view = (x[:, 2:3] * w[:, 2].sum()).sum()  # one column, as a view: all of x stays alive
    assert 240 <= saved.bytes < 240 + 8  # and at most a scalar
    assert torch.isfinite(y.sum() + z.sum() + view)


def test_saved_bytes_of_a_frozen_linear_are_zero():
    linear = torch.nn.Linear(6, 4).requires_grad_(False)
    x = torch.randn(10, 6, requires_grad=True)
    with harness.saved_for_backward(linear.parameters()) as saved:
        y = linear(x)
    assert saved.bytes == 0
    assert y.requires_grad


def test_allocations_on_cpu_are_exact():
    kilo = torch.zeros(256)
    with harness.allocations("cpu") as seen:
        a = torch.ones(256)  # 1024 B
        b = a + kilo  # 2048 B live
        del a
        c = torch.ones(128)  # 1536 B live
    assert seen.peak == 2048
    assert seen.end == 1536
    assert float(b.sum() + c.sum()) == 256 * 1 + 128


def test_interleave_calls_in_turn_and_pairs_rounds():
    calls = []
    times = harness.interleave({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {len(t.samples) for t in times.values()} == {3}
    slow, quick = harness.Timing((2.0, 8.0, 4.0)), harness.Timing((1.0, 2.0, 4.0))
    assert slow.over(quick) == harness.Ratio(median=2.0, minimum=2.0, paired=2.0)


@pytest.mark.parametrize(("at_least", "verdict"), [(False, "MISSED"), (True, "met")])
def test_a_bar_says_which_side_it_is_on(at_least, verdict):
    bar = harness.Bar("time", 1.2, 1.1, at_least)
    assert bar.verdict == verdict
    assert ("≥" in str(bar)) is at_least
    assert str(bar).startswith(verdict)


def test_a_bar_is_undecided_where_the_estimates_part():
    ratio = harness.Ratio(median=0.95, minimum=1.07, paired=1.04)
    assert harness.Bar.of("time", ratio, 1.05).verdict == "undecided"
    assert harness.Bar.of("time", ratio, 1.10).verdict == "met"
    assert harness.Bar.of("time", ratio, 0.90).verdict == "MISSED"


def test_table_has_a_cell_for_each_column_and_ends_in_json(tmp_path, capsys):
    arguments = harness.parser("x").parse_args(["--save", str(tmp_path), "--label", "here"])
    harness.report("demo", arguments, [{"a": 1, "b": 2.0}, {"a": 12345}], bars=[harness.Bar("n", 1, 2)])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].split() == ["|", "a", "|", "b", "|"]
    assert lines[3].split() == ["|", "12,345", "|", "|"]
    record = json.loads(lines[-1])
    assert record["machine"]["cpu"]
    assert record["versions"]["torch"] == torch.__version__
    (saved,) = tmp_path.iterdir()
    assert saved.name == f"demo-here-{record['date']}.json"
    assert json.loads(saved.read_text()) == record


@pytest.mark.parametrize("script", [layouts, train_step, compile_time, skinny_products], ids=lambda m: m.__name__)
def test_every_script_has_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    assert "--fast" in capsys.readouterr().out


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_all_layouts_compute_the_same_step(axis):
    case = layouts.Case(n=24, m=20, axis=axis, width=6, tokens=9, dtype=torch.float32, device="cpu")
    outputs = {name: [step() for _ in range(4)] for name, step in layouts.steps(case).items()}
    moved = (outputs["refresh"][-1] - outputs["refresh"][0]).abs().max()
    assert moved > 1e-4  # three steps of AdamW have changed something
    for name in ("alias", "refresh_fn", "split", "delta"):
        for ours, theirs in zip(outputs["refresh"], outputs[name], strict=True):
            torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(outputs["floor"][0], outputs["floor"][-1])


def test_layouts_runs(capsys):
    record = layouts.main(["--fast", "--dtypes", "fp32"])
    assert len(record["rows"]) == 2
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == record


# --- train_step -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory():
    """Method → (trainee, bytes) on the tiny Llama."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    found = {}
    for name, build in train_step.METHODS.items():
        trainee = build(TINY)
        found[name] = trainee, train_step.measure_memory(trainee, "cpu")
    return found


def test_s2ft_saves_the_floor_and_its_slices_to_the_byte(memory):
    trainee, ours = memory["s2ft"]
    columns = sum(s.length for s in trainee.model.sparsify.program.slices)
    tokens = TINY.shape.batch * TINY.shape.sequence
    assert ours.saved - memory["floor_cut"][1].saved == 4 * tokens * columns
    assert ours.saved < memory["floor"][1].saved


def test_peers_save_more_than_s2ft(memory):
    ours = memory["s2ft"][1].saved
    assert ours < memory["miss"][1].saved < memory["lora"][1].saved < memory["full"][1].saved


def test_floors_train_nothing_and_end_where_they_say(memory):
    for name in ("floor", "floor_cut"):
        trainee, _ = memory[name]
        assert trainee.trainable() == 0
        trainee.loss().backward()
        (leaf,) = trainee.leaves
        assert leaf.grad is not None
        assert all(p.grad is None for p in trainee.model.parameters())
        trainee.finish()
        assert leaf.grad is None
    assert memory["floor_cut"][1].saved < memory["floor"][1].saved


def test_trainable_sizes_are_near_each_other():
    # at the size that is measured; on the tiny one a head is a large share
    case = train_step.Case(train_step.PRESETS["small"], torch.float32, "cpu")
    lora = case.lora_parameters()
    miss = case.miss_rank() * sum(n for _, n in case.linears().values())
    assert abs(miss / lora - 1) < 0.12
    consumers = 1024 * 1024 + 2816 * 1024
    assert case.s2ft_fraction() * consumers == pytest.approx(lora)


def test_a_method_that_fails_is_named_with_its_reason(monkeypatch, capsys):
    def broken(case):
        raise NotImplementedError("no such thing")

    monkeypatch.setitem(train_step.METHODS, "broken", broken)
    record = train_step.main(["--fast", "--methods", "floor_cut", "broken"])
    assert [row["method"] for row in record["rows"]] == ["floor_cut"]
    assert "broken failed: NotImplementedError: no such thing" in record["notes"]


# --- peers, and decoders on a CPU -------------------------------------------------------------------------------------

COMPILER = pytest.mark.skipif(shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler")


def test_a_random_weight_depends_on_its_name_only_and_has_the_zeros_asked_for():
    name, size = "model.layers.3.mlp.up_proj.weight", (300, 701)
    weight = random_tensor(name, size, 0.75)
    assert np.array_equal(weight, random_tensor(name, size, 0.75))
    assert not np.array_equal(weight, random_tensor(name.replace("3", "4"), size, 0.75))
    assert (weight == 0).mean() == pytest.approx(0.75, abs=0.01)
    assert not np.signbit(weight[weight == 0]).any()
    assert np.abs(weight).max() == pytest.approx(0.03, rel=0.01)
    assert weight[weight != 0].mean() == pytest.approx(0, abs=0.001)
    assert (random_tensor("lm_head.weight", size, 0.75) == 0).mean() < 0.001
    assert random_tensor("model.norm.weight", (50,), 0.75).min() >= 0.9


def test_repeated_blocks_have_the_weights_of_the_first_ones():
    decoder = Decoder("llama-tiny", 4, 0.75, 2)
    (name, size), *_ = block_tensors(decoder.shape, 3)
    assert name.startswith("model.layers.3.")
    assert np.array_equal(decoder.tensor(name, size), random_tensor(name.replace("3", "1"), size, 0.75))
    assert decoder.block_weights() == 4 * sum(int(np.prod(size)) for _, size in block_tensors(decoder.shape, 0))


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 16), (8, 16)])
def test_quantised_rows_are_within_half_a_step(bits, group):
    weight = random_tensor("model.layers.0.x.weight", (37, 64), 0.5)
    codes, scales = quantize_rows(weight, bits, group)
    assert scales.shape == (37, 64 // (group or 64))
    assert np.abs(codes).max() == 2 ** (bits - 1) - 1
    steps = np.repeat(scales, group or 64, 1)
    assert (np.abs(codes * steps - weight) <= steps * 0.5001).all()


def test_a_peer_answers_in_json_and_is_stopped_between_its_answers(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, sys\nprint('noise')\nprint(json.dumps({'version': sys.argv[1]}), flush=True)\n"
        "for line in sys.stdin: print(json.dumps({'twice': 2 * json.loads(line)['n']}), flush=True)\n"
    )
    peer = Peer("doubler", sys.executable, str(script), "1.5")
    assert peer.version == "1.5"
    assert peer.ask(n=21) == {"twice": 42}
    status = Path(f"/proc/{peer.process.pid}/status").read_text()
    assert "stopped" in status.split("State:")[1].splitlines()[0]
    assert 0 < peer.resident()["resident_MiB"] <= peer.resident()["peak_MiB"]
    assert peer.ask(n=4) == {"twice": 8}
    peer.close()
    assert peer.process.returncode is not None


def test_a_peer_that_dies_is_quoted(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text("raise OSError('no such engine')")
    with pytest.raises(RuntimeError, match=r"(?s)doubler ended without an answer.*no such engine"):
        Peer("doubler", sys.executable, str(script))


def test_environments_are_named():
    assert named_environments(["a=/x", "b=/y/bin/python"]) == {"a": "/x", "b": "/y/bin/python"}
    with pytest.raises(ValueError, match="--peer a: expected NAME=ENVIRONMENT"):
        named_environments(["a"])


def test_an_engine_decodes_what_it_said_itself_and_the_prompt_is_not_timed():
    fed = []

    class Counter:
        def reset(self):
            fed.clear()

        def feed(self, ids):
            fed.append(list(ids))
            time.sleep(0.05 if len(ids) > 1 else 0.002)

        def next(self):
            return len(fed)

        def logits(self):
            return np.zeros(3)

    seconds = decoder_loop.seconds_per_token(Counter(), [7, 8, 9], 4)
    assert fed == [[7, 8, 9], [1], [2], [3], [4]]
    assert 0.002 <= seconds < 0.02


@COMPILER
@pytest.mark.parametrize("variant", ["dense", "int8", "packed-bf16", "aten-int4"])
def test_a_decoder_by_block_is_the_whole_one(variant):
    pytest.importorskip("transformers")
    decoder, ids = Decoder("llama-tiny", 3, 0.75, 2), torch.arange(12)[None]
    with torch.inference_mode():
        whole = cpu_decode.whole_decoder(decoder, variant, (1, 16), 8)
        parts = cpu_decode.decoder_by_block(decoder, variant, (1, 16), 8)
        expected, found = whole(ids).logits.float(), parts(ids).logits.float()
        assert type(parts.lm_head) is type(whole.lm_head)
        assert not any(p.is_meta for p in parts.parameters())
        tokens = {
            model: model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (whole, parts)
        }
    # fused kernels may be chosen differently: activations in int8 differ by their rounding then
    assert float((found - expected).norm() / expected.norm()) < {"dense": 1e-5}.get(variant, 0.02)
    if variant == "dense":
        assert torch.equal(tokens[whole], tokens[parts])


@COMPILER
def test_cpu_decode_compares_models_that_agree(monkeypatch, capsys):
    pytest.importorskip("transformers")
    arguments = "--model llama-tiny --variants dense fp32 int8 aten-int8 --rounds 1 --new 2 --by-block --threads 1"
    monkeypatch.setattr(sys, "argv", ["cpu_decode.py", *arguments.split()])
    # what is packed must not hang on what this machine measures while other tests run
    monkeypatch.setattr(cpu_decode, "CpuOptions", functools.partial(cpu_decode.CpuOptions, mode="small"))
    cpu_decode.main()
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["variant"] for row in record["results"]] == ["dense", "fp32", "int8", "aten-int8"]
    assert all(row["per_second"] > 0 and row["cosine"] > 0.999 for row in record["results"])
    sizes = [row["memory"]["MiB"] for row in record["results"]]
    assert sizes[2] < sizes[1] < sizes[0]
    assert record["process"]["peak_MiB"] >= resident()["resident_MiB"] * 0.5


def test_cpu_decode_refuses_what_does_not_fit(monkeypatch):
    decoder = Decoder("llama-7b", 32, 0.75, 32)
    assert decoder.block_weights() == pytest.approx(6.48e9, rel=0.01)
    monkeypatch.setattr(cpu_decode, "free_bytes", lambda: 20 << 30)
    assert "--by-block" in str(cpu_decode.check_memory(["int8"], decoder, by_block=False))
    assert cpu_decode.check_memory(["int8"], decoder, by_block=True) is None
    assert "fewer contestants" in str(cpu_decode.check_memory(["int8", "dense"], decoder, by_block=True))


@pytest.mark.parametrize(("script", "arguments", "text"), [
    (cpu_linear, "--peer mkl=/x", "mkl is none of deepsparse"),
    (cpu_decode, "--peer deepsparse=/x", "deepsparse is none of openvino, llamacpp, openvino-int8"),
    (cpu_decode, "--model minilm --peer openvino=/x", "peers decode one sequence"),
    (cpu_decode, "--model llama-tiny --linears --peer llamacpp=/x", "beside openvino only"),
])  # fmt: skip
def test_a_peer_that_cannot_serve_is_refused(script, arguments, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments.split()])
    with pytest.raises(SystemExit):
        script.main()
    assert text in capsys.readouterr().err


# --- the others -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler")
def test_skinny_products_times_both_ways_and_refuses_wrong_numbers(monkeypatch):
    (row,) = skinny_products.main(["--fast"])["rows"]
    assert all(row[f"{name} / gemm"] > 0 for name in ("low", "product", "both", "update"))
    monkeypatch.setattr(skinny_products, "update_by_kernel", lambda y, low, rows: None)
    with pytest.raises(AssertionError):
        skinny_products.main(["--fast"])


def test_compile_time_runs_and_accounts_for_the_total():
    pytest.importorskip("transformers")
    record = compile_time.main(["--fast"])
    assert [row["layers"] for row in record["rows"]] == [1, 2]
    for row in record["rows"]:
        stages = [v for k, v in row.items() if k.endswith(" s") and k not in ("total s", "total min s")]
        assert sum(stages) == pytest.approx(row["total s"])
        assert {"capture s", "find-structures s", "permute-weights s", "install s"} <= set(row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_says_that_there_is_no_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_script_goes_on_after_a_failing_step(tmp_path):
    """A stand-in for Python with a GPU: `layouts.py` fails and no test is found, everything else passes."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\ncase "$*" in "-m pytest"*) exit 5;; *layouts.py*) exit 3;; esac\nexit 0\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "FAILED (exit 3)" in summary
    assert "FAILED (exit 5)" in summary
    assert summary.count("FAILED") == 2
    assert summary.count("passed") >= 4


def test_gpu_script_fits_in_ten_minutes():
    lines = (ROOT / "benchmarks" / "gpu.sh").read_text().split('STEPS="')[1].split('"\n')[0].strip().splitlines()
    assert sum(int(line.split("|")[1]) for line in lines) < 600


def test_packed_reads_compares_equal_products_and_refuses_wrong_numbers(monkeypatch):
    if dispatch.best_isa() not in ("avx512bf16", "avx512vbmi2"):
        with pytest.raises(SystemExit, match="AVX-512 with VBMI2"):
            packed_reads.main(["--fast"])
        return
    rows = packed_reads.main(["--fast"])["rows"]
    assert [(row["values"], row["kernel"]) for row in rows] == [("s8", "lookup"), ("s8", "vnni")]
    assert all(row["chained cold ms"] > 0 for row in rows)
    variant = Variant(isa=dispatch.best_isa(), value="s8")
    before, source = packed_reads.chained(variant), generate(variant)
    assert before.library._name != load_kernels(variant).library._name  # other source, other library
    assert "fresh_zero()," in source
    monkeypatch.setattr(packed_reads, "in_small_pages", torch.zeros_like)
    with pytest.raises(AssertionError, match="relative error"):
        packed_reads.main(["--fast"])


def test_bf16_products_times_every_kernel_and_refuses_wrong_numbers(monkeypatch):
    if dispatch.best_isa() != "avx512bf16":
        with pytest.raises(SystemExit, match="need avx512bf16"):
            bf16_products.main(["--fast"])
        return
    (row,) = bf16_products.main(["--fast"])["rows"]
    assert all(row[f"torch / {kernel}"] > 0 for kernel in bf16_products.KERNELS)
    monkeypatch.setattr(bf16_products, "prepacked_product", lambda x, blocked, bias: x.new_zeros(len(x), len(bias)))
    with pytest.raises(AssertionError, match="onednn: relative error"):
        bf16_products.main(["--fast"])

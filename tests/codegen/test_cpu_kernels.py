"""Generation, build cache, dispatch and lowering of the CPU kernels; a sanitizer run of the generated source (slow)."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import subprocess
import threading
from pathlib import Path

import processes
import pytest
import torch
from torch import nn

from sparsify.errors import RefusedError, SparsifyError
from sparsify.kernels.cpu import build, codegen, dispatch, tune
from sparsify.kernels.cpu.codegen import ISAS, Variant, generate
from sparsify.kernels.cpu.formats import pack, pack_int8, quantize_int8
from sparsify.lowering.cpu.lower import SparseLinear, lower_model

TRIVIAL = 'extern "C" int answer() { return 42; }\n'


def needs_compiler() -> None:
    try:
        build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", ["f32", "f16", "bf16", "s8"])
def test_source_is_deterministic_and_whole(isa: codegen.Isa, value: str) -> None:
    variant = Variant(isa=isa, value=value)
    generate.cache_clear()
    first = generate(variant)
    generate.cache_clear()
    assert generate(variant) == first
    assert "{{" not in first
    assert "{%" not in first
    assert f"isa={isa}, values={value}" in first
    for name in variant.kernels:
        assert f"int sparsify_{name}(" in first
    byte_expand = isa in ("avx512bf16", "avx512vbmi2")
    assert ("sparsify_vnni" in first) == ((byte_expand or isa == "avx512vnni") and value == "s8")
    assert ("sparsify_bytes" in first) == ("_mm256_maddubs_epi16" in first) == (isa == "avx2" and value == "s8")
    assert ("sparsify_lookup" in first) == ("_mm512_mask_compress_epi8" in first) == byte_expand
    assert ("sparsify_dot" in first) == ("_mm512_dpbf16_ps" in first) == (isa == "avx512bf16" and value == "bf16")
    assert ("sparsify_pairs" in first) == ("sparsify_dot" in first)
    assert ("_mm512" in first) == isa.startswith("avx512")
    assert ("immintrin" in first) == (isa != "portable")


def test_unknown_variants_are_named() -> None:
    with pytest.raises(ValueError, match="unknown instruction set 'sse'"):
        Variant(isa="sse", value="f32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown value type 'f64'"):
        Variant(isa="avx2", value="f64")


def test_cache_is_keyed_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    first = build.compile_library(TRIVIAL, ())
    stamp = first.stat().st_mtime_ns
    assert build.compile_library(TRIVIAL, ()) == first
    assert first.stat().st_mtime_ns == stamp
    assert build.compile_library(TRIVIAL.replace("42", "43"), ()) != first
    assert build.compile_library(TRIVIAL, ("-DX",)) != first
    assert sorted(p.suffix for p in (tmp_path / "kernels").iterdir()) == [".so"] * 3


def build_in_process(directory: str, source: str) -> str:
    import os

    os.environ["SPARSIFY_CACHE"] = directory
    return str(build.compile_library(source, ()))


def test_processes_may_build_at_once(tmp_path: Path) -> None:
    needs_compiler()
    with processes.CONTEXT.Pool(3) as pool:
        paths = pool.starmap(build_in_process, [(str(tmp_path), TRIVIAL)] * 3)
    assert len(set(paths)) == 1
    assert [p.name for p in (tmp_path / "kernels").iterdir()] == [Path(paths[0]).name]


def test_a_failing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    with pytest.raises(build.BuildError, match="failed with status"):
        build.compile_library("this is not C++\n", ())
    assert list((tmp_path / "kernels").iterdir()) == []


def without_compiler(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(cache))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "loaded", {})


def sparse_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 200), nn.ReLU(), nn.Linear(200, 40, bias=False)).eval()
    with torch.no_grad():
        for module in (model[0], model[2]):
            assert isinstance(module, nn.Linear)
            module.weight.mul_(torch.rand_like(module.weight) < 0.25)
    return model


def test_without_a_compiler_the_model_stays_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch, tmp_path)
    model = sparse_model()
    report = lower_model(model, mode="small", tokens=(1,))
    assert report.lowered == ()
    assert len(report.refusals) == 2
    assert "no C++ compiler found (tried no-such-compiler)" in str(report)
    assert type(model[0]) is nn.Linear
    with pytest.raises(RefusedError, match="no C"):
        lower_model(model, names=["0"], tokens=(1,))


def test_a_layer_that_lost_its_compiler_still_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch, tmp_path)
    model = sparse_model()
    first = model[0]
    assert isinstance(first, nn.Linear)
    layer = SparseLinear(pack(first.weight), first.bias)
    x = torch.randn(5, 96)
    torch.testing.assert_close(layer(x), first(x))


def test_isa_can_be_narrowed_but_not_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for named, expected in (("portable", "portable"), ("sse9", None)):
            monkeypatch.setenv("SPARSIFY_ISA", named)
            dispatch.best_isa.cache_clear()
            if expected:
                assert dispatch.best_isa() == expected
            else:
                with pytest.raises(SparsifyError, match="this CPU runs"):
                    dispatch.best_isa()
    finally:
        dispatch.best_isa.cache_clear()


def test_cost_model_prefers_what_the_formats_are_for() -> None:
    torch.manual_seed(0)
    packed = pack(torch.randn(512, 512) * (torch.rand(512, 512) < 0.1))
    for isa in ISAS[:5]:
        one = {k: dispatch.predict(packed, isa, k, 1, 1) for k in ("gemv", "stream")}
        many = {k: dispatch.predict(packed, isa, k, 256, 1) for k in ("gemv", "stream", "decompress")}
        assert min(one, key=one.__getitem__) == "gemv"
        assert min(many, key=many.__getitem__) == "stream"


def test_choice_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseLinear(pack(torch.randn(64, 128)))
    if layer.kernels is None:
        pytest.skip("no compiler")
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "tuned", None)
    first = layer.choice(9, measure=True)
    assert first.measured is not None
    assert first.predicted > 0
    assert tune.cpu_name() in (tmp_path / "tune.json").read_text()
    monkeypatch.setattr(tune, "tuned", None)
    layer.choices.clear()
    again = layer.choice(9)
    assert (again.kernel, again.row_tile, again.measured) == (first.kernel, first.row_tile, first.measured)


def test_lowered_model_agrees_and_keeps_its_state() -> None:
    model = sparse_model()
    host = copy.deepcopy(model)
    report = lower_model(host, mode="small", tokens=(1, 16))
    if not report.lowered:
        pytest.skip(str(report))
    assert [entry.name for entry in report.lowered] == ["0", "2"]
    assert report.bytes_after < 0.5 * report.bytes_before
    assert set(report.lowered[0].seconds) == {1, 16}
    x = torch.randn(3, 7, 96)
    expected = model(x)
    for variant in (host, copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        torch.testing.assert_close(variant(x), expected, rtol=1e-5, atol=1e-5)
    state = host.state_dict()
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    other = sparse_model()
    with torch.no_grad():
        other[0].weight.mul_(2)  # type: ignore[operator]
    host.load_state_dict(other.state_dict())
    torch.testing.assert_close(host(x), other(x), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_input() -> None:
    model = sparse_model()
    host = copy.deepcopy(model)
    lower_model(host, mode="small", tokens=(1,))
    grads = []
    for variant in (model, host):
        x = torch.ones(2, 96, requires_grad=True)
        variant(x).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_operator_passes_the_checks_of_torch() -> None:
    layer = SparseLinear(pack_int8(*quantize_int8(torch.randn(12, 70))), torch.randn(12))
    sizes = (12, 70, 0, "none", False, False)
    tensors = (layer.masks, layer.values, layer.panel_ptr, layer.scales, layer.row_sums, layer.bias)
    x = torch.randn(3, 70, requires_grad=True)
    residual = torch.randn(3, 12)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparsify.packed_linear.default, (x, *tensors, residual, *sizes), test_utils=tests)


def test_export_shows_one_node_per_layer() -> None:
    host = sparse_model()
    if not lower_model(host, mode="small", tokens=(1,)).lowered:
        pytest.skip("no compiler")
    exported = torch.export.export(host, (torch.randn(4, 96),), strict=False)
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.sparsify.packed_linear.default]
    assert len(calls) == 2


def test_threads_may_share_a_model() -> None:
    model = sparse_model()
    host = copy.deepcopy(model)
    lower_model(host, mode="small", tokens=(1,))
    inputs = [torch.randn(tokens, 96) for tokens in (1, 3, 17, 70)]
    expected = [model(x) for x in inputs]
    failures: list[str] = []

    def work(index: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                y = host(inputs[index])
                if not torch.allclose(y, expected[index], rtol=1e-4, atol=1e-5):
                    failures.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_reasons_for_staying_dense() -> None:
    dense = nn.Sequential(nn.Linear(64, 64)).eval()
    report = lower_model(dense, tokens=(1,))
    assert "only 0% of its weights are zero" in str(report)
    broken = sparse_model()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")  # type: ignore[index]
    assert "a weight is NaN or Inf" in str(lower_model(broken, mode="small", tokens=(1,)))
    with pytest.raises(RefusedError, match="no linear is called nowhere"):
        lower_model(dense, names=["nowhere"])

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
            self.head.weight = self.embedding.weight

    tied = Tied()
    with torch.no_grad():
        tied.head.weight.mul_(torch.rand(50, 64) < 0.2)
    report = lower_model(tied, mode="small", tokens=(1,))
    assert "shared with embedding" in str(report)
    if dispatch.kernels_for(pack(torch.ones(1, 1))):
        assert len(lower_model(tied, mode="small", tokens=(1,), tied="copy").lowered) == 1


def test_moving_and_casting() -> None:
    host = sparse_model()
    if not lower_model(host, mode="small", tokens=(1,)).lowered:
        pytest.skip("no compiler")
    x = torch.randn(2, 96)
    before = host(x)
    host.half()
    assert torch.equal(host(x), before)
    with pytest.raises(RefusedError, match="cannot move to meta"):
        host.to("meta")


def innermost_loops(library: Path) -> list[list[str]]:
    """Instructions of every loop of a shared library that ends in a backward jump and holds no other."""
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True)
    found = re.findall(r"^ *([0-9a-f]+):\t(.*)$", listing.stdout, re.MULTILINE)
    places = {int(address, 16): i for i, (address, _) in enumerate(found)}
    loops, last = [], -1
    for i, (address, instruction) in enumerate(found):
        jump = re.match(r"j\w+ +([0-9a-f]+)\b", instruction)
        if jump is None or int(jump[1], 16) >= int(address, 16):
            continue
        start = places.get(int(jump[1], 16), i)
        if start > last:
            loops.append([text for _, text in found[start : i + 1]])
        last = i
    return loops


def test_the_pair_loop_does_nothing_but_multiply() -> None:
    """Per pair of weights and eight vectors of tokens: one broadcast, eight products, and the walk through the mask."""
    if dispatch.best_isa() != "avx512bf16" or shutil.which("objdump") is None:
        pytest.skip("no bf16 products here, or no objdump")
    needs_compiler()
    variant = Variant(isa="avx512bf16", value="bf16")
    loops = innermost_loops(build.compile_library(generate(variant), variant.flags))
    walks = [loop for loop in loops if any(i.startswith("tzcnt") for i in loop) and "vdpbf16ps" in "".join(loop)]
    counts = {sum(i.startswith("vdpbf16ps") for i in loop): loop for loop in walks}
    assert set(counts) == {2, 3, 4, 5, 6, 7, 8}
    for vectors, loop in counts.items():
        assert sum("vpbroadcastd" in i for i in loop) == 1
        assert sum("zmm" in i for i in loop) <= 2 * vectors + 1  # products, their operands from L1 and the broadcast
        assert not any("%rsp" in i or "%rbp)" in i for i in loop)
        assert len(loop) <= 2 * vectors + 10


DRIVER = r"""
#include <cstdio>
#include <vector>
static uint32_t state = 12345;
static uint32_t next() { state = state * 1664525u + 1013904223u; return state >> 8; }
static float uniform() { return float(next() %% 2001) / 1000.0f - 1.0f; }
static uint16_t half(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return uint16_t(bits >> 16); }
int main() {
  sparsify_init(nullptr);
  const int64_t shapes[][2] = {{1, 1}, {3, 64}, {4, 128}, {5, 65}, {37, 53}, {66, 131}, {70, 200}};
  const int64_t token_counts[] = {1, 2, 3, 7, 8, 9, 16, 17, 33, 70, 130};
  for (auto& shape : shapes) for (int density = 0; density <= 100; density += 50) {
    int64_t rows = shape[0], cols = shape[1], blocks = (cols + 63) / 64, panels = (rows + 3) / 4;
    std::vector<uint64_t> masks(panels * blocks * 4);
    std::vector<value_t> values;
    std::vector<int64_t> panel_ptr{0};
    std::vector<float> dense(rows * cols, 0.0f), scales(rows, 0.5f), bias(rows, 0.25f);
    std::vector<int32_t> sums(rows, 0);
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t b = 0; b < blocks; ++b) for (int r = 0; r < 4; ++r) for (int c = 0; c < 64; ++c) {
        int64_t row = 4 * p + r, col = 64 * b + c;
        if (row >= rows || col >= cols || int(next() %% 100) >= density) continue;
        masks[(p * blocks + b) * 4 + r] |= uint64_t(1) << c;
        value_t v = value_t(%(value)s);
        values.push_back(v);
        dense[row * cols + col] = to_float(v) * %(scale)s;
        sums[row] += int32_t(v);
      }
      panel_ptr.push_back(int64_t(values.size()));
    }
    values.resize(values.size() + 96);
    values.shrink_to_fit();
    Layer layer{rows, cols, blocks, masks.data(), values.data(), panel_ptr.data(), %(scales)s, 0, sums.data(),
                bias.data(), 4, 0};
    for (int64_t tokens : token_counts) {
      std::vector<float> x(tokens * cols), out(tokens * rows), residual(tokens * rows, 0.125f);
      for (auto& v : x) v = uniform();
      typedef int (*entry)(const Layer*, const float*, int64_t, int64_t, float*, int64_t, const float*, int64_t, int,
                           int64_t);
      entry entries[] = {%(entries)s};
#if %(halves)d
      typedef int (*half_entry)(const Layer*, const uint16_t*, int64_t, int64_t, uint16_t*, int64_t, const uint16_t*,
                                int64_t, int, int64_t);
      half_entry half_entries[] = {sparsify_dot, sparsify_pairs};
      const int halves = 2;
      std::vector<uint16_t> half_x(tokens * cols), half_out(tokens * rows), half_residual(tokens * rows, 0x3e00);
#else
      const int halves = 0;
#endif
      const int plain = int(sizeof entries / sizeof *entries);
      for (int k = 0; k < plain + halves; ++k) {
        if (k < plain) {
          if (entries[k](&layer, x.data(), cols, tokens, out.data(), rows, residual.data(), rows, 1, 16) != 0) return 2;
        } else {
#if %(halves)d
          for (int64_t i = 0; i < tokens * cols; ++i) half_x[i] = half(x[i]);
          if (half_entries[k - plain](&layer, half_x.data(), cols, tokens, half_out.data(), rows, half_residual.data(),
                                      rows, 1, 16) != 0) return 2;
          for (int64_t i = 0; i < tokens * rows; ++i) out[i] = to_float(half_out[i]);
#endif
        }
        for (int64_t t = 0; t < tokens; ++t) for (int64_t r = 0; r < rows; ++r) {
          double y = 0.25;
          for (int64_t c = 0; c < cols; ++c) y += double(dense[r * cols + c]) * x[t * cols + c];
          y = y / (1 + std::exp(-y)) + 0.125;
          bool quantised = %(quantised)d == k || k >= plain;
          double allowed = quantised ? 0.02 * (cols * 64.0) : 1e-3 * (1 + std::fabs(y)) ;
          if (!(std::fabs(out[t * rows + r] - y) <= allowed)) {
            std::printf("kernel %%d, %%ld x %%ld, %%ld tokens: %%g, expected %%g\n", k, long(rows), long(cols),
                        long(tokens), out[t * rows + r], y);
            return 1;
          }
        }
      }
    }
  }
  return 0;
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("value", ["f32", "f16", "bf16", "s8"])
@pytest.mark.parametrize("isa", ISAS)
def test_sanitizers_find_nothing(isa: codegen.Isa, value: str, tmp_path: Path) -> None:
    needs_compiler()
    if isa not in ISAS[ISAS.index(dispatch.best_isa()) :]:
        pytest.skip(f"this CPU does not run {isa}")
    variant = Variant(isa=isa, value=value)
    integers = value == "s8"
    samples = {"f32": "uniform()", "s8": "int(next() % 255) - 127", "bf16": "0x3f80 + next() % 64"}
    sample = {**samples, "f16": "0x3c00 + next() % 64"}[value]
    driver = DRIVER % {
        "value": sample,
        "scale": "0.5f" if integers else "1.0f",
        "scales": "scales.data()" if integers else "nullptr",
        "quantised": next((i for i, name in enumerate(variant.kernels) if name in codegen.INT8_KERNELS), -1),
        "halves": variant.dot,
        "entries": ", ".join(f"sparsify_{name}" for name in variant.kernels if name not in codegen.BF16_KERNELS),
    }
    source, program = tmp_path / "driver.cpp", tmp_path / "driver"
    source.write_text(generate(variant) + driver)
    command, _ = build.find_compiler(None)
    flags = [
        "-O1",
        "-g",
        "-std=gnu++17",
        "-w",
        "-Wno-psabi",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    result = subprocess.run(
        [*command, *flags, *variant.flags, str(source), "-o", str(program)], capture_output=True, text=True
    )
    if "cannot find" in result.stderr and "asan" in result.stderr:
        pytest.skip("the compiler has no sanitizer runtime")
    assert result.returncode == 0, result.stderr[-2000:]
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]

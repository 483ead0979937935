"""Generation of GPU kernels: deterministic source, strict templates, a cache that processes share, launches that check."""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import py_compile
from dataclasses import fields, replace
from pathlib import Path

import jinja2
import pytest
import torch

from sparsify.kernels.cache import CacheError
from sparsify.kernels.gpu import build, tiles
from sparsify.kernels.gpu.codegen import generate, parameters
from sparsify.kernels.gpu.spec import OPS, TARGETS, Epilogue, KernelSpec, Tile
from sparsify.kernels.gpu.tiles import TABLE, choose_tile
from sparsify.kernels.source import strict_environment, write_once


def spec_of(op: str, **changes: object) -> KernelSpec:
    forms = {"stream": "gaps", "expand": "gaps", "quantized": "nf4", "adapter_axpys": "columns", "adapter_dots": "rows"}
    form = forms.get(op, "")
    fields = {"op": op, "target": "sm_90", "tile": choose_tile(op, 1, "sm_90"), "format": form, **changes}
    return KernelSpec(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", OPS)
def test_source_is_deterministic_and_whole(op: str) -> None:
    spec = spec_of(op)
    generate.cache_clear()
    first = generate(spec)
    generate.cache_clear()
    assert generate(spec) == first
    assert "{{" not in first
    assert "{%" not in first
    function = next(n for n in ast.parse(first).body if isinstance(n, ast.FunctionDef))
    assert [a.arg for a in function.args.args] == list(parameters(spec))


def test_every_field_of_a_stream_changes_its_source() -> None:
    spec = spec_of("stream")
    others = [
        replace(spec, value="int8"),
        replace(spec, x="fp16"),
        replace(spec, format="two_four"),
        replace(spec, width=4),
        replace(spec, group=8),
        replace(spec, tokens=4),
        replace(spec, tile=replace(spec.tile, unroll=4)),
        replace(spec, tile=replace(spec.tile, warps=4)),
        replace(spec, epilogue=Epilogue(bias=True)),
        replace(spec, epilogue=Epilogue(residual=True)),
        replace(spec, epilogue=Epilogue(gated=True)),
        replace(spec, epilogue=Epilogue(activation="silu")),
    ]
    bodies = [generate(s).split("\n", 1)[1] for s in (spec, *others)]
    assert len(set(bodies)) == len(bodies)


def test_every_field_of_a_quantized_base_changes_its_source() -> None:
    for tokens in (1, 16):
        spec = spec_of("quantized", tokens=tokens)
        others = [
            replace(spec, x="fp16"),
            replace(spec, format="int8"),
            replace(spec, format="int4"),
            replace(spec, sparse=True),
            replace(spec, low_rank=True),
            replace(spec, epilogue=Epilogue(bias=True)),
            replace(spec, tile=replace(spec.tile, rows=8)),
        ]
        bodies = [generate(s).split("\n", 1)[1] for s in (spec, *others)]
        assert len(set(bodies)) == len(bodies)


def test_wrong_specs_are_named() -> None:
    for changes, message in (
        ({"op": "gemm"}, "unknown operator 'gemm'"),
        ({"target": "sm_70"}, "unknown target 'sm_70'"),
        ({"value": "fp8"}, "value: unknown type 'fp8'"),
        ({"x": "int8"}, "int8 is a type of stored weights only"),
        ({"format": "csr"}, "unknown format 'csr'"),
        ({"op": "quantized", "format": "fp4"}, "unknown format 'fp4', known: nf4, int8, int4"),
        ({"tokens": 3}, "tokens 3: a power of two"),
        ({"index_bits": 16}, "index of 16 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            KernelSpec(**{"op": "stream", "target": "sm_90", "tile": Tile(), "format": "gaps", **changes})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown activation 'mish'"):
        Epilogue(activation="mish")
    with pytest.raises(ValueError, match=r"Tile\(warps=3\)"):
        Tile(warps=3)


def test_templates_are_strict(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ missing }}")
    with pytest.raises(jinja2.UndefinedError, match="missing"):
        strict_environment(tmp_path).get_template("t.jinja").render()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("x", ["bf16", "fp16", "fp32"])
def test_every_operator_has_a_tile_everywhere(op: str, target: str, x: str) -> None:
    for tokens in (1, 2, 8, 16) if op == "stream" else (1, 16, 100, 10000):
        assert choose_tile(op, tokens, target, x) in [c.tile for c in TABLE]  # type: ignore[arg-type]
    assert all(choice.source for choice in TABLE)


def test_rows_for_a_target_win(monkeypatch: pytest.MonkeyPatch) -> None:
    special = replace(TABLE[0], targets=("sm_80",), tile=Tile(warps=2))
    monkeypatch.setattr(tiles, "TABLE", (*TABLE, special))
    assert choose_tile("stream", 1, "sm_80") == Tile(warps=2)
    assert choose_tile("stream", 1, "sm_90") == TABLE[0].tile


def write_in_process(directory: str, text: str) -> str:
    import os

    os.environ["SPARSIFY_CACHE"] = directory
    return str(write_once(text, ".py"))


def test_processes_may_write_at_once(tmp_path: Path) -> None:
    text = "x = 1\n" * 1000
    with multiprocessing.get_context("fork").Pool(3) as pool:
        paths = pool.starmap(write_in_process, [(str(tmp_path), text)] * 3)
    assert len(set(paths)) == 1
    assert [p.name for p in (tmp_path / "kernels").iterdir()] == [Path(paths[0]).name]
    assert Path(paths[0]).read_text() == text


def test_a_damaged_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    path = write_once("x = 1\n", ".py")
    path.write_text("x =")
    assert write_once("x = 1\n", ".py") == path
    assert path.read_text() == "x = 1\n"
    assert write_once("x = 2\n", ".py") != path


def test_what_runs_is_the_generated_text_and_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a file that was changed behind us nor bytecode beside it: also when the text is asked for, as Triton does."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    text = "def kernel():\n    return 'generated'\n"
    path = write_once(text, ".py")
    evil = "def kernel():\n    return 'hostile..'\n"
    py_compile.compile(str(path), doraise=True)
    path.write_text(evil)
    (bytecode,) = (path.parent / "__pycache__").iterdir()
    py_compile.compile(str(path), cfile=str(bytecode), doraise=True)
    kernel = build.import_source(text).kernel
    assert kernel() == "generated"
    path.write_text(evil)
    assert inspect.getsource(kernel) == text
    monkeypatch.setattr(build, "write_once", lambda *_: (_ for _ in ()).throw(CacheError("no folder")))
    with pytest.warns(RuntimeWarning, match="kept in memory only: no folder"):
        kernel = build.import_source(text.replace("generated", "in memory")).kernel
    assert kernel() == "in memory"
    assert "in memory" in inspect.getsource(kernel)


CODE = "x'\nimport os\n#"
SPEC = {"op": "blocks", "target": "sm_90", "tile": Tile(), "width": 16, "group": 16}


@pytest.mark.parametrize("name", [f.name for f in fields(KernelSpec) if f.name not in ("tile", "epilogue")])
def test_no_text_from_outside_reaches_generated_source(name: str) -> None:
    """Sources are made of specs alone, and a spec takes words from its lists, numbers and booleans: no module name, no file."""
    if name in ("gather", "sparse", "low_rank"):
        assert CODE not in generate(KernelSpec(**{**SPEC, name: bool(CODE)}))  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match="unknown|is no number|bits"):
        KernelSpec(**{**SPEC, name: CODE})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [f.name for f in fields(Tile)])
def test_tiles_are_numbers(name: str) -> None:
    with pytest.raises(ValueError, match="a power of two is needed"):
        Tile(**{name: CODE})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown activation"):
        Epilogue(activation=CODE)


def test_without_triton_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "triton_installed", lambda: False)
    monkeypatch.setattr(build, "loaded", {})
    assert not build.can_launch(torch.device("cuda"))
    assert not build.can_launch(torch.device("cpu"))
    with pytest.raises(build.TritonError, match=r"pip install 'sparsify-compiler\[triton\]'"):
        build.load_kernel(spec_of("stream"))


def test_only_the_interpreter_takes_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not build.can_launch(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert build.can_launch(torch.device("cpu"))
    assert not build.can_launch(torch.device("meta"))


def test_arguments_must_be_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build.TritonError, match=r"arguments \['x_ptr'\], the kernel takes \['x_ptr', 'values_ptr'"):
        build.launch(spec_of("stream"), (1,), {"x_ptr": torch.zeros(1)})

"""One linear in another engine, for `cpu_linear.py`: DeepSparse, ONNX Runtime, OpenVINO, in several types.

    python linear.py KIND THREADS CLOCK      KIND: the name of the package; CLOCK: wall or cpu (processor seconds)

    fp32               as it is
    int8               int8 weights (a scale per row) meet int8 activations: DeepSparse and OpenVINO with one static scale, from the
                       extremes of the very input; ONNX Runtime with a dynamic one (DynamicQuantizeLinear), which it computes in every call
    int8-weight-only   OpenVINO: one scale per row; ONNX Runtime: MatMulNBits, one per 128 columns, int8 arithmetic (accuracy level 4)
    int4-weight-only   one scale per 128 columns, else the same

DeepSparse takes int8 in the form that SparseML writes (QuantizeLinear, MatMulInteger, Cast, Mul); its own analysis names the kernel that
runs, `ks_…-75.0%` for a sparse one. Given QuantizeLinear and DequantizeLinear around a MatMul, it multiplies densely in fp32.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.random_decoder import quantize_rows

GROUP = 128
Run = Callable[[np.ndarray], np.ndarray]


def save_onnx(path: str, weight: np.ndarray, batch: int, nodes: list[Any], constants: dict[str, np.ndarray]) -> str:
    """A graph from x (batch, in) to y (batch, out)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rows, cols = weight.shape
    graph = helper.make_graph(
        nodes, "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, rows])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains if any(n.domain for n in nodes) else domains[:1])
    model.ir_version = 7
    onnx.save(model, path)
    return path


def onnx_linear(path: str, weight: np.ndarray, x: np.ndarray, dtype: str, dynamic: bool) -> str:
    """A file with one linear. dynamic: activations of int8 are quantised with a scale of each call."""
    from onnx import helper

    node = helper.make_node
    if dtype == "fp32":
        return save_onnx(path, weight, len(x), [node("MatMul", ["x", "w"], ["y"])], {"w": weight.T})
    if dtype != "int8":
        bits = 8 if dtype.startswith("int8") else 4
        codes, scales = quantize_rows(weight, bits, GROUP)
        stored = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8).reshape(len(weight), -1, GROUP)
        if bits == 4:
            stored = stored[:, :, 0::2] | (stored[:, :, 1::2] << 4)
        sizes = {"K": weight.shape[1], "N": len(weight), "bits": bits, "block_size": GROUP, "accuracy_level": 4}
        product = node("MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", **sizes)
        return save_onnx(path, weight, len(x), [product], {"w": stored, "scales": scales.reshape(-1)})
    codes, scales = quantize_rows(weight, 8)
    constants: dict[str, np.ndarray] = {"w": codes.T, "w_zero": np.array(0, np.int8)}
    tail = [node("MatMulInteger", ["x8", "w", "zero", "w_zero"], ["sums"]), node("Cast", ["sums"], ["wide"], to=1)]
    if dynamic:
        head = [node("DynamicQuantizeLinear", ["x"], ["x8", "step", "zero"]), node("Mul", ["step", "rows"], ["scale"])]
        constants["rows"] = scales[:, 0]
    else:
        step = np.float32(np.abs(x).max() / 127)
        head = [node("QuantizeLinear", ["x", "step", "zero"], ["x8"])]
        constants |= {"step": step, "zero": np.array(128, np.uint8), "scale": scales[:, 0] * step}
    return save_onnx(path, weight, len(x), [*head, *tail, node("Mul", ["wide", "scale"], ["y"])], constants)


def deepsparse_linear(path: str, weight: np.ndarray, x: np.ndarray, dtype: str, threads: int) -> tuple[Run, str]:
    from deepsparse import Engine, model_debug_analysis

    onnx_linear(path, weight, x, dtype, dynamic=False)
    found = model_debug_analysis(
        path, [x], batch_size=len(x), num_cores=threads, num_iterations=1, num_warmup_iterations=0
    )
    kernels = [layer["name"] for layer in found["layer_info"] if layer["required_flops"] >= 2 * weight.size]
    engine = Engine(model=path, batch_size=len(x), num_cores=threads)
    return lambda x: engine.run([x])[0], ", ".join(kernels)


def onnxruntime_linear(path: str, weight: np.ndarray, x: np.ndarray, dtype: str, threads: int) -> tuple[Run, str]:
    import onnx
    import onnxruntime as ort

    onnx_linear(path, weight, x, dtype, dynamic=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.optimized_model_filepath = f"{path}.optimized"
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return lambda x: session.run(None, {"x": x})[0], ", ".join(node.op_type for node in nodes)


def openvino_linear(path: str, weight: np.ndarray, x: np.ndarray, dtype: str, threads: int) -> tuple[Run, str]:
    import openvino as ov
    from openvino import opset13 as ops
    from openvino_decoder import compressed

    node = ops.parameter(list(x.shape), np.float32)
    entry: Any = node
    if dtype == "int8":
        top = np.abs(x).max()
        ends = [ops.constant(np.float32(value)) for value in (-top * 128 / 127, top)] * 2
        entry = ops.fake_quantize(node, *ends, 256)
    stored = ops.constant(weight) if dtype == "fp32" else compressed(weight, 4 if dtype.startswith("int4") else 8)
    model = ov.Model([ops.result(ops.matmul(entry, stored, False, True))], [node], "linear")
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", hints)
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kernels = [info["primitiveType"].astype(str) for info in infos if info["layerType"].astype(str) == "FullyConnected"]
    request = compiled.create_infer_request()

    def run(x: np.ndarray) -> np.ndarray:
        request.infer([x])
        return request.get_output_tensor(0).data

    return run, ", ".join(kernels)


ENGINES = {"deepsparse": deepsparse_linear, "onnxruntime": onnxruntime_linear, "openvino": openvino_linear}


def main() -> None:
    kind, threads = sys.argv[1], int(sys.argv[2])
    clock = time.process_time if sys.argv[3] == "cpu" else time.perf_counter
    runs: dict[str, Run] = {}
    x = np.zeros(0)
    print(json.dumps({"version": metadata.version(kind)}), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for line in sys.stdin:
            job = json.loads(line)
            if "weight" in job:
                weight, x = np.load(job["weight"]), np.load(job["x"])
                runs.pop(job["dtype"], None)
                path = f"{scratch}/{job['dtype']}.onnx"
                runs[job["dtype"]], kernel = ENGINES[kind](path, weight, x, job["dtype"], threads)
                for _ in range(3):
                    y = runs[job["dtype"]](x)
                np.save(job["y"], y)
                print(json.dumps({"kernel": kernel}), flush=True)
                continue
            seconds = []
            for _ in range(job["runs"]):
                start = clock()
                runs[job["dtype"]](x)
                seconds.append(clock() - start)
            print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()

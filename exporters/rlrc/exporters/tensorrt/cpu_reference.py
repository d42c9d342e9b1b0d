"""TensorRT's graphs on ONNX Runtime's CPU provider: what an export is verified with where there is no GPU.

The very graphs, but that provider computes in neither 16-bit type: float16 it widens silently, and drops the casts that
should have rounded; bfloat16 it refuses. So products and dequantizations are computed in float32, of operands that were
rounded to 16 bits, and rounded to them again: what a GPU with float32 accumulators does.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
from onnx import TensorProto, helper

from rlrc.artifact import Artifact, GraphSpec
from rlrc.runtime.inference.backends.onnxruntime import OnnxRuntime

COMPUTED = ("MatMul", "Conv", "DequantizeLinear")
"""Operators that have 16-bit operands; the others that do only move them."""
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


class CpuReferenceEngine(OnnxRuntime):
    """One session per graph of the backend "tensorrt"."""

    def __init__(self, artifact: Artifact, threads: int = 1) -> None:
        super().__init__(artifact, threads, "tensorrt")

    def _open(self, path: Path, graph: GraphSpec, threads: int) -> onnxruntime.InferenceSession:
        return session(path, threads)

    def versions(self) -> dict[str, str]:
        return {"stand-in": "onnxruntime's CPU provider", **super().versions()}


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    model = onnx.load(path, load_external_data=False)
    in_float32(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # Else it would compute 4-bit products with activations in 8 bits, and 8-bit ones by kernels that TensorRT has not.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_float32(model: onnx.ModelProto) -> None:
    """Computes in float32 what the model computes in 16 bits, in place; values between stay rounded to those."""
    halves = {tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.data_type in HALVES}
    nodes = list[onnx.NodeProto]()
    for node in model.graph.node:
        given = next((halves[name] for name in node.input if name in halves), None)
        if node.op_type == "Cast":
            given = next(attribute.i for attribute in node.attribute if attribute.name == "to")
        if given in HALVES:
            halves |= dict.fromkeys(node.output, given)
        if given is None or node.op_type not in COMPUTED:
            nodes.append(node)
            continue
        (output,) = node.output
        for i, name in enumerate(node.input):
            if name in halves:
                node.input[i] = f"{output}:{i}"
                nodes.append(helper.make_node("Cast", [name], [node.input[i]], to=TensorProto.FLOAT))
        node.output[0] = f"{output}:f"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [output], to=given)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)

"""Run TensorRT's graphs on ONNX Runtime's CPU provider, to verify an export without a GPU.

That provider does not compute in 16-bit types: it silently widens float16 and drops the casts that should round, and it
refuses bfloat16. Products and dequantizations are therefore computed in float32, on operands rounded to 16 bits, and
their results rounded again, as a GPU with float32 accumulators does.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
from onnx import TensorProto, helper

from rlrc.artifact import Artifact, GraphSpec
from rlrc.runtime.inference.backends.onnxruntime import OnnxRuntime

COMPUTED = ("MatMul", "Conv", "DequantizeLinear")
"""Operators that compute on 16-bit operands; all others only move them."""
SIXTEEN_BITS = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


class CpuReferenceEngine(OnnxRuntime):
    """Has one session per graph of the backend "tensorrt"."""

    def __init__(self, artifact: Artifact, threads: int = 1) -> None:
        super().__init__(artifact, threads, "tensorrt")

    def _open(self, path: Path, graph: GraphSpec, threads: int) -> onnxruntime.InferenceSession:
        return open_session(path, threads)

    def versions(self) -> dict[str, str]:
        return {"stand-in": "onnxruntime's CPU provider", **super().versions()}


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    model = onnx.load(path, load_external_data=False)
    compute_in_float32(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # Otherwise ONNX Runtime computes 4-bit products on 8-bit activations, and 8-bit ones by kernels unlike TensorRT's.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compute_in_float32(model: onnx.ModelProto) -> None:
    """Change the model in place: 16-bit operators compute in float32, with their results rounded to 16 bits."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.data_type in SIXTEEN_BITS}
    nodes = list[onnx.NodeProto]()
    for node in model.graph.node:
        kind = next((types[name] for name in node.input if name in types), None)
        if node.op_type == "Cast":
            kind = next(attribute.i for attribute in node.attribute if attribute.name == "to")
        if kind in SIXTEEN_BITS:
            types |= dict.fromkeys(node.output, kind)
        if kind is None or node.op_type not in COMPUTED:
            nodes.append(node)
            continue
        (output,) = node.output
        for i, name in enumerate(node.input):
            if name in types:
                node.input[i] = f"{output}:{i}"
                nodes.append(helper.make_node("Cast", [name], [node.input[i]], to=TensorProto.FLOAT))
        node.output[0] = f"{output}:f"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [output], to=kind)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)

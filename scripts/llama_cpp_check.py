"""Check llama.cpp on this processor with a model of one block in all weight formats.

A build for another processor fails with an illegal instruction in the first pass.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from rlrc.runtime.inference.backends.llama_model import LlamaModel

WIDTH, HEADS, LENGTH = 256, 4, 17
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (2 * WIDTH, WIDTH),
    "ffn_up": (2 * WIDTH, WIDTH),
    "ffn_down": (WIDTH, 2 * WIDTH),
}
FORMATS = {"fp32": Kind.F32, "fp16": Kind.F16, "int8": Kind.Q8_0, "int4": Kind.Q4_0}


def write(path: Path, kind: Kind) -> None:
    """Write the model. Its weights are representable in Q4_0, so that they are the same in all formats."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(1)
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", np.zeros((1, WIDTH), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    for name, (rows, columns) in SHAPES.items():
        weight = random.standard_normal((rows, columns)).astype(np.float32) / columns**0.5
        rounded = gguf.quants.dequantize(gguf.quants.quantize(weight, Kind.Q4_0), Kind.Q4_0)
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(rounded, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_model(path: Path, precision: str) -> np.ndarray:
    """Hidden states of a sequence: all positions but the last in one pass, then the last."""
    x = np.random.default_rng(1).standard_normal((LENGTH, WIDTH)).astype(np.float32)
    model = LlamaModel(path, WIDTH, precision, causal=True, threads=2)
    model.begin(LENGTH)
    return np.concatenate([model.run(x[:-1], LENGTH - 1), model.run(x[-1:], 1)])


def main() -> int:
    outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision, kind in FORMATS.items():
            write(Path(folder) / "model.gguf", kind)
            outputs[precision] = run_model(Path(folder) / "model.gguf", precision)
    for precision, values in outputs.items():
        error = float(np.abs(values - outputs["fp32"]).max() / np.ptp(outputs["fp32"]))
        if not error < 0.02:
            print(f"expected {precision} within 2 % of fp32, found {error:.2%}; rebuild llama.cpp", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Speed of a decoder of realistic size on this machine: rlrc's graphs, torch, and plain graphs on ONNX Runtime.

    python benchmarks/studies/decoder_speed.py OUT.json [--threads 2] [--rounds 15] [--only REGEX] [--work FOLDER]

The policy is an OpenVLA with random weights (decoder of 154 M parameters, 280 positions before 7 action tokens; see
``spec`` and ``TOWERS``). All contestants have the same weights. In every round, each computes one action in turn, and
the machine's read bandwidth is measured. "Stock" graphs express the same computation in standard ONNX operators, which
ONNX Runtime fuses and quantizes by itself. Compiled torch has frozen weights, so that it can pack them once.
"""

from __future__ import annotations

import os

# Idle threads of torch and llama.cpp spin for a few microseconds. Longer spinning costs most on busy cores; without it,
# llama.cpp takes 9 ms per token instead of 4. Must be set before torch loads OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # same value as in rlrc.runtime.inference.backends.llama_model

import argparse
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from plain_graphs import Stock
from tokenizers import Tokenizer, models, pre_tokenizers

from rlrc import artifact as artifacts
from rlrc.artifact import (
    TOKENIZER,
    ActionSpec,
    Artifact,
    CameraSpec,
    HistoryEntry,
    LayerSpec,
    NormStats,
    PolicySpec,
    PromptSpec,
    TokenSpec,
    TowerSpec,
)
from rlrc.benchmarks.measure.bandwidth import read_bandwidth
from rlrc.benchmarks.results import machine, results
from rlrc.benchmarks.results.stats import percentiles, ratio_interval
from rlrc.compressor.checkpoints.torch_policy import TorchPolicy
from rlrc.compressor.models.nn.linear import widen
from rlrc.compressor.models.openvla import OpenVLAPolicy
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize
from rlrc.compressor.stages import artifact_io
from rlrc.exporters.export import export
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.inference.preprocess import Tokenizer as Prompts

WORDS = 24
VOCABULARY = 4096
TOWERS = {
    "vision": TowerSpec(384, (LayerSpec(6, 6, 64, 1536),) * 6, eps=1e-6),
    "decoder": TowerSpec(1024, (LayerSpec(16, 16, 64, 2816),) * 12),
}
OURS = {  # name: (weights, target, precision)
    "ours fp32": ("dense", "onnx", "fp32"),
    "ours int8": ("int4", "onnx", "int8"),
    "ours int8-rows": ("int4", "onnx", "int8-rows"),
    "ours int8+int4": ("int4", "onnx", "int8+int4"),
    "ours int4": ("int4", "onnx", "int4"),
    "ours int4a8": ("int4", "onnx", "int4a8"),
    "ours int4a8, groups of 128": ("int4-128", "onnx", "int4a8"),
    "ours gguf int4": ("int4", "gguf", "int4"),
    "ours gguf int8": ("dense", "gguf", "int8"),
    "ours gguf fp16": ("dense", "gguf", "fp16"),
}


def spec() -> PolicySpec:
    """256 image patches and 24 words, followed by 7 action tokens."""
    names = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    norm = NormStats((0.0,) * 7, (1.0,) * 7)
    action = ActionSpec(
        1, names, (*("delta",) * 6, "gripper"), ("1",) * 7, norm, 255, TokenSpec(256, VOCABULARY - 256, VOCABULARY - 1)
    )
    camera = CameraSpec("top", 224, 224, "bilinear", (0.5,) * 3, (0.5,) * 3, "HWC")
    geometry = {"vocabulary": VOCABULARY, "patch": 14, "extra": [0], "scaled": [False], "projector": [1024, 1024]}
    return PolicySpec(
        "openvla", "autoregressive", (camera,), None, PromptSpec("{instruction}", 64, None), action, geometry
    )


def make(folder: Path) -> None:
    """Write artifacts ``int4``, ``int4-128`` (larger groups) and ``dense`` (dequantized int4 in bfloat16)."""
    torch.manual_seed(0)
    policy = OpenVLAPolicy(spec(), TOWERS).eval()
    random = np.random.default_rng(0)
    sentence = " ".join(f"w{i}" for i in range(WORDS))
    observations = {
        "image.top": random.integers(0, 256, (2, 256, 256, 3), np.uint8),
        "instructions": np.array([sentence] * 2),
        "ids": np.array([range(WORDS)] * 2),
    }
    result = quantize(policy.state_dict(), QuantizeConfig(search=False))
    dense = artifact_io.apply_quantization(policy, result)
    wide = quantize(policy.state_dict(), QuantizeConfig(search=False, group=128))
    for name, weights, quantized in (("int4", policy, result), ("int4-128", policy, wide), ("dense", dense, None)):
        with artifacts.create_artifact(folder / name) as draft:
            words = {f"w{i}": i for i in range(VOCABULARY)}
            tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            tokenizer.save(str(draft.file(TOKENIZER)))
            history = (HistoryEntry("new", {"seed": 0}, "0", None, 0.0),)
            artifact_io.write_policy(draft, weights, observations, history, quantized)


class TimedEngine:
    """An engine that records the milliseconds of every pass, by kind."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.passes = engine, dict[str, list[float]]()

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        kind = "vision" if graph == "vision" else "decode" if inputs["start"][0] else "prefill"
        outputs: dict[str, Any] = measure_pass(self.passes, kind, lambda: self.engine.run(graph, inputs))
        return outputs

    def versions(self) -> dict[str, str]:
        return self.engine.versions()


def measure_pass(passes: dict[str, list[float]], kind: str, call: Callable[[], Any]) -> Any:
    started = perf_counter()
    result = call()
    passes.setdefault(kind, []).append((perf_counter() - started) * 1e3)
    return result


Contestant = tuple[Callable[[dict[str, Any]], Any], dict[str, list[float]]]


def local(artifact: Artifact, threads: int, engine: Engine | None = None) -> Contestant:
    policy = LocalPolicy(artifact, threads, engine=engine)
    policy.engine = TimedEngine(policy.engine)
    return policy.infer, policy.engine.passes


def in_torch(artifact: Artifact, dtype: torch.dtype, compiled: bool) -> Contestant:
    policy: Any = widen(artifact_io.load_policy(artifact)).to(dtype)
    passes: dict[str, list[float]] = {}
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    encode_image, step = policy.encode_image, policy.step
    if compiled:
        torch._inductor.config.freezing = True
        encode_image, step = torch.compile(encode_image), torch.compile(step, dynamic=None)

    def timed_step(image_tokens: Any, ids: Any, past: Any) -> Any:
        return measure_pass(passes, "decode" if past else "prefill", lambda: step(image_tokens, ids, past))

    policy.encode_image = lambda pixels: measure_pass(passes, "vision", lambda: encode_image(pixels))
    policy.step = timed_step
    policy_spec = artifact.manifest.policy
    assert policy_spec.prompt is not None
    tokenizer = Prompts(artifact.file(TOKENIZER), policy_spec.prompt)
    return TorchPolicy(policy_spec, tokenizer, lambda: policy).infer, passes


def export_contestant(folder: Path, name: str) -> Artifact:
    """Export one of OURS, unless the folder already contains it."""
    (weights, target, precision), out = OURS[name], folder / name.replace(" ", "-")
    if not out.exists():
        # Actions of random weights are meaningless: the error is reported, not limited.
        export(artifacts.load(folder / weights, verify=()), out, (target,), precision, tolerance=10.0)
    return artifacts.load(out, verify=())


def contestants(folder: Path, threads: int, only: str) -> tuple[dict[str, Contestant], dict[str, dict[str, Any]]]:
    """Open the contestants whose names match ``only``. Returns them and, by name, file sizes and action errors."""
    entered: dict[str, Contestant] = {}
    facts: dict[str, dict[str, Any]] = {}
    matches = re.compile(only).search
    dense = artifacts.load(folder / "dense", verify=())
    for name in OURS:
        if matches(name) and ("gguf" not in name or find_spec("llama_cpp")):
            artifact = export_contestant(folder, name)
            entered[name] = local(artifact, threads)
            sizes = {graph.name: artifact.manifest.files[graph.file].size for graph in artifact.manifest.graphs}
            facts[name] = {"file_bytes": sizes, "action_error": max(artifact.manifest.verified[-1].max_error)}
    for name, int8 in (("stock fp32", False), ("stock int8", True)):
        if matches(name):
            stock = Stock(dense, folder / name.replace(" ", "-"), int8, threads)
            entered[name] = local(export_contestant(folder, "ours fp32"), threads, stock)
    for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
        for kind in ("eager", "compiled"):
            if matches(f"{name} {kind}"):
                entered[f"{name} {kind}"] = in_torch(dense, dtype, kind == "compiled")
    return entered, facts


BITS = {"groups of 128": 4.125, "int4": 4.5, "gguf int8": 8.5, "int8": 8, "16": 16, "": 32}
"""Bits per weight, including scales, by the first key that the contestant's name contains."""


def decode_bytes(name: str) -> int:
    """Bytes that a decode step reads: all weights of the decoder and head once, plus the cached keys and values."""
    tower = TOWERS["decoder"]
    weights = 256 * tower.width + sum(
        tower.width * (4 * layer.heads * layer.head_dim + 3 * layer.mlp) for layer in tower.layers
    )
    bits = next(bits for part, bits in BITS.items() if part in name)
    cached = sum(2 * layer.kv_heads * layer.head_dim for layer in tower.layers) * (256 + WORDS + 3)
    return int(weights * bits / 8 + cached * (2 if "bf16" in name or "gguf" in name else 4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="only contestants whose names match this regular expression")
    parser.add_argument("--work", type=Path, help="folder that keeps the artifacts (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        if not (folder / "dense").exists():
            make(folder)
        result = measure(*contestants(folder, arguments.threads, arguments.only), arguments.threads, arguments.rounds)
    only = f" --only '{arguments.only}'" if arguments.only else ""
    options = f"{arguments.out.name} --threads {arguments.threads} --rounds {arguments.rounds}{only}"
    result["command"] = f"python benchmarks/studies/decoder_speed.py {options}"
    results.write(arguments.out, results.dump(result))
    print(table(result))
    return 0


def measure(
    entered: dict[str, Contestant], facts: dict[str, dict[str, Any]], threads: int, rounds: int
) -> dict[str, Any]:
    random = np.random.default_rng(1)
    sentence = " ".join(f"w{i}" for i in range(WORDS))
    observation = {"image.top": random.integers(0, 256, (256, 256, 3), np.uint8), "instruction": sentence}
    for name, (infer, passes) in entered.items():
        started = perf_counter()
        for _ in range(2):
            infer(observation)
        print(f"{name}: warmed up in {perf_counter() - started:.1f} s", file=sys.stderr)
        passes.clear()
    totals: dict[str, list[float]] = {name: [] for name in entered}
    cpu_times: dict[str, list[float]] = {name: [] for name in entered}
    bandwidth, load = [], []
    for _ in range(rounds):
        bandwidth.append(read_bandwidth(threads))
        load.append(os.getloadavg()[0])
        for name, (infer, _) in entered.items():
            started, before = perf_counter(), process_time()
            infer(observation)
            totals[name].append((perf_counter() - started) * 1e3)
            cpu_times[name].append((process_time() - before) * 1e3)
    best = max(bandwidth)
    rows = []
    for name, (_, passes) in entered.items():
        step = percentiles(passes["decode"], (0, 50, 90))
        rate = decode_bytes(name) / step["p50"] / 1e6
        rows.append(
            {
                "name": name,
                "action_ms": round_values(percentiles(totals[name], (0, 50, 90))),
                "action_cpu_ms": round_values(percentiles(cpu_times[name], (0, 50, 90))),
                **{
                    f"{kind}_ms": round_values(percentiles(passes[kind], (0, 50, 90))) for kind in ("vision", "prefill")
                },
                "decode_ms": round_values(step),
                "decode_gb_s": round(rate, 1),
                "decode_share": round(rate / float(np.median(bandwidth)), 2),
                "best_decode_share": round(decode_bytes(name) / step["p0"] / 1e6 / best, 2),
                **facts.get(name, {}),
                "trials_ms": [round(value, 2) for value in totals[name]],
            }
        )
    description = machine.describe(threads)
    description["versions"]["torch"] = torch.__version__
    flags = re.search(r"flags\s*: (.*)", Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else None
    description["cpu_flags"] = sorted(set(flags[1].split()) & MATRIX_FLAGS) if flags else None
    return {
        "kind": "decoder speed",
        "machine": description,
        "load": [round(value, 2) for value in load],
        "read_gb_s": round_values(percentiles(bandwidth, (0, 50, 100))),
        "rows": rows,
        "ratios": ratios(totals),
        "cpu_ratios": ratios(cpu_times),
    }


MATRIX_FLAGS = {"avx2", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm"}


def ratios(totals: dict[str, list[float]]) -> dict[str, Any]:
    """Time per action of every other contestant relative to each of OURS, with 95 % intervals."""
    return {
        name: {
            other: [round(value, 2) for value in (estimate.value, estimate.low, estimate.high)]
            for other in totals
            if other != name
            for estimate in [ratio_interval([[x] for x in totals[other]], [[x] for x in totals[name]])]
        }
        for name in totals
        if name.startswith("ours") and len(totals[name]) > 1
    }


def round_values(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


KINDS = ("action_ms", "action_cpu_ms", "vision_ms", "prefill_ms")


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | action ms | CPU ms | vision | prefill | decode step | GB/s | of the bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"{row[key]['p50']:.1f} ({row[key]['p0']:.1f})" for key in KINDS]
        cells += [f"{row['decode_ms']['p50']:.2f} ({row['decode_ms']['p0']:.2f})", f"{row['decode_gb_s']}"]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['decode_share']} ({row['best_decode_share']}) |")
    return "\n".join([*lines, f"read bandwidth {result['read_gb_s']}, load {result['load']}"])


if __name__ == "__main__":
    raise SystemExit(main())

"""What scripts/gpu_check.sh runs: see there. Exit code 1 if a check fails."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrc import artifact as artifacts
from rlrc.artifact import LayerSpec
from rlrc.benchmarks.results import machine
from rlrc.compressor.checkpoints import geometry, reader
from rlrc.compressor.models import device as devices
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.weights import set_tensor
from rlrc.compressor.rl.actors import build_actor
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.objectives import PolicyObjective
from rlrc.compressor.stages.artifact_io import inputs_of, open_tensors
from rlrc.compressor.training import lora
from rlrc.compressor.training.batches import Batch
from rlrc.compressor.training.losses import chunk_loss, draw_noise
from rlrc.compressor.training.sft import build_optimizer

ROOT = Path(__file__).parents[1]
RLRC = [sys.executable, "-m", "rlrc.runtime.cli"]
QUIET = ["--evaluate", "0", "--threads", "4", "--workers", "1"]
LEFT = 0.9  # part of the heads and channels of OpenVLA-7B's inner blocks that is removed
CLOSE = 0.02  # of the largest weight: how far the GPU's and the CPU's weights may be apart after training


class Failed(Exception):
    """A check did not hold."""


class Check:
    """Runs one part after the other and keeps a row of each."""

    def __init__(self, device: str, seconds: float, work: Path) -> None:
        self.device, self.work, self.end = device, work, time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str, part: Callable[[], dict[str, Any]]) -> None:
        started, row = time.monotonic(), {"name": name}
        if started > self.end:
            self.rows.append(row | {"verdict": "LEFT OUT", "reason": "no time left"})
            return
        try:
            row |= part()
        except ModuleNotFoundError as error:
            row |= {"verdict": "LEFT OUT", "reason": f"{error.name} is not installed"}
        except (Failed, RuntimeError, subprocess.SubprocessError) as error:
            row |= {"verdict": "FAIL", "reason": str(error)[-2000:]}
        self.rows.append({"verdict": "PASS", "seconds": round(time.monotonic() - started, 1)} | row)
        print(json.dumps(self.rows[-1]), flush=True)

    def command(self, *arguments: object) -> str:
        """The stdout of a command, which must succeed in the time that is left."""
        words = [str(argument) for argument in arguments]
        left = max(1.0, self.end - time.monotonic())
        done = subprocess.run(words, capture_output=True, text=True, timeout=left, cwd=ROOT, check=False)
        if done.returncode:
            raise Failed(f"{' '.join(words[2:])}: exit code {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
        return done.stdout

    def rlrc(self, *arguments: object) -> str:
        return self.command(*RLRC, *arguments)

    # The parts

    def tests(self) -> dict[str, Any]:
        need("pytest")
        said = self.command(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py")
        return {"said": said.strip().splitlines()[-1]}

    def reference(self) -> dict[str, Any]:
        """prune, sft, quantize and export of the reference policy on the device and on the CPU."""
        from small_dataset import write_dataset

        dense, data = ROOT / "reference/dense", self.work / "data"
        write_dataset(artifacts.load(dense).manifest.policy, data)
        found: dict[str, Any] = {}
        for where in (self.device, "cpu"):
            folder, given = self.work / f"reference-{where}", ["--device", where, *QUIET]
            folder.mkdir()
            pruned, trained, rounded, exported = (folder / name for name in ("pruned", "sft", "int4", "onnx"))
            scores = ["--score", "taylor", "--data", data, "--batch", "8", "--batches", "4", "--ratio", "0.5"]
            steps = ["--data", data, "--steps", "20", "--batch", "16", "--rate", "1e-4", "--precision", "float32"]
            self.rlrc("prune", dense, pruned, *scores, *given)
            self.rlrc("sft", pruned, trained, *steps, *given)
            self.rlrc("quantize", trained, rounded, "--method", "gptq", *given)
            self.rlrc("export", rounded, exported)
            found[where] = {name: folder / name for name in ("pruned", "sft", "onnx")}
        one, other = found[self.device], found["cpu"]
        same = artifacts.load(one["pruned"]).manifest.towers == artifacts.load(other["pruned"]).manifest.towers
        row = {"same_shape": same, "weights_apart": apart(one["sft"], other["sft"])}
        if not same or row["weights_apart"] > CLOSE:
            raise Failed(f"expected the CPU's shape and weights within {CLOSE}, found {row}")
        return row

    def reinforcement(self) -> dict[str, Any]:
        """One iteration of rl on the reference policy, in the simulator."""
        need("metaworld")
        out = self.work / "rl"
        settings = ["--iterations", "1", "--warmup", "0", "--episodes", "26", "--demonstrations", "2"]
        self.rlrc("rl", ROOT / "reference/dense", out, *settings, "--device", self.device, "--evaluate", "0")
        return {"cpu_minutes": artifacts.load(out).manifest.history[-1].cpu_minutes}

    def large(self) -> dict[str, Any]:
        """A LoRA step and a PPO update of OpenVLA-7B's geometry, pruned."""
        where = devices.pick(self.device)
        row: dict[str, Any] = {}
        for name, step in (("lora", lora_step), ("ppo", ppo_step)):
            policy = pruned_openvla(where, small=self.device == "cpu")
            with peak_of(where) as peak:
                started = time.monotonic()
                row[f"{name}_loss"] = step(policy, batch_of(policy, where))
                row[f"{name}_s"] = round(time.monotonic() - started, 2)
            row |= {f"{name}_peak_gb": peak["gb"], "parameters": sum(p.numel() for p in policy.parameters())}
            if not np.isfinite(row[f"{name}_loss"]):
                raise Failed(f"expected a finite loss, found {row}")
            del policy
        return row

    def engines(self) -> dict[str, Any]:
        """TensorRT engines of the reference policy, their parity and latency."""
        need("tensorrt")
        exported, engines = self.work / "tensorrt", self.work / "engines"
        self.rlrc("export", ROOT / "reference/compressed", exported, "--to", "tensorrt")
        self.rlrc("jetson", "build", exported, "--engine-cache", engines)
        verified = json.loads(self.rlrc("verify", exported, "--backend", "tensorrt", "--json"))
        latency = json.loads(self.rlrc("bench", "latency", exported, "--trials", "100", "--json"))
        return {"verified": verified, "latency": latency["rows"]}


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(name=module)


def apart(one: Path, other: Path) -> float:
    """The largest difference of two artifacts' weights, as a part of the largest weight of the tensor."""
    first, second = (open_tensors(artifacts.load(path)) for path in (one, other))
    parts = []
    for name in first:
        a, b = first[name].float(), second[name].float()
        parts.append(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)))
    return round(max(parts), 5)


def pruned_openvla(where: torch.device, small: bool) -> PolicyModule:
    """OpenVLA-7B's geometry with a tenth of the inner blocks' heads and channels, random bfloat16 matrices.

    ``small``: three blocks in each tower.
    """
    layout = reader.layout(*geometry.folder("openvla-7b"))
    towers = dict(layout.towers)
    first, *inner, last = towers["decoder"].layers
    left = LayerSpec(4, 4, first.head_dim, round(first.mlp * (1 - LEFT) / 32) * 32)
    layers = (first, *[left] * len(inner), last)
    towers["decoder"] = replace(towers["decoder"], layers=layers)
    if small:
        towers = {name: replace(tower, layers=tower.layers[:3]) for name, tower in towers.items()}
    policy = build_on_meta(layout.spec, towers)
    generator = torch.Generator(where).manual_seed(0)
    for name, tensor in policy.state_dict().items():
        matrix = tensor.ndim == 2
        values = torch.randn(tensor.shape, generator=generator, device=where) * (tensor.shape[-1] ** -0.5)
        set_tensor(policy, name, values.bfloat16() if matrix else (values + 1 if name.endswith("weight") else values))
    return policy


def batch_of(policy: PolicyModule, where: torch.device) -> Batch:
    spec = policy.spec
    inputs = inputs_of(spec, random_observation(policy), 0)
    actions = torch.rand(1, spec.action.horizon, spec.action.dim) * 2 - 1
    return draw_noise(policy, Batch(inputs, actions)).to(where)


def random_observation(policy: PolicyModule) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    pictures = {
        f"image.{camera.name}": random.integers(0, 256, (1, camera.height, camera.width, 3), np.uint8)
        for camera in policy.spec.cameras
    }
    return {**pictures, "ids": random.integers(1, 1000, (1, 24))}


def lora_step(policy: PolicyModule, batch: Batch) -> float:
    lora.adapt(policy, 16)
    optimizer = build_optimizer(policy, 5e-4, 0.01)
    loss, _ = chunk_loss(policy, batch)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def ppo_step(policy: PolicyModule, batch: Batch) -> float:
    """With adapters, since the moments of all weights take 16 bytes each."""
    lora.adapt(policy, 16)
    objective = PolicyObjective(build_actor(policy), PPOConfig())
    optimizer = build_optimizer(policy, 1e-5, 0.0)
    with torch.no_grad():
        observation = objective.actor.encode(batch.inputs)
        sampled = objective.actor.act(observation, True)[1]
        old = objective(observation, sampled)
    advantage = torch.ones(len(batch), device=old.log_prob.device)
    loss, _ = objective(observation, sampled, old.log_prob, advantage, 1.0, batch)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@contextmanager
def peak_of(where: torch.device) -> Iterator[dict[str, float]]:
    """The most memory of the device that tensors took within the context, GB; 0 on the CPU."""
    found = {"gb": 0.0}
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    yield found
    if where.type == "cuda":
        found["gb"] = round(torch.cuda.max_memory_allocated(where) / 1e9, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", help="cpu runs the check itself, with fewer blocks")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--only", nargs="+", default=[])
    given = parser.parse_args()
    where = devices.pick(given.device)
    with tempfile.TemporaryDirectory() as folder:
        check = Check(given.device, given.seconds, Path(folder))
        parts = (check.tests, check.reference, check.large, check.engines, check.reinforcement)
        for part in parts:
            if not given.only or part.__name__ in given.only:
                check.run(part.__name__, part)
    result = {"device": devices.describe(where), "machine": machine.describe(), "rows": check.rows}
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row["verdict"] == "FAIL" for row in check.rows))


if __name__ == "__main__":
    sys.exit(main())

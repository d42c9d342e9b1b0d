"""Two processes that train together do what one would do, and leave one artifact; a killed run goes on unharmed.

Processes talk through gloo on the CPU. FSDP2 runs there as well, but accelerate only turns it on for accelerators: the
test turns it on by hand.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subprocesses import environment
from torch import Tensor

from rlrc import artifact as artifacts
from rlrc.compressor.rl.rollout_buffer import minibatches
from rlrc.compressor.stages.artifact_io import open_tensors

SFT = ("sft", "--steps", "100", "--demonstrations", "1", "--state-noise", "0")
RL = ("rl", "--warmup", "1", "--demonstrations", "1", "--behaviour-batch", "4", "--minibatch", "16")
QUIET = ("--evaluate", "0", "--workers", "1", "--threads", "1", "--json")

# rlrc in a process of its own: with episodes of ten steps, with FSDP, and telling every process's weights.
SCRIPT = """
import os, sys
from functools import partial
import torch
from rlrc.compressor.rl import ppo
from rlrc.compressor.stages import stage as stages
from rlrc.compressor.training.distributed import Team
from rlrc.compressor.rl.rollout import SamplingMode

ppo.SamplingMode = partial(SamplingMode, horizon=int(os.environ.get("STEPS", 200)))
prepare, finish = Team.prepare, stages.Stage.finish

def fsdp(team, module, optimizer):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FSDPModule

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    module, optimizer = prepare(team, module, optimizer)
    assert team.is_sharded(module)
    groups = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    blocks = [name for name, _ in module.named_modules() if name.endswith("decoder.layers.1")]
    assert set(blocks) <= set(groups), groups  # block by block; the critic has none
    return module, optimizer

def telling(work, policy, *rest, **more):
    torch.save(policy.state_dict(), os.environ["WEIGHTS"] + os.environ.get("RANK", "0"))
    return finish(work, policy, *rest, **more)

if __name__ == "__main__":
    from rlrc.runtime.cli import main

    if os.environ.get("FSDP"):
        Team.prepare = fsdp
    if os.environ.get("WEIGHTS"):
        stages.Stage.finish = telling
    sys.exit(main())
"""


@pytest.fixture
def script(tmp_path: Path, own_cache: Path, demos: Any) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def launched(script: Path, processes: int, *arguments: str, **more: str) -> dict[str, Any]:
    """By torchrun, as accelerate launches processes on GPUs, or in one process; -> what the command prints."""
    command = [sys.executable, str(script), *arguments, *QUIET]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        command, env=environment(OMP_NUM_THREADS="1", **more), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1  # one process tells
    told: dict[str, Any] = json.loads(lines[0])
    return told


def curve(out: Path) -> list[dict[str, Any]]:
    (file,) = (out / "curves").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def tensors(out: Path) -> dict[str, Tensor]:
    return dict(open_tensors(artifacts.load(out)))


def weights(prefix: Path) -> Iterator[dict[str, Tensor]]:
    for rank in range(2):
        yield torch.load(f"{prefix}{rank}", weights_only=True)


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> bool:
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name].float(), b[name].float(), atol=tolerance, rtol=0) for name in a)


def test_minibatches_of_processes_are_all_decisions_once() -> None:
    """Five, none and two decisions in steps of two: the weighted means, averaged, are the mean over what is there."""
    counts, values = [5, 0, 2], [np.arange(5.0), np.array([99.0]), np.array([10.0, 20.0])]
    orders = [torch.tensor([4, 2, 0, 1, 3]), torch.tensor([0]), torch.tensor([1, 0])]
    steps = [list(minibatches(counts, rank, 2, orders[rank])) for rank in range(3)]
    assert [len(own) for own in steps] == [3, 3, 3]
    means = [sum(values[r][steps[r][i][0]].mean() * steps[r][i][1] for r in range(3)) / 3 for i in range(3)]
    assert means == pytest.approx([(4 + 2 + 20 + 10) / 4, (0 + 1) / 2, 3.0])
    alone = list(minibatches([5], 0, 2, orders[0]))
    assert [(rows.tolist(), weight) for rows, weight in alone] == [([4, 2], 1.0), ([0, 1], 1.0), ([3], 1.0)]


@pytest.mark.slow
def test_sft_of_two_processes_is_that_of_one_with_twice_the_batch(
    script: Path, pupil_artifact: Path, tmp_path: Path
) -> None:
    """DDP and FSDP2: the same losses, and the same weights in both processes and in the artifact."""
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    launched(script, 1, *SFT, str(pupil_artifact), str(one), "--batch", "16")
    told = launched(script, 2, *SFT, str(pupil_artifact), str(two), "--batch", "8", WEIGHTS=str(tmp_path / "ddp"))
    launched(script, 2, *SFT, str(pupil_artifact), str(parts), "--batch", "8", FSDP="1", WEIGHTS=str(tmp_path / "fsdp"))
    assert told["stage"] == "sft"
    alone = curve(one)
    assert [row["step"] for row in alone] == [50, 100]
    for other in (curve(two), curve(parts)):
        # l1 is that of the likeliest bins: one that flips in bfloat16 counts for 4e-4 of a step. The norm shows that
        # gradients are averaged, which AdamW would hide: summed ones would be twice as long.
        for name, tolerance in (("loss", 1e-4), ("l1", 2e-3), ("gradient_norm", 1e-2)):
            assert [row[name] for row in other] == pytest.approx([row[name] for row in alone], rel=tolerance), name
    for prefix, out in (("ddp", two), ("fsdp", parts)):
        first, second = weights(tmp_path / prefix)
        assert close(first, second, 0)
        assert close({name: tensor.bfloat16() for name, tensor in first.items()}, tensors(out), 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["", "1"], ids=["ddp", "fsdp"])
def test_ppo_of_two_processes(script: Path, pupil_artifact: Path, tmp_path: Path, fsdp: str) -> None:
    """Each plays its share; both end with the same weights, which have moved, and one tells what all of them met."""
    out, arguments = tmp_path / "out", ("--iterations", "2", "--episodes", "5", "--target-kl", "10")
    more = {"STEPS": "20", "WEIGHTS": str(tmp_path / "w")} | ({"FSDP": fsdp} if fsdp else {})
    launched(script, 2, *RL, str(pupil_artifact), str(out), *arguments, **more)
    first, second = weights(tmp_path / "w")
    assert close(first, second, 0)
    before = {name: tensor.float() for name, tensor in tensors(pupil_artifact).items()}
    moved = {name for name in before if not torch.equal(before[name], first[name])}
    assert {name.split(".")[0] for name in moved} == {"embedding", "state", "query", "decoder", "head"}
    rows = curve(out)
    assert [(row["step"], row["episodes"]) for row in rows] == [(1, 5), (2, 5)]
    # 20 decisions at most in both together: three episodes of four, two of four; 16 a step in one of them.
    assert rows[1]["updates"] == 2
    assert rows[1]["approx_kl"] > 0
    assert close({name: tensor.bfloat16() for name, tensor in first.items()}, tensors(out), 0)


@pytest.mark.slow
def test_killed_by_the_system_and_resumed_is_uninterrupted(script: Path, pupil_artifact: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the third of four iterations; the workers die with it, and the same command goes on."""
    arguments = ("--iterations", "4", "--episodes", "4")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launched(script, 1, *RL, str(pupil_artifact), str(whole), *arguments, STEPS="20")
    command = [sys.executable, str(script), *RL, str(pupil_artifact), str(cut), *arguments, *QUIET]
    process = subprocess.Popen(
        command, env=environment(OMP_NUM_THREADS="1", STEPS="20"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines = tmp_path / ".cut.run" / "curve.jsonl"
    deadline = time.monotonic() + 300
    while not lines.exists() or len(lines.read_text().splitlines()) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not cut.exists()
    launched(script, 1, *RL, str(pupil_artifact), str(cut), *arguments, STEPS="20")
    measured = ("cpu_seconds", "environment_steps_per_second")
    first, second = (
        [{k: v for k, v in row.items() if k not in measured} for row in curve(out)] for out in (whole, cut)
    )
    assert first == second
    assert close(tensors(whole), tensors(cut), 0)

"""What the robot side costs besides the model: what it imports, how long that takes, and its overhead per inference."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import pytest

from rlrc.runtime.inference.policy import LocalPolicy

NEVER = ("torch", "transformers", "onnx", "torchvision", "safetensors")


def python(code: str, *arguments: str) -> Any:
    """Runs the code in a fresh interpreter with this one's search path; returns what it prints last as JSON."""
    code = f"import sys; sys.path[:0] = {[path for path in sys.path if path]}\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def imported(code: str, *arguments: str) -> set[str]:
    """The top-level packages that are imported when the code has run."""
    report = "\nimport json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    return set(python(textwrap.dedent(code) + report, *arguments))


def test_inference_never_imports_torch(toy_artifact: Path) -> None:
    packages = imported(
        """
        import numpy as np
        from pathlib import Path
        from rlrc.runtime.inference import verify
        from rlrc.runtime.inference.policy import LocalPolicy
        path = Path(sys.argv[1])
        policy = LocalPolicy.load(path)
        golden = verify.read_golden(path / "golden.npz", policy.spec)
        policy.infer(golden.observation(0, policy.spec))
        verify.measure(policy, golden, verify.Tolerances(0.001))
        """,
        str(toy_artifact),
    )
    assert {"onnxruntime", "tokenizers", "numpy", "PIL"} <= packages
    assert not packages & set(NEVER)


def test_serving_and_asking_never_import_torch_nor_the_other_protocols() -> None:
    packages = imported("import rlrc.runtime.cli.serve, rlrc.runtime.servers.client")
    assert "websockets" in packages
    assert not packages & {*NEVER, "aiohttp", "grpc", "onnxruntime"}
    assert not imported("import rlrc.runtime.servers.gr00t, rlrc.runtime.servers.lerobot") & set(NEVER)


def test_closing_the_loop_never_imports_torch(metaworld_toy: Path) -> None:
    packages = imported(
        """
        from pathlib import Path
        from rlrc.runtime.cli.run import RunPolicy
        RunPolicy(Path(sys.argv[1]), "metaworld:window-close-v3", hz=0, json=True).run()
        """,
        str(metaworld_toy),
    )
    assert {"onnxruntime", "mujoco", "gymnasium"} <= packages
    assert not packages & set(NEVER)


def test_replaying_a_data_set_never_imports_torch() -> None:
    packages = imported("import rlrc.datasets.fit, rlrc.robots.recorder, rlrc.robots.replay, rlrc.runtime.cli.run")
    assert "pyarrow" in packages
    assert not packages & set(NEVER)


@pytest.mark.timing
@pytest.mark.parametrize(
    "module",
    ["rlrc.runtime", "rlrc.runtime.inference.policy", "rlrc.runtime.control.episodes", "rlrc.runtime.inference.verify"],
)
def test_import_takes_less_than_400_ms(module: str) -> None:
    code = f"""
        from time import perf_counter
        started = perf_counter()
        import {module}
        print(perf_counter() - started)
        """
    seconds = min(python(code) for _ in range(5))  # the best: what others do on this machine is not our cost
    assert seconds < 0.4, f"{module} took {seconds:.3f} s"


@pytest.mark.timing
def test_overhead_is_below_2_ms(
    make_toy: Callable[..., Path], tiny_manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything besides the two graphs, at the 99th percentile, for one 96 px camera and changing instructions."""
    spec = tiny_manifest.policy
    spec = replace(spec, cameras=(replace(spec.cameras[0], height=96, width=96),))
    policy = LocalPolicy.load(make_toy(tmp_path / "toy", spec=spec))
    golden = np.load(tmp_path / "toy/golden.npz")
    observations = [
        {"image.corner4": image, "state": state, "instruction": str(instruction)}
        for image, state, instruction in zip(
            golden["image.corner4"], golden["state"], golden["instructions"], strict=True
        )
    ]

    # CPU time: on a machine with busy neighbours a call in a hundred loses the core for 4 ms, which is not our cost.
    in_graphs = 0.0
    run = policy.engine.run

    def timed(*arguments: Any) -> Any:
        nonlocal in_graphs
        started = thread_time()
        outputs = run(*arguments)
        in_graphs += thread_time() - started
        return outputs

    monkeypatch.setattr(policy.engine, "run", timed)

    def overhead(observation: dict[str, Any]) -> float:
        nonlocal in_graphs
        started, in_graphs = thread_time(), 0.0
        policy.infer(observation)
        return (thread_time() - started - in_graphs) * 1e3

    milliseconds = [overhead(observations[i % 8]) for i in range(1000)]
    assert min(milliseconds) > 0.01  # the clock is fine enough to see it
    assert np.percentile(milliseconds, 99) < 2

"""A policy in a separate process that computes an action on request, for interleaved measurements of several policies.

Each has separate memory and libraries. While one computes, the others wait and use no processor time.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np

from rlrc import artifact as artifacts
from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.benchmarks.claims import roofline
from rlrc.benchmarks.measure import latency
from rlrc.benchmarks.measure.memory import read_process
from rlrc.errors import UserError
from rlrc.processes import describe_exit, die_with_parent

if TYPE_CHECKING:
    from rlrc.compressor.models.policy import PolicyModule

WAIT_S = 900.0  # timeout of loading a policy of 15 GB, or of one action on a busy machine
Parts = dict[str, float]
Infer = Callable[[], object]
Open = Callable[..., tuple[Infer, Parts]]


@dataclass(frozen=True)
class ActionTimes:
    """Milliseconds: ``total`` of the whole call, ``parts`` by ``latency.part_of``, ``cpu`` summed over processors.
    ``faults``: pages read from disk, as happens where memory is short.
    """

    total: float
    parts: dict[str, float]
    cpu: float
    faults: int


class PolicyProcess:
    """``open_policy(*arguments)``, picklable, is called in the process. It returns a function that computes an action
    and a dict that receives the times of its passes.

    Raises UserError if the policy cannot be opened or the process ends.
    """

    def __init__(self, name: str, open_policy: Open, arguments: tuple[Any, ...]) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would share memory and copy locks of libraries
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=_main, args=(remote, open_policy, arguments), daemon=True)
        self._process.start()
        remote.close()  # so that the other end reports EOF when the process dies
        try:
            self._receive_reply()
        except BaseException:
            self.close()
            raise

    def act(self) -> ActionTimes:
        values = self._request("act")
        return ActionTimes(**values)

    def memory(self) -> dict[str, int]:
        """Bytes, see rlrc.benchmarks.measure.memory. ``file`` pages can be dropped and read again."""
        return self._request("memory")

    def peak(self, kind: str) -> float:
        """Operations a second of products in this type; only for ``open_in_torch``."""
        return float(self._request(f"peak {kind}")["peak"])

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _request(self, message: str) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # receiving the reply reports how the process ended
            self._connection.send_bytes(message.encode())
        return self._receive_reply()

    def _receive_reply(self) -> dict[str, Any]:
        try:
            if not self._connection.poll(WAIT_S):
                raise UserError(
                    f"expected {self.name} to reply within {WAIT_S:g} s, found no reply; the machine is "
                    "overloaded: run the command again"
                )
            reply: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            self._process.join()
            raise UserError(
                f"expected the process of {self.name} to keep running, found that it ended by "
                f"{describe_exit(self._process.exitcode)}; check that there is enough memory"
            ) from None
        if "error" in reply:
            raise UserError(reply["error"])
        return reply


def _main(connection: Connection, open_policy: Open, arguments: tuple[Any, ...]) -> None:
    die_with_parent()

    def reply(values: Mapping[str, Any]) -> None:
        connection.send_bytes(json.dumps(values).encode())

    try:
        infer, passes = open_policy(*arguments)
    except UserError as error:
        reply({"error": str(error)})
        return
    reply({})
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            message = connection.recv_bytes().decode()
            if message == "memory":
                reply(read_process())
            elif message.startswith("peak "):
                reply({"peak": products_in_torch(message.removeprefix("peak "))})
            else:
                passes.clear()
                faults, spent, started = _faults(), process_time(), perf_counter()
                infer()
                total, cpu = (perf_counter() - started) * 1e3, (process_time() - spent) * 1e3
                reply({"total": total, "parts": dict(passes), "cpu": cpu, "faults": _faults() - faults})


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def observation_of(spec: PolicySpec, words: int) -> dict[str, Any]:
    """Noise in the policy's shapes and an instruction of ``words`` words (see random_weights.write_tokenizer)."""
    random = np.random.default_rng(0)
    observation: dict[str, Any] = {"instruction": " ".join(f"w{i}" for i in range(3, 3 + words))}
    for camera in spec.cameras:
        observation[f"image.{camera.name}"] = random.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
    if spec.state is not None:
        observation["state"] = random.uniform(-1, 1, len(spec.state.names)).astype(np.float32)
    return observation


def time_call(passes: Parts, kind: str, call: Callable[[], Any]) -> Any:
    started = perf_counter()
    result = call()
    passes[kind] = passes.get(kind, 0.0) + (perf_counter() - started) * 1e3
    return result


def open_exported(path: str, threads: int, words: int) -> tuple[Infer, Parts]:
    """Load an artifact's graphs, including unverified ones."""
    from rlrc.runtime.inference.policy import LocalPolicy

    policy, parts = LocalPolicy(artifacts.load(Path(path), verify=()), threads), Parts()
    policy.engine = latency.TimedEngine(policy.engine, parts)
    observation = observation_of(policy.spec, words)
    return lambda: policy.infer(observation), parts


def faster_torch_type(_: object = None) -> str:
    """The type, "fp32" or "bf16", in which torch multiplies by weights faster on this processor."""
    from rlrc.compressor.models import precision

    return {"float32": "fp32", "bfloat16": "bf16"}[precision.pick_for_inference()]


def _dtype(kind: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]


def open_in_torch(
    spec: PolicySpec, towers: dict[str, TowerSpec], threads: int, words: int, kind: str
) -> tuple[Infer, Parts]:
    """Build a policy in "fp32" or "bf16" with random weights, without files."""
    import os

    os.environ["OMP_WAIT_POLICY"] = "passive"  # idle threads must not spin and take processor time from others
    import torch

    from rlrc.benchmarks.claims import random_weights
    from rlrc.compressor.checkpoints.torch_policy import TorchPolicy
    from rlrc.runtime.inference.preprocess import Tokenizer

    torch.set_num_threads(threads)
    dtype = _dtype(kind)
    policy, passes = random_weights.build_in_torch(spec, towers, dtype), Parts()
    time_passes(policy, dtype, passes)
    tokenizer = None
    if policy.spec.prompt is not None:
        with random_weights.tokenizer_file(policy.spec) as file:
            tokenizer = Tokenizer(file, policy.spec.prompt)
    runner, observation = TorchPolicy(policy.spec, tokenizer, lambda: policy), observation_of(policy.spec, words)
    return lambda: runner.infer(observation), passes


def time_passes(policy: PolicyModule, dtype: Any, passes: Parts) -> None:
    """Time the passes of a torch policy, and cast their inputs to the type of the weights."""

    def narrow(value: Any) -> Any:
        return value.to(dtype) if hasattr(value, "is_floating_point") and value.is_floating_point() else value

    def wrap(name: str, kind: Callable[[tuple[Any, ...]], str], times_stay: int | None = None) -> None:
        call = getattr(policy, name)

        def call_timed(*arguments: Any) -> Any:
            inputs = [value if i == times_stay else narrow(value) for i, value in enumerate(arguments)]
            return time_call(passes, kind(arguments), lambda: call(*inputs))

        setattr(policy, name, call_timed)

    wrap("encode_image", lambda _: "vision")
    if policy.spec.decode == "autoregressive":
        wrap("step", lambda arguments: "decode" if arguments[2] else "prefill")
    elif policy.spec.decode == "parallel":
        wrap("decode", lambda _: "prefill")
    else:
        wrap("prefix", lambda _: "prefix")
        wrap("velocity", lambda _: "steps", times_stay=4)


def products_in_torch(kind: str) -> float:
    """Operations a second of a large product in "fp32" or "bf16" on torch's threads: the best of several calls."""
    import torch

    a, b = (torch.ones(shape, dtype=_dtype(kind)) for shape in ((512, 4096), (4096, 4096)))
    return roofline.fastest(lambda: a @ b.T, 2.0 * 512 * 4096**2, torch.get_num_threads())

"""A policy in a process of its own that makes an action when it is told to: what several policies are measured with in
turns, each with its own memory and libraries.

While one of them computes, the others wait for their turn and take no processor time.
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

WAIT_S = 900.0  # for a policy of 15 GB to be read, and for an action of it on a busy machine
Parts = dict[str, float]
Infer = Callable[[], object]
Open = Callable[..., tuple[Infer, Parts]]


@dataclass(frozen=True)
class ActionTimes:
    """Milliseconds: ``total`` of the whole call, ``parts`` by ``latency.part_of``, ``cpu`` of all processors together.
    ``faults``: pages that had to be read from the disk, as where memory is short.
    """

    total: float
    parts: dict[str, float]
    cpu: float
    faults: int


class PolicyProcess:
    """``open_policy(*arguments)``, picklable, gives in the process what makes an action and the times of its passes.

    Raises UserError if the policy cannot be opened, or its process ends.
    """

    def __init__(self, name: str, open_policy: Open, arguments: tuple[Any, ...]) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would share memory, and copy locks of the libraries
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, open_policy, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that ours reports the end of the file when it dies
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def act(self) -> ActionTimes:
        values = self._ask("act")
        return ActionTimes(**values)

    def memory(self) -> dict[str, int]:
        """Bytes: see rlrc.benchmarks.measure.memory. What is ``file`` can be dropped and read again."""
        return self._ask("memory")

    def peak(self, kind: str) -> float:
        """Operations a second of products in this type; for a worker of ``open_in_torch``."""
        return float(self._ask(f"peak {kind}")["peak"])

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _ask(self, what: str) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # the answer tells how it ended
            self._connection.send_bytes(what.encode())
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            if not self._connection.poll(WAIT_S):
                raise UserError(
                    f"expected {self.name} to answer within {WAIT_S:g} s, found that it did not; the machine is "
                    "overloaded: run the command again"
                )
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            self._process.join()
            raise UserError(
                f"expected the process of {self.name} to go on, found that it ended by "
                f"{describe_exit(self._process.exitcode)}; is there memory enough for it?"
            ) from None
        if "error" in answer:
            raise UserError(answer["error"])
        return answer


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
            asked = connection.recv_bytes().decode()
            if asked == "memory":
                reply(read_process())
            elif asked.startswith("peak "):
                reply({"peak": products_in_torch(asked.removeprefix("peak "))})
            else:
                passes.clear()
                faults, spent, started = _faults(), process_time(), perf_counter()
                infer()
                total, cpu = (perf_counter() - started) * 1e3, (process_time() - spent) * 1e3
                reply({"total": total, "parts": dict(passes), "cpu": cpu, "faults": _faults() - faults})


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def observation_of(spec: PolicySpec, words: int) -> dict[str, Any]:
    """Noise in the policy's own size, and an instruction of so many words (see random_weights.write_tokenizer)."""
    random = np.random.default_rng(0)
    seen: dict[str, Any] = {"instruction": " ".join(f"w{i}" for i in range(3, 3 + words))}
    for camera in spec.cameras:
        seen[f"image.{camera.name}"] = random.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
    if spec.state is not None:
        seen["state"] = random.uniform(-1, 1, len(spec.state.names)).astype(np.float32)
    return seen


def time_call(passes: Parts, kind: str, call: Callable[[], Any]) -> Any:
    started = perf_counter()
    result = call()
    passes[kind] = passes.get(kind, 0.0) + (perf_counter() - started) * 1e3
    return result


def open_exported(path: str, threads: int, words: int) -> tuple[Infer, Parts]:
    """An artifact's graphs, unverified ones too."""
    from rlrc.runtime.inference.policy import LocalPolicy

    policy, parts = LocalPolicy(artifacts.load(Path(path), verify=()), threads), Parts()
    policy.engine = latency.TimedEngine(policy.engine, parts)
    observation = observation_of(policy.spec, words)
    return lambda: policy.infer(observation), parts


def faster_torch_type(_: object = None) -> str:
    """The type, "fp32" or "bf16", in which torch multiplies by weights more quickly on this processor."""
    from rlrc.compressor.models import precision

    return {"float32": "fp32", "bfloat16": "bf16"}[precision.pick_for_inference()]


def _dtype(kind: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]


def open_in_torch(
    spec: PolicySpec, towers: dict[str, TowerSpec], threads: int, words: int, kind: str
) -> tuple[Infer, Parts]:
    """A policy in "fp32" or "bf16" with random weights, which no file has to be read for."""
    import os

    os.environ["OMP_WAIT_POLICY"] = "passive"  # idle threads must not spin: others may have the processor
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
    """Times the passes of a torch policy, and gives them what they take in the weights' type."""

    def narrow(value: Any) -> Any:
        return value.to(dtype) if hasattr(value, "is_floating_point") and value.is_floating_point() else value

    def wrap(name: str, kind: Callable[[tuple[Any, ...]], str], times_stay: int | None = None) -> None:
        call = getattr(policy, name)

        def call_narrow(*arguments: Any) -> Any:
            given = [value if i == times_stay else narrow(value) for i, value in enumerate(arguments)]
            return time_call(passes, kind(arguments), lambda: call(*given))

        setattr(policy, name, call_narrow)

    wrap("encode_image", lambda _: "vision")
    if policy.spec.decode == "autoregressive":
        wrap("step", lambda arguments: "decode" if arguments[2] else "prefill")
    elif policy.spec.decode == "parallel":
        wrap("decode", lambda _: "prefill")
    else:
        wrap("prefix", lambda _: "prefix")
        wrap("velocity", lambda _: "steps", times_stay=4)


def products_in_torch(kind: str) -> float:
    """Operations a second of a large product in "fp32" or "bf16" on torch's threads: the best of several."""
    import torch

    a, b = (torch.ones(shape, dtype=_dtype(kind)) for shape in ((512, 4096), (4096, 4096)))
    return roofline.fastest(lambda: a @ b.T, 2.0 * 512 * 4096**2, torch.get_num_threads())

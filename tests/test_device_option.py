"""What --device means on this machine, and that stages compute there and write from the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import flags, official, source_of
from rlrc import artifact as artifacts
from rlrc.compressor.checkpoints.torch_policy import TorchPolicy
from rlrc.compressor.models import device
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.stages import prune, quantize, sensitivity
from rlrc.compressor.stages.stage import Stage, StageOptions
from rlrc.compressor.training import distributed
from rlrc.errors import UserError
from rlrc.runtime.cli import main

META = torch.device("meta")
QUIET = StageOptions(evaluate=0, workers=1, threads=1, precision="float32")


class Arrived(Exception):
    """The work of a stage would begin."""


@pytest.fixture(autouse=True)
def _unchosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is chosen before, and the choice of a test ends with it."""
    for name in ("ACCELERATE_USE_CPU", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device, "_chosen", None)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two of them, by what torch says. -> the devices that were made the current one"""
    current = list[torch.device]()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    return current


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch.accelerator, torch.cuda, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)


def test_auto_takes_the_accelerator(two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.pick("auto") == device.current() == torch.device("cuda", 0)
    assert device.pick("cuda:1") == device.use("cuda:1") == device.current() == torch.device("cuda", 1)
    assert two_gpus == [torch.device("cuda", 1)]
    assert device.use("cpu") == torch.device("cpu")
    assert len(two_gpus) == 1
    assert device.describe(torch.device("cuda", 1)) == "cuda (NVIDIA H200)"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.pick("auto") == device.pick("cuda") == torch.device("cuda", 1)


@pytest.mark.usefixtures("no_gpu")
def test_auto_without_an_accelerator() -> None:
    assert device.pick("auto") == device.pick("cpu") == torch.device("cpu")
    assert device.describe(device.current()) == "cpu"


@pytest.mark.usefixtures("two_gpus")
def test_training_follows_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (distributed.devices(), distributed._use_cpu()) == (("cpu", "cuda"), False)
    device.use("cpu")
    assert (distributed.devices(), distributed._use_cpu()) == (("cpu",), True)
    monkeypatch.setattr(device, "_chosen", None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert (distributed.devices(), distributed._use_cpu()) == (("cpu",), True)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("option", "built", "message"),
    [
        (
            "cuda",
            None,
            "expected a CUDA device for --device cuda, found cpu-only torch .*; install a CUDA build of torch",
        ),
        (
            "cuda:1",
            "12.8",
            "expected a CUDA device for --device cuda:1, found none that torch .* can use; see what nvi",
        ),
        ("mps", None, "expected a Mac's GPU for --device mps, found none; leave --device out, or give --device cpu"),
        ("gpu", None, "expected --device auto, cpu, cuda, cuda:N or mps, found 'gpu'"),
        ("cuda:-1", None, "expected --device auto, cpu, cuda, cuda:N or mps, found 'cuda:-1'"),
    ],
)
def test_a_device_that_is_not_there(
    option: str, built: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(UserError, match=message) as caught:
        StageOptions(device=option)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("two_gpus")
def test_a_number_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="expected --device from cuda:0 to cuda:1, found cuda:2"):
        device.pick("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="auto, cpu or cuda with several processes, found cuda:1; each takes one"):
        device.pick("cuda:1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(UserError, match="cpu or auto with accelerate launch --cpu, found cuda; leave out either"):
        device.pick("cuda")


def test_the_history_says_where_it_was_computed(tiny_artifact: Path, tmp_path: Path) -> None:
    prune.run_prune(tiny_artifact, tmp_path / "out", PruneConfig(0.5, "magnitude"), replace(QUIET, device="cpu"))
    assert artifacts.load(tmp_path / "out").manifest.history[-1].device == "cpu"
    assert artifacts.load(tiny_artifact).manifest.history[-1].device == ""


def where(policy: PolicyModule) -> set[torch.device]:
    return {tensor.device for tensor in policy.state_dict().values()}


def test_prune_scores_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of official weights with a data set; what needs no data stays on the CPU."""
    seen = list[set[torch.device]]()

    def spy(policy: PolicyModule, *_: Any) -> Any:
        seen.append(where(policy))
        raise Arrived

    monkeypatch.setattr(Stage, "device", META)
    monkeypatch.setattr(prune.pruning, "prune", spy)
    monkeypatch.setattr(prune, "check_data", lambda *_: None)
    monkeypatch.setattr("rlrc.compressor.stages.stage.Stage.demonstrations", lambda *_: [0])
    checkpoint = source_of("act").folder.path
    for i, score in enumerate(("taylor", "magnitude")):
        with pytest.raises(Arrived):
            prune.run_prune(checkpoint, tmp_path / str(i), PruneConfig(0.5, score, keep=0), QUIET)  # type: ignore[arg-type]
    assert seen == [{META}, {torch.device("cpu")}]


def test_quantize_calibrates_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spy(policy: PolicyModule, config: QuantizeConfig, calibration: Iterator[Inputs], *_: Any) -> Any:
        assert where(policy) == {pixels.device for inputs in calibration for pixels in inputs.pixels} == {META}
        raise Arrived

    monkeypatch.setattr(Stage, "device", META)
    monkeypatch.setattr(quantize, "quantize", spy)
    with pytest.raises(Arrived):
        quantize.run_quantize(source_of("pi0").folder.path, tmp_path / "out", QuantizeConfig(), QUIET, flags("pi0"))


def test_sensitivity_is_measured_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spy(policy: PolicyModule, inputs: Inputs) -> Any:
        assert where(policy) == {pixels.device for pixels in inputs.pixels} == {META}
        raise Arrived

    source = source_of("smolvla")
    monkeypatch.setattr("rlrc.compressor.models.flow.FlowPolicy.act", spy)
    with pytest.raises(Arrived):
        sensitivity.measure(source, "name", sensitivity.SensitivityConfig(), tmp_path / "journal", META)


def test_infer_moves_the_observation_to_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    source, policy = official("act")

    def spy(policy: PolicyModule, inputs: Inputs) -> Any:
        assert inputs.pixels[0].device == META
        raise Arrived

    monkeypatch.setattr("rlrc.compressor.models.act.ACTPolicy.act", spy)
    observation = {name: array[0] for name, array in source.observations().items()}
    runner = TorchPolicy(policy.spec, None, lambda: type(policy)(policy.spec, policy.towers).to(META))
    with pytest.raises(Arrived):
        runner.infer(observation)


def test_commands_know_the_option(tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "obs.npz", state=np.zeros(7, np.float32))
    infer = ["infer", str(tiny_artifact), str(tmp_path / "obs.npz"), "--out", str(tmp_path / "act.npz")]
    assert main([*infer, "--device", "cpu"]) == 2
    assert (
        "expected --device with an official checkpoint, which torch runs, found the artifact" in capsys.readouterr().err
    )
    out = str(tmp_path / "out")
    for command in (
        ["prune", str(tiny_artifact), out],
        ["sft", str(tiny_artifact), out],
        ["distill", str(tiny_artifact), out, "--teacher", str(tiny_artifact)],
        ["rl", str(tiny_artifact), out],
        ["quantize", str(tiny_artifact), out],
        ["compress", str(tiny_artifact), out],
        ["sensitivity", str(tiny_artifact), "--out", out],
        ["compare-grids", str(tiny_artifact)],
    ):
        assert main([*command, "--device", "tpu"]) == 2, command
        assert "expected --device auto, cpu, cuda, cuda:N or mps, found 'tpu'" in capsys.readouterr().err


def test_evaluation_plays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlrc.compressor.rl.simulation import Simulation

    class Played:
        def run(self, requests: Any, policy: PolicyModule, mode: Any) -> Any:
            assert where(policy) == {META}
            raise Arrived

    monkeypatch.setattr(device, "current", lambda: META)
    with pytest.raises(Arrived):
        Simulation(Played(), 1).evaluate(source_of("act").load())  # type: ignore[arg-type]

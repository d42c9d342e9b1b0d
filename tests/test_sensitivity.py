"""The sensitivity report: every kind of change against a policy that was changed in another way, and the command."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlrc import artifact as artifacts
from rlrc import strict
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.sensitivity import Sensitivity
from rlrc.compressor.models.families import build
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.prune.sensitivity_report import (
    KINDS,
    SensitivityReport,
    SensitivityRow,
    errors_by_block,
    load_report,
)
from rlrc.compressor.quantize.grid import decompress
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize
from rlrc.compressor.stages import sensitivity as module
from rlrc.compressor.stages.sensitivity import (
    SensitivityConfig,
    action_change,
    apply_change,
    make_batches,
    measure,
    part_of,
    perturbations,
)
from rlrc.compressor.stages.sources import ArtifactSource, OfficialSource
from rlrc.errors import UserError

DATA = Path(__file__).parent / "data"
OPENVLA = DATA / "openvla/checkpoint"
TOKENIZERS = {"act": None, "openvla": OPENVLA, "openvla-oft-l1": OPENVLA, "smolvla": DATA / "smolvla/tiny_smolvlm"}


@pytest.fixture
def source(tiny_artifact: Path) -> ArtifactSource:
    return ArtifactSource(artifacts.load(tiny_artifact))


@pytest.fixture
def report(source: ArtifactSource, tmp_path: Path) -> SensitivityReport:
    return measure(source, "tiny", SensitivityConfig(), tmp_path / "journal")


def error_of(report: SensitivityReport, kind: str, name: str) -> float:
    (row,) = (row for row in report.modules if (row.kind, row.module) == (kind, name))
    return row.error


def by_hand(dense: PolicyModule, changed: PolicyModule, source: ArtifactSource) -> float:
    """Mean |difference| of the bins' centres weighted with their probabilities, in numpy."""
    observations, answers = source.observations(), []
    centers = (np.arange(32) + 0.5) / 16 - 1
    for policy in (dense, changed):
        with torch.no_grad():
            outputs = [policy.act(module.inputs_of(source.spec, observations, row)) for row in range(8)]
        logits = np.concatenate([output.logits.double().numpy() for output in outputs if output.logits is not None])
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        answers.append((weight * centers).sum(-1) / weight.sum(-1))
    return float(np.abs(answers[1] - answers[0]).mean())


def with_state(policy: PolicyModule, state: dict[str, Tensor], layers: tuple[Any, ...]) -> PolicyModule:
    towers = policy.towers | {"decoder": replace(policy.towers["decoder"], layers=layers)}
    changed = build(policy.spec, towers)
    changed.load_state_dict(state)
    return changed.eval()


def test_pruned_is_a_smaller_block(source: ArtifactSource, report: SensitivityReport) -> None:
    """Two of four heads and 64 of 128 channels of the first block, by the sums of their weights, cut out by hand."""
    policy, block = source.load(), "decoder.layers.0"
    state = dict(policy.state_dict())

    def weight(name: str) -> Tensor:
        return state[f"{block}.{name}.weight"].float()

    heads = torch.stack([weight(f"attention.{name}").abs().view(4, -1).sum(1) for name in "qkv"]).sum(0)
    heads += weight("attention.o").abs().sum(0).view(4, 16).sum(1)
    rows = torch.cat([torch.arange(16) + 16 * head for head in heads.argsort()[2:].sort().values])
    channels = weight("mlp.gate").abs().sum(1) + weight("mlp.up").abs().sum(1) + weight("mlp.down").abs().sum(0)
    kept = channels.argsort()[64:].sort().values
    for name in "qkv":
        state[f"{block}.attention.{name}.weight"] = weight(f"attention.{name}")[rows]
    state[f"{block}.attention.o.weight"] = weight("attention.o")[:, rows]
    for name in ("gate", "up"):
        state[f"{block}.mlp.{name}.weight"] = weight(f"mlp.{name}")[kept]
    state[f"{block}.mlp.down.weight"] = weight("mlp.down")[:, kept]
    first, *others = policy.towers["decoder"].layers
    pruned = with_state(policy, state, (replace(first, heads=2, kv_heads=2, mlp=64), *others))
    expected = by_hand(policy, pruned, source)
    assert expected > 1e-3
    assert error_of(report, "prune", block) == pytest.approx(expected, rel=1e-3)


def test_dropped_is_a_policy_without_the_block(source: ArtifactSource, report: SensitivityReport) -> None:
    policy, state = source.load(), dict[str, Tensor]()
    for name, tensor in policy.state_dict().items():
        if not name.startswith("decoder.layers.1."):
            state[name.replace("decoder.layers.2.", "decoder.layers.1.")] = tensor
    first, _, last = policy.towers["decoder"].layers
    expected = by_hand(policy, with_state(policy, state, (first, last)), source)
    assert expected > 1e-3
    assert error_of(report, "drop", "decoder.layers.1") == pytest.approx(expected, rel=1e-3)


def test_quantized_is_what_the_stage_makes(source: ArtifactSource, report: SensitivityReport) -> None:
    policy, name = source.load(), "decoder.layers.2.mlp"
    state = dict(policy.state_dict())
    stored = decompress(*quantize(state, QuantizeConfig())[:2])
    state |= {tensor: stored[tensor] for tensor in state if tensor.startswith(name)}
    expected = by_hand(policy, with_state(policy, state, policy.towers["decoder"].layers), source)
    assert expected > 1e-4
    assert error_of(report, "quantize", name) == pytest.approx(expected, rel=1e-2)


def test_what_is_measured(source: ArtifactSource, report: SensitivityReport, tmp_path: Path) -> None:
    """Blocks are dropped and pruned; attentions, MLPs and other layers are rounded."""
    assert (report.source, report.digest, report.observations) == ("tiny", source.digest, 8)
    assert Counter(row.kind for row in report.modules) == {"drop": 4, "prune": 4, "quantize": 11}
    names = {row.module for row in report.modules if row.kind == "quantize"}
    assert {"head", "projector", "vision.layers.0.attention", "decoder.layers.1.mlp"} <= names
    sizes = {row.module: row.parameters for row in report.modules}
    assert sizes["decoder.layers.0.mlp"] == 3 * 64 * 128
    assert sizes["decoder.layers.1"] == 2 * 64 * 32 + 2 * 64 * 16 + 3 * 64 * 64 + 2 * 64
    finer = measure(source, "tiny", SensitivityConfig(bits=8, kinds=("quantize",)), tmp_path / "finer")
    assert len(finer.modules) == 11
    assert all(row.error < 0.5 * error_of(report, "quantize", row.module) for row in finer.modules)


def test_parts() -> None:
    assert part_of("decoder.layers.3.attention.q.weight") == "decoder.layers.3.attention"
    assert part_of("expert.layers.3.norm1.dense.weight") == "expert.layers.3.norm1"
    assert part_of("head.weight") == "head"
    assert part_of("vision.stem.steps.1.weight") == "vision.stem.steps.1"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_family_and_nothing_is_left_changed(name: str, tmp_path: Path) -> None:
    golden = json.loads((DATA / name / "golden.json").read_text())
    key = golden["observations"][0].get("unnorm_key")
    images = 2 if name == "openvla-oft-l1" else None
    found = OfficialSource(
        DATA / name / "checkpoint", Flags(DATA / name / "golden.json", key, TOKENIZERS[name], images)
    )
    policy = found.load()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in policy.state_dict().items()}
    found.load = lambda: policy  # type: ignore[method-assign]
    report = measure(found, name, SensitivityConfig(observations=2), tmp_path / "journal")
    for tensor, (address, values) in before.items():
        now = policy.state_dict()[tensor]
        assert now.data_ptr() == address, tensor
        assert torch.equal(now, values), tensor
    assert not any(block._forward_hooks for block in policy.modules())
    for tower in {"decoder", "expert", "encoder"} & set(policy.towers):
        whole = [i for i, layer in enumerate(policy.towers[tower].layers) if layer.kind != "half"]
        for kind in ("drop", "prune"):
            assert list(errors_by_block(report, kind, tower)) == whole
    # Of flow policies what the prefix's last block adds is read by nobody; all else matters.
    silent = {f"{row.kind} {row.module}" for row in report.modules if row.error == 0}
    assert all(".layers." in row for row in silent)
    assert len(silent) <= 3


def test_batches_answer_as_single_observations(source: ArtifactSource) -> None:
    policy, observations = source.load(), source.observations()
    singles = [module.inputs_of(source.spec, observations, row) for row in range(8)]
    short = replace(singles[0], ids=singles[0].ids[:, :2] if singles[0].ids is not None else None)
    joined = make_batches([*singles, short])
    assert [len(inputs.pixels[0]) for inputs in joined] == [8, 1]
    with torch.no_grad():
        together = policy.act(joined[0]).actions
        apart = torch.cat([policy.act(inputs).actions for inputs in singles])
    torch.testing.assert_close(together, apart)


def test_change_of_actions_by_hand() -> None:
    before, after = torch.tensor([[[0.25, 0.5]]]), torch.tensor([[[0.5, float("nan")]]])
    assert action_change([before], [after]) == pytest.approx((0.25 + 2) / 2)  # what is no number: the range


def test_interrupted_measurement_goes_on(
    source: ArtifactSource, report: SensitivityReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def counting(*given: Any) -> float:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append("")
        return action_change(*given)

    journal = tmp_path / "cut"
    monkeypatch.setattr(module, "action_change", counting)
    with pytest.raises(KeyboardInterrupt):
        measure(source, "tiny", SensitivityConfig(), journal)
    with journal.open("a") as file:
        file.write('{"module": "hea')  # killed while it wrote
    monkeypatch.setattr(module, "action_change", lambda *given: measured.append("") or action_change(*given))
    assert measure(source, "tiny", SensitivityConfig(), journal) == report
    assert len(measured) == len(report.modules)
    measured.clear()
    measure(source, "tiny", SensitivityConfig(ratio=0.4, kinds=("prune",)), journal)  # another question
    assert len(measured) == 4


def test_report_file_round_trip_and_per_layer(tmp_path: Path) -> None:
    rows = (
        SensitivityRow("decoder.layers.3", "prune", 0.5, 10),
        SensitivityRow("decoder.layers.10", "prune", 0.25, 10),
        SensitivityRow("decoder.layers.3.attention", "quantize", 0.125, 5),
        SensitivityRow("decoder.layers.3.mlp", "quantize", 0.25, 5),
        SensitivityRow("decoder2.layers.0.mlp", "quantize", 1.0, 5),
        SensitivityRow("head", "quantize", 1.0, 5),
    )
    report, file = SensitivityReport("sensitivity", "x", None, 0.5, 4, 8, rows), tmp_path / "s.json"
    file.write_text(json.dumps(strict.encode(report)))
    assert load_report(file) == report
    assert errors_by_block(report, "prune", "decoder") == {3: 0.5, 10: 0.25}
    assert errors_by_block(report, "quantize", "decoder") == {3: 0.375}
    with pytest.raises(UserError, match=r"expected blocks of the decoder with the kind drop .* --kinds drop"):
        errors_by_block(report, "drop", "decoder")
    for text, message in (
        ("[]", "expected an object .* in .*s.json; make it again with rlrc sensitivity"),
        ("{", "expected JSON.* make it again with rlrc sensitivity"),
        (json.dumps({**strict.encode(report), "kind": "latency"}), 'expected .*"?sensitivity.* make it again'),
        (json.dumps({**strict.encode(report), "more": 1}), "found more, which is unknown.* make it again"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_report(file)
    with pytest.raises(UserError, match=r"expected a sensitivity report at .*none\.json, found: No such file"):
        load_report(tmp_path / "none.json")


@pytest.mark.parametrize("wrong", [{"ratio": 1.0}, {"kinds": ()}, {"observations": 0}], ids=str)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"expected --{next(iter(wrong))}.*found"):
        SensitivityConfig(**wrong)


def test_change_is_undone_after_an_exception(pupil: PolicyModule) -> None:
    before = copy.deepcopy(pupil.state_dict())
    for change in perturbations(pupil, SensitivityConfig()):
        with pytest.raises(KeyboardInterrupt), apply_change(pupil, change):
            raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in pupil.state_dict().items())
    assert not any(block._forward_hooks for block in pupil.modules())


def test_the_command_writes_and_draws(
    tiny_artifact: Path, tiny_int4_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "made" / "s.json", tmp_path / "s.svg"
    command = Sensitivity(tiny_artifact, out, picture, SensitivityConfig(observations=2), threads=1)
    command.run()
    report = load_report(out)
    assert {row.kind for row in report.modules} == set(KINDS)
    assert [path.name for path in out.parent.iterdir()] == ["s.json"]
    assert "OUT --allocation sensitivity --sensitivity" in capsys.readouterr().out
    texts = {element.text for element in ET.parse(picture).iter() if element.text}
    assert {"decoder", "vision", "dropped", "50% pruned", "4 bits attention", "4 bits mlp", "head"} <= texts
    with pytest.raises(UserError, match="expected a new output"):
        command.run()
    with pytest.raises(UserError, match="expected an unquantized artifact, found int4"):
        replace(command, path=tiny_int4_artifact, out=tmp_path / "q.json", picture=None).run()
    assert artifacts.load(tiny_artifact).digest == report.digest

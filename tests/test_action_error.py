"""What rounding does to actions: the measure, the exceptions that it chooses, all grids side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlrc.compressor.models.decode import outputs_from_logits
from rlrc.compressor.models.policy import Inputs, Outputs, PolicyModule
from rlrc.compressor.quantize import compare
from rlrc.compressor.quantize.action_error import ActionError, soft_actions
from rlrc.compressor.quantize.grid import decompress
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize
from rlrc.errors import UserError
from rlrc.runtime.cli import main

Golden = tuple[Any, list[Inputs]]  # a policy and observations
Official = Callable[[str], Golden]


def act(policy: PolicyModule, inputs: list[Inputs]) -> list[Outputs]:
    with torch.inference_mode():
        return [policy.act(one) for one in inputs]


# Action error


def test_action_error_by_hand(official_policy: Official) -> None:
    """ACT's head adds its bias to every action: where one dimension is moved by 0.25, the mean is 0.25 / dim."""
    policy, inputs = official_policy("act")
    bias = policy.state_dict()["head.bias"].clone()
    bias[0] += 0.25
    error = ActionError(policy, inputs)
    assert error.measure({"head.bias": bias}) == pytest.approx(0.25 / len(bias), rel=1e-4)
    assert error.measure({}) == 0


def test_of_tokens_the_expected_action_is_compared(tiny_policy: Golden) -> None:
    policy, inputs = tiny_policy
    logits = torch.cat([output.logits for output in act(policy, inputs) if output.logits is not None])
    weights = np.exp(logits.double().numpy())
    centers = (np.arange(32) + 0.5) / 16 - 1
    expected = (weights * centers).sum(-1) / weights.sum(-1)
    np.testing.assert_allclose(ActionError(policy, inputs).expected.numpy(), expected, atol=1e-6)


def test_rows_of_a_vocabulary_are_those_of_its_bins(official_policy: Official) -> None:
    policy, _ = official_policy("openvla")
    action = policy.spec.action
    assert action.tokens is not None
    logits = torch.full((action.bins, action.horizon, action.dim, action.tokens.rows), -50.0)
    for b in range(action.bins):
        logits[b, ..., action.tokens.first - b - action.tokens.offset] = 50.0
    outputs = outputs_from_logits(logits, action)
    torch.testing.assert_close(soft_actions(policy, outputs), outputs.actions)
    assert len(outputs.actions[:, 0, 0].unique()) == action.bins


def test_flow_policies_start_from_the_same_noise(official_policy: Official) -> None:
    policy, inputs = official_policy("pi0")
    error = ActionError(policy, [replace(one, noise=None) for one in inputs])
    assert error.measure({}) == 0
    noises = [one.noise for one in error.inputs if one.noise is not None]
    assert not torch.equal(noises[0], noises[1])


def test_exceptions_are_the_greedy_choice(tiny_policy: Golden) -> None:
    policy, inputs = tiny_policy
    result = quantize(policy, QuantizeConfig(budget=0.2), inputs)
    state, four = policy.state_dict(), quantize(policy, QuantizeConfig())
    error = ActionError(policy, inputs)
    alone, cost = {}, {}
    for name, tensor in decompress(four.tensors, four.spec).items():
        if name in four.spec.tensors:
            alone[name], cost[name] = error.measure({name: tensor}), state[name].numel() // 2
    left, expected = 0.2 * sum(cost.values()) * 4.5 / 4, []
    for name in sorted(alone, key=lambda name: -alone[name] / cost[name]):
        if cost[name] <= left:
            left -= cost[name]
            expected.append(name)
    assert [one["tensor"] for one in result.report["exceptions"]] == expected
    assert 0 < len(expected) < len(alone)
    assert {name for name, bits in result.spec.tensors.items() if bits == 8} == set(expected)
    for one in result.report["exceptions"]:
        assert one["action_error"] == pytest.approx(alone[one["tensor"]])
        assert one["bytes"] == cost[one["tensor"]]
    assert result.report["action_error"] < result.report["action_error_without_exceptions"]
    assert result.report["bytes"] - four.report["bytes"] == sum(cost[name] for name in expected)


def test_a_budget_of_all_bytes_leaves_nothing_in_four_bits(tiny_policy: Golden) -> None:
    policy, inputs = tiny_policy
    result = quantize(policy, QuantizeConfig(budget=1.0), inputs)
    assert set(result.spec.tensors.values()) == {8}
    assert result.spec.grid == "int8"


# Side by side


def test_grids_side_by_side(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare-grids", str(tiny_artifact), "--threads", "1", "--json"]) == 0
    rows = {row["grid"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["rtn", "awq", "gptq", "nf4", "int8"]
    assert rows["int8"]["bytes"] / rows["rtn"]["bytes"] == pytest.approx(8.5 / 4.5)
    assert rows["nf4"]["bytes"] == rows["rtn"]["bytes"] == rows["gptq"]["bytes"]
    for error in ("weight_error", "output_error", "action_error"):
        assert rows["int8"][error] < 0.2 * min(rows[grid][error] for grid in ("rtn", "awq", "gptq", "nf4"))
    assert rows["gptq"]["weight_error"] > rows["rtn"]["weight_error"]  # it trades that for outputs
    assert main(["compare-grids", str(tiny_artifact), "--threads", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["grid", *rows]


def test_compare_measures_on_what_it_did_not_calibrate_on(tiny_policy: Golden) -> None:
    policy, inputs = tiny_policy
    (first, *_) = compare.compare(policy, inputs)
    rounded = quantize(policy, QuantizeConfig())
    change = decompress(rounded.tensors, rounded.spec)
    change = {name: change[name] for name in rounded.spec.tensors}
    assert first.action_error == pytest.approx(ActionError(policy, inputs[1::2]).measure(change))


# Bad input


def damaged(inputs: Inputs, field: str) -> Inputs:
    if field == "pixels":
        return replace(inputs, pixels=[torch.full_like(inputs.pixels[0], float("nan"))])
    change: dict[str, Any] = {field: torch.full((1, 3), float("inf"))}
    return replace(inputs, **change)


@pytest.mark.parametrize("field", ["pixels", "state"])
def test_observations_with_nan_are_refused(tiny_policy: Golden, field: str) -> None:
    policy, inputs = tiny_policy
    with pytest.raises(UserError, match=rf"finite numbers in calibration observation 1, found NaN .* in its {field}"):
        quantize(policy, QuantizeConfig(method="gptq"), [inputs[0], damaged(inputs[1], field)])


def test_no_observations_are_refused(tiny_policy: Golden) -> None:
    with pytest.raises(UserError, match="expected calibration observations, found none"):
        ActionError(tiny_policy[0], [])
    with pytest.raises(UserError, match="expected a policy and calibration observations"):
        quantize(tiny_policy[0], QuantizeConfig(method="awq"), iter(()))


def test_a_policy_without_actions_is_refused(tiny_policy: Golden) -> None:
    policy, inputs = tiny_policy
    with torch.no_grad():
        policy.state_dict()["head.weight"].fill_(1e38)
    with pytest.raises(UserError, match="expected finite actions"):
        ActionError(policy, inputs)


@pytest.mark.parametrize("flag", [["--budget", "2"], ["--method", "awk"], ["--bits", "3"]])
def test_impossible_flags_are_one_line(flag: list[str], tiny_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["quantize", str(tiny_artifact), str(tmp_path / "out"), *flag]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()

"""One artifact's graphs against another's: the same observations, errors put in by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc import artifact as artifacts
from rlrc.errors import UserError
from rlrc.runtime.cli import agreement
from rlrc.runtime.cli.policy import Verify
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.policy import LocalPolicy

MakeToy = Callable[..., Path]
COMPRESSED = Path(__file__).parents[1] / "reference/compressed"


def moved(toy: Any, steps: int) -> Any:
    """The toy with the first dimension's 32 bins moved on."""
    head = toy.head.reshape(-1, 3, 4, 32).copy()
    head[:, :, 0] = np.roll(head[:, :, 0], steps, -1)
    return replace(toy, head=head.reshape(toy.head.shape))


def test_the_other_artifact_gives_the_answers(make_toy: MakeToy, toy: Any, toy_artifact: Path, tmp_path: Path) -> None:
    policy = LocalPolicy.load(toy_artifact)
    other = LocalPolicy.load(make_toy(tmp_path / "other", weights=moved(toy, 1)), require_verified=False)
    golden = verify.read_golden(toy_artifact / "golden.npz", policy.spec)
    reference = agreement.replay(other, golden)
    assert golden.tokens is not None
    assert reference.tokens is not None
    assert (reference.tokens[..., 0] == (golden.tokens[..., 0] + 1) % 32).all()
    for name, images in golden.images.items():
        assert np.array_equal(reference.images[name], images)
    record = agreement.measure(policy, reference)
    assert (record.token_flips, record.range_tolerance) == (8 * 3, 0.01)
    largest = np.abs((golden.tokens[..., 0] + 1) % 32 - golden.tokens[..., 0]).max() / 32
    np.testing.assert_allclose(record.range_error, [largest, 0, 0, 0], atol=1e-6)


def test_what_cannot_be_compared_is_refused(make_toy: MakeToy, toy_artifact: Path, tmp_path: Path) -> None:
    policy = LocalPolicy.load(toy_artifact)
    spec = replace(policy.spec, cameras=(replace(policy.spec.cameras[0], name="wrist"),))
    other = LocalPolicy.load(make_toy(tmp_path / "other", spec=spec))
    with pytest.raises(UserError, match="expected the same cameras in"):
        agreement.check_comparable(policy, other)
    with pytest.raises(UserError, match="expected --against with --env"):
        Verify(toy_artifact, env=("metaworld:drawer-open-v3",)).run()
    with pytest.raises(UserError, match="expected 1 to 100000 episodes, found 0"):
        Verify(toy_artifact, against=toy_artifact, env=("metaworld:drawer-open-v3",), episodes=0).run()


def test_on_the_simulators_observations(capsys: pytest.CaptureFixture[str]) -> None:
    """The reference policy against itself: every chunk of an episode agrees."""
    pytest.importorskip("metaworld")
    env = ("metaworld:drawer-open-v3",)
    assert Verify(COMPRESSED, against=COMPRESSED, env=env, episodes=1, json=True).run() == 0
    (record,) = json.loads(capsys.readouterr().out)["verified"]
    chunk = artifacts.load(COMPRESSED, verify=()).manifest.policy.action.horizon
    assert record["observations"] >= 3  # a drawer is not opened in two chunks
    assert record["tokens"] == record["observations"] * chunk * 4
    assert (record["token_flips"], record["range_tolerance"]) == (0, 0.02)


def test_disagreement_is_exit_code_1(
    make_toy: MakeToy, toy: Any, toy_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_toy(tmp_path / "other", weights=moved(toy, 1))
    record = replace(artifacts.load(other).manifest.verified[0], max_error=(0.0, 0.0, 0.0, 0.0))
    other = make_toy(tmp_path / "believed", weights=moved(toy, 1), verified=(record,))
    assert Verify(toy_artifact, against=other).run() == 1
    assert "of the range where 1.00% is tolerated" in capsys.readouterr().err

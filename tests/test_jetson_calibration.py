"""The planner against published measurements that it did not see."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from rlrc.jetson.model import calibration, roofline
from rlrc.jetson.model.calibration import PredictionRow
from rlrc.runtime import cli


@pytest.fixture(scope="module")
def rows() -> list[PredictionRow]:
    return calibration.leave_one_out()


def errors(rows: list[PredictionRow], which: str, listed: bool) -> dict[str, float]:
    return calibration.summary([getattr(row, which) for row in rows if row.measurement.listed or not listed])


@pytest.mark.parametrize("which", ["own_error", "untold_error"])
@pytest.mark.parametrize("listed", [True, False])
def test_unseen_measurements_are_predicted(rows: list[PredictionRow], which: str, listed: bool) -> None:
    found = errors(rows, which, listed)
    assert found["median_error"] < 0.25
    assert found["worst_ratio"] < 2


def test_the_constants_in_use_are_the_fit_to_all() -> None:
    fitted = calibration.fit()
    assert fitted.compiled == pytest.approx(roofline.COMPUTE["compiled"], rel=0.01)
    assert fitted.plain == pytest.approx(roofline.COMPUTE["plain"], rel=0.01)
    assert (fitted.side, fitted.bandwidth) == (roofline.SIDE, roofline.BANDWIDTH)


def test_a_prediction_is_blind_to_its_own_measurement() -> None:
    """One decision measured twice, once three times as long: the fit without either is the other's."""
    measured = calibration.measurements()
    once = next(one for one in measured if one.program == "tensorrt")
    plain = next(one for one in measured if one.stack == "plain")
    grid = calibration._Grid((once, replace(once, ms=once.ms * 3), plain))
    without_slow, without_fast = grid.fit(1), grid.fit(0)
    assert without_slow == calibration._Grid((once, plain)).fit()
    assert without_slow.compiled > 2 * without_fast.compiled


def test_summaries_by_hand() -> None:
    assert calibration.summary([0.5, -0.5, 0.1]) == {"median_error": 0.5, "worst_ratio": 2.0}


def test_every_measurement_says_where_it_is_from() -> None:
    measured = calibration.measurements()
    assert sum(one.listed for one in measured) == 9
    assert all(one.source and one.ms > 0 for one in measured)
    keys = [(one.geometry, one.device, one.precision, one.source) for one in measured]
    assert len(keys) == len(set(keys))


def test_the_report_repeats_them(capsys: pytest.CaptureFixture[str], rows: list[PredictionRow]) -> None:
    assert cli.main(["jetson", "calibration", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["rows"]) == len(rows)
    found = np.array([row["own_error"] for row in values["rows"]])
    assert found == pytest.approx(np.array([row.own_error for row in rows]))
    assert cli.main(["jetson", "calibration"]) == 0
    printed = capsys.readouterr().out
    assert "Every prediction is by a fit without that measurement." in printed
    assert f"all ({len(rows)})" in printed

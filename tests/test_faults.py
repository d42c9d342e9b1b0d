"""The fault matrix at 20 Hz, in real processes and real time: a hold within two periods, nothing but holds after."""

from __future__ import annotations

import pytest

from rlrc.benchmarks.control import faults

REASONS = {
    "frozen camera": "image.wrist is",
    "repeated frame": "image.wrist has not changed",
    "missing camera": "no picture image.wrist",
    "stale state": "the state is",
    "silent robot": "the state is",
    "lost robot": "the arm does not answer",
    "nan": "nan in elbow",
    "infinity": "inf in elbow",
    "wrong shape": "expected floats",
    "out of range": "position of elbow",
    "velocity jump": "velocity of elbow",
    "hang": "inference has not answered for 0.5 s",
    "crash": "inference ended",
    "no action": "no action: expected finite logits",
    "guard exception": "ZeroDivisionError: injected",
    "clock jump": "the state is 10",
    "clock back": "in the future",
    "inference killed": "inference ended",
    "full disk": "the recording failed: No space left on device",
    "sense gives a tuple": "the driver's sense gave tuple, expected Sensed or None",
    "sense gives no stamp": "the driver's sense gave NoneType None, expected a stamp in seconds",
    "sense gives a list": "the driver's sense gave list, expected an observation with names",
    "sense is a generator": "the driver's sense is a generator, expected a plain function",
    "state of objects": "object (2,) as state, expected floats (2,)",
    "picture without a stamp": "gave stamps of none for the pictures image.wrist",
    "SystemExit in sense": "the driver failed: SystemExit: 3",
    "KeyboardInterrupt in sense": "the driver failed: KeyboardInterrupt",
    "SystemExit in command": "the driver failed: SystemExit: 3",
    "KeyboardInterrupt in command": "the driver failed: KeyboardInterrupt",
    "SystemExit in stop": "the arm does not take commands",
    "hang in sense": "the driver's sense has not returned for",
    "hang in command": "the driver's command has not returned for",
    "hang in hold": "the arm does not answer",
    "frozen state": "lead of",
    "jumping state": "jump of",
    "scaled state": "jump of",
    "reversed state": "jump of",
    "wrapped angle": "jump of",
    "Ctrl-C twice": "asked to stop: signal SIGINT",
}
JITTER_MS = 8.0  # a shared machine may begin a step so late


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_is_held_within_two_periods(fault: str) -> None:
    outcome = faults.inject(fault, hz=20.0)
    assert outcome.hold_ms <= 2 * 50 + JITTER_MS
    assert outcome.after == 0
    assert outcome.moving_at_end == 0
    assert outcome.rest_ms <= outcome.hold_ms + 100
    assert REASONS[fault] in str(outcome.reason)


def test_every_fault_has_its_row() -> None:
    assert set(faults.FAULTS) == set(REASONS)

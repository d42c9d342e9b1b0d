"""Sends the servers all messages that fuzzing has found (tests/data/fuzz, tests/robustness/fuzz.py) and valid ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fuzz_targets import PROTOCOLS, Target, seeds

FOUND = Path(__file__).parent / "data/fuzz"
# Valid messages that are refused: kill, bad noise, another token, an encoded body.
NO_ACTIONS = {"gr00t": 1, "lerobot": 0, "openpi": 1, "openvla": 0, "stop": 2, "page": 2}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_was_found_is_answered_or_refused(protocol: str) -> None:
    async def send() -> list[str | None]:
        target = await Target.open(protocol)
        try:
            for path in sorted((FOUND / protocol).glob("*")):
                await asyncio.wait_for(target.send(path.read_bytes()), 10)
            return [await target.send(message) for message in seeds(protocol)]
        finally:
            await target.close()

    refusals = asyncio.run(send())
    assert len(refusals) - refusals.count(None) == NO_ACTIONS[protocol], refusals

"""The golden checkpoints in the official formats, for all tests that go through every family."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.stages.sources import OfficialSource

DATA = Path(__file__).parent / "data"
FAMILIES = ("act", "openvla", "openvla-oft-l1", "openvla-oft-discrete", "pi0", "pi05", "smolvla")
TOKENIZERS = {"smolvla": "smolvla/tiny_smolvlm", "pi0": "pi0/tokenizer", "pi05": "pi05/tokenizer"}


def flags(name: str) -> Flags:
    """What must be said about the checkpoint of this name to read it."""
    golden = json.loads((DATA / name / "golden.json").read_text())
    return Flags(
        hints=DATA / name / "golden.json",
        unnorm_key=golden["observations"][0].get("unnorm_key"),
        tokenizer=None if name == "act" else DATA / TOKENIZERS.get(name, "openvla/checkpoint"),
        images={"openvla-oft-l1": 2, "openvla-oft-discrete": 1}.get(name),
    )


def source_of(name: str) -> OfficialSource:
    return OfficialSource(DATA / name / "checkpoint", flags(name))


@cache
def official(name: str) -> tuple[OfficialSource, PolicyModule]:
    """The checkpoint of this name and its policy, which nobody changes."""
    source = source_of(name)
    return source, source.load()

"""Settings that neither a flag nor a recipe gives: by the policy's family, its size and what is trained.

The values are those of the families' own training scripts, each with its source: defaults.toml. The reference policy's
are the defaults of its configuration (SFTConfig, PPOConfig).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from rlrc import strict
from rlrc.compressor.models.precision import PrecisionOption
from rlrc.compressor.models.tiny import FAMILY as REFERENCE

FILE = Path(__file__).with_suffix(".toml")
LARGE = 1_000_000_000  # parameters: weights, gradients and AdamW's moments take 16 GB (rlrc.compressor.stages.memory)
OURS = "rlrc's reference policy"


@dataclass(frozen=True)
class Setting:
    value: int | float | str
    source: str
    """repository, file and the setting's name there"""


@dataclass(frozen=True)
class FamilySettings:
    """Of one family, by the names of SFTOptions and PPOOptions."""

    sft: dict[str, Setting]
    """whatever is trained; ``lora`` is for policies of more than LARGE parameters, ``precision`` is --precision"""
    lora: dict[str, Setting] = field(default_factory=dict)
    """if adapters are trained"""
    all: dict[str, Setting] = field(default_factory=dict)
    """if all weights are trained"""
    rl: dict[str, Setting] = field(default_factory=dict)


Chosen = dict[str, Setting]


@runtime_checkable
class Options(Protocol):
    """SFTOptions, DistillOptions or PPOOptions."""

    STAGE: ClassVar[str]

    def completed(self, values: Mapping[str, Any]) -> Any: ...


@cache
def table() -> dict[str, FamilySettings]:
    """The settings of every family but the reference policy's."""
    return strict.read_toml(dict[str, FamilySettings], FILE)


def complete(options: Any, family: str, parameters: int) -> tuple[Any, Chosen]:
    """-> the complete configuration, and the settings that were not given, in the order of the fields.

    Raises UserError if what was given does not go with a default.
    """
    missing = [entry.name for entry in dataclasses.fields(options) if getattr(options, entry.name) is None]
    chosen = _settings(options, family, parameters) if family != REFERENCE else {}
    config = cast(Options, options).completed({name: chosen[name].value for name in missing if name in chosen})
    unused = {"decay"} if getattr(config, "schedule", None) == "cosine" else set[str]()
    return config, {
        name: chosen.get(name, Setting(getattr(config, name), OURS)) for name in missing if name not in unused
    }


def precision(family: str) -> Setting:
    """The precision of matrix products that the family is trained in; "auto": the faster one."""
    return table()[family].sft["precision"] if family != REFERENCE else Setting("auto", "the faster one here")


def precision_option(family: str) -> PrecisionOption:
    return cast(PrecisionOption, precision(family).value)


def _settings(options: Any, family: str, parameters: int) -> Chosen:
    settings = table()[family]
    if options.STAGE == "rl":
        return settings.rl
    lora = Setting(0, f"all of its {parameters:,} weights: {LARGE:,} or fewer, or its authors train them all")
    if "lora" in settings.sft and parameters > LARGE:
        lora = settings.sft["lora"]
    rank = lora.value if options.lora is None else options.lora
    chosen = settings.sft | (settings.lora if rank else settings.all) | {"lora": lora}
    steps, warmup = chosen["steps"].value, chosen["warmup"]
    assert isinstance(steps, int)
    assert isinstance(warmup.value, int)
    if options.steps is not None and warmup.value and options.steps < steps:
        chosen["warmup"] = Setting(warmup.value * options.steps // steps, f"{warmup.source}, of {steps:,} steps")
    return chosen


def format_lines(stage: str, chosen: Chosen) -> list[str]:
    """A line for each setting: "sft default: rate 0.0005 (openvla/openvla vla-scripts/finetune.py: learning_rate)"."""
    return [f"{stage} default: {name} {setting.value} ({setting.source})" for name, setting in chosen.items()]

"""Changes that make an impossible plan possible. Each one is tried before it is suggested."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlrc.jetson.model.devices import device, table
from rlrc.jetson.model.memory import weight_bytes
from rlrc.jetson.model.plan import Plan, Setting, plan, prune
from rlrc.jetson.model.precision import PRECISIONS

ROUNDED = ("int8", "fp8", "int4", "fp4")  # in the order of what they cost in accuracy
LARGEST_RATIO = 0.95


@dataclass(frozen=True)
class Suggestion:
    """``setting``: the plan's with the suggestion applied, which fits, is not refused and holds the rate."""

    text: str
    setting: Setting


def suggest(found: Plan, hz: float | None) -> list[Suggestion]:
    """None for a possible plan. If nothing holds the rate, changes that make the plan possible without a rate."""
    if found.possible:
        return []
    tried = [suggestion for way in WAYS for suggestion in way(found, hz)]
    if tried or hz is None:
        return tried
    return [suggestion for way in WAYS for suggestion in way(replace(found, deadline_ms=None), None)]


def shortfall(found: Plan, suggestions: list[Suggestion], hz: float | None) -> str | None:
    """Why no suggestion holds the rate; None if one does, or without a requested rate."""
    if hz is None or found.possible or any(_works(suggestion.setting, hz) for suggestion in suggestions):
        return None
    least = replace(found.setting, precision=PRECISIONS["int4"])
    milliseconds = plan(prune(least, LARGEST_RATIO)).prediction.latency_ms
    return (
        f"no change holds {hz:g} Hz on {found.setting.device.name}: int4 with {LARGEST_RATIO:.0%} of the "
        f"intermediate blocks pruned still takes {milliseconds:,.0f} ms of the {found.deadline_ms or 0:,.0f} there are"
    )


def _works(setting: Setting, hz: float | None) -> bool:
    return plan(setting, hz).possible


def _mode(found: Plan, hz: float | None) -> Iterator[Suggestion]:
    setting = found.setting
    if setting.device.sm is None:
        return
    fastest = replace(setting, device=device(setting.device.name))
    if fastest.device.mode != setting.device.mode and _works(fastest, hz):
        yield Suggestion(f"set the power mode {fastest.device.mode} (nvpmodel)", fastest)


def _fewer_bits(setting: Setting) -> Iterator[Setting]:
    for name in ROUNDED:
        if PRECISIONS[name].bits < setting.precision.bits or setting.precision.name in ("fp8", "fp4", "fp16"):
            yield replace(setting, precision=PRECISIONS[name])


def _precision(found: Plan, hz: float | None) -> Iterator[Suggestion]:
    """The precision with the most bits that works; bf16 is tried first where fp16 is refused."""
    tried = [replace(found.setting, precision=PRECISIONS["bf16"])] if found.refusals else []
    for setting in [*tried, *_fewer_bits(found.setting)]:
        if setting.precision != found.setting.precision and _works(setting, hz):
            stage = {"int4": "rlrc quantize ART OUT", "int8": "rlrc quantize ART OUT --bits 8"}
            how = f": {stage[setting.precision.name]}" if setting.precision.name in stage else ""
            yield Suggestion(f"{setting.precision.name} instead of {found.setting.precision.name}{how}", setting)
            return


def _steps(found: Plan, hz: float | None) -> Iterator[Suggestion]:
    setting, flow = found.setting, found.setting.policy.flow
    if flow is None or found.holds is not False:
        return
    for steps in range((setting.load.steps or flow.steps) - 1, 0, -1):
        fewer = replace(setting, load=replace(setting.load, steps=steps))
        if _works(fewer, hz):
            yield Suggestion(f"{steps} flow steps instead of {flow.steps}; measure the success again", fewer)
            return


def _pruning(found: Plan, hz: float | None) -> Iterator[Suggestion]:
    """The smallest ratio that works in this precision, else together with int4."""
    for setting in (found.setting, replace(found.setting, precision=PRECISIONS["int4"])):
        ratio = _smallest(setting, hz)
        if ratio is None:
            continue
        cut = prune(setting, ratio)
        size = sum(weight_bytes(part, cut.precision) for part in cut.work.parts)
        counted = "int4" if cut.precision.name == "int4" else "bf16"
        stored = sum(weight_bytes(part, PRECISIONS[counted]) for part in cut.work.parts)
        bits = "" if setting is found.setting else " and int4"
        yield Suggestion(
            f"prune {ratio:.0%} of the heads and channels of the intermediate blocks{bits}: rlrc prune ART OUT "
            f"--to-bytes {stored / 1e9:.2f}GB --to-bytes-in {counted}, then rlrc sft (weights {size / 1e9:.2f} GB)",
            cut,
        )
        return


def _smallest(setting: Setting, hz: float | None) -> float | None:
    """The smallest working ratio, in hundredths; None if the largest does not work."""
    low, high = 0, round(LARGEST_RATIO * 100)
    if not _works(prune(setting, high / 100), hz):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _works(prune(setting, middle / 100), hz) else (middle, high)
    return high / 100


def _sequential(found: Plan, hz: float | None) -> Iterator[Suggestion]:
    setting = replace(found.setting, sequential=True)
    if found.prediction.memory.fits or setting.device.sm is None or not _works(setting, hz):
        return
    after = plan(setting, hz).prediction
    yield Suggestion(
        f"one engine resident at a time: {after.memory.peak / 1e9:.2f} GB instead of "
        f"{found.prediction.memory.peak / 1e9:.2f}, but {after.latency_ms:,.0f} ms a decision: it reads all of them",
        setting,
    )


def _device(found: Plan, hz: float | None) -> Iterator[Suggestion]:
    """The smallest device that works without another change."""
    by_memory = sorted(table().devices.items(), key=lambda item: item[1].memory_gib)
    for name, module in by_memory:
        setting = replace(found.setting, device=device(name))
        if name != found.setting.device.name and _works(setting, hz):
            yield Suggestion(f"{module.title} (--device {name})", setting)
            return


WAYS = (_mode, _precision, _steps, _pruning, _sequential, _device)

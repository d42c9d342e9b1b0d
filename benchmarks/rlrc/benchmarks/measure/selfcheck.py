"""Whether the latency benchmark can be believed here: that it finds no difference where there is none, and one that is
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rlrc.benchmarks.measure import latency
from rlrc.benchmarks.results.stats import Estimate, ratio_interval

if TYPE_CHECKING:
    from rlrc.runtime.inference.policy import Policy

MARGIN = 0.03  # ratios nearer to 1 count as none: so far do two runs of the same policy come apart
SLOWER = 0.1  # the artificial slow-down
Observations = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class SelfCheckResult:
    """``ratio`` of medians, with its 95 % interval; ``said`` of ``wanted``: see ``word``."""

    what: str
    ratio: float
    interval: tuple[float, float]
    said: str
    wanted: str
    verdict: str  # PASS or FAIL


class Slowed:
    """A policy that takes ``more`` of its time than it does."""

    def __init__(self, policy: Policy, more: float) -> None:
        self.policy, self.more = policy, more

    def infer(self, observation: Mapping[str, Any]) -> Any:
        started = perf_counter()
        result = self.policy.infer(observation)
        now = perf_counter()
        end = now + self.more * (now - started)
        while perf_counter() < end:
            pass
        return result

    def reset(self) -> None:
        self.policy.reset()


def word(ratio: Estimate) -> str:
    """What a ratio says: "slower", "faster" or "no difference"."""
    if ratio.low > 1 + MARGIN:
        return "slower"
    return "faster" if ratio.high < 1 - MARGIN else "no difference"


def findings(
    open_policy: Callable[[], Policy], observations: Observations, trials: int, tick: Callable[[int], None]
) -> list[SelfCheckResult]:
    """Both checks, from one interleaved run; ``open_policy`` gives the same policy, anew."""
    policies: dict[str, Any] = {"one": open_policy(), "same": open_policy(), "slowed": Slowed(open_policy(), SLOWER)}
    timed = latency.measure(policies, dict.fromkeys(policies, observations), trials, tick=tick)
    found = []
    for name, what, wanted in (
        ("same", "the same artifact twice", "no difference"),
        ("slowed", f"the same, slowed by {SLOWER:.0%}", "slower"),
    ):
        ratio = ratio_interval(timed[name].rounds(), timed["one"].rounds())
        said = word(ratio)
        holds = said == wanted and (name != "same" or abs(ratio.value - 1) < MARGIN)
        interval = (ratio.low, ratio.high)
        found.append(SelfCheckResult(what, ratio.value, interval, said, wanted, "PASS" if holds else "FAIL"))
    return found

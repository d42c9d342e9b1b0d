"""Reports losses from which follows that the data or the learning rate does not fit the policy.

What a loss should be follows from its formula (rlrc.compressor.training.losses). A policy that ignores what it sees has

- for bins and tokens: ln(bins), by giving every bin the same probability, whatever the actions are;
- for numbers (L1): the mean absolute deviation of the actions, by answering their mean;
- for flow matching: the mean of (noise - actions)^2, 1 + the mean square of the actions, by a velocity of zero.

Normalised actions have a variance and a mean square of about 1 or less, so the last two are at most 1 and 2 for data
that fits: wrong statistics do not raise the limit. A policy that was trained on such data is far below its limit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor

from rlrc.artifact import PolicySpec
from rlrc.compressor.training.batches import Batch
from rlrc.compressor.training.losses import masked_mean

SURE = 4.0  # standard errors of a difference of means: by chance, one window in 30,000
CLEAR = 0.1  # of the way from the loss at the start to that of a policy that ignores what it sees
CHECKS = 3  # rises of the held-out loss, one after the other


def ignorant_chunk_loss(spec: PolicySpec, batch: Batch) -> float:
    """The chunk's loss of a policy that ignores what it sees, at most that of normalised actions. See above."""
    actions, real = batch.actions, batch.real
    if spec.flow is not None:
        assert batch.inputs.noise is not None
        noise = batch.inputs.noise[..., : spec.action.dim]
        return min(2.0, float(masked_mean((noise - actions).square(), real)))
    if spec.action.bins:
        return math.log(spec.action.bins)
    return min(1.0, float(masked_mean((actions - _mean(actions, real)).abs(), real)))


def _mean(actions: Tensor, real: Tensor | None) -> Tensor:
    """Mean (D,) of actions (B, K, D) over the batch's real steps."""
    rows = actions.flatten(0, 1) if real is None else actions[real]
    return rows.mean(0)


class LossWatch:
    """Watches the losses of one training run; each kind of warning is given once.

    ``warn(step, text, loss, limit)`` is called with each warning; ``rate`` and ``folder`` are for its advice.
    """

    def __init__(self, warn: Callable[[int, str, float, float], None], rate: float, folder: str) -> None:
        self.warn, self.rate, self.folder = warn, rate, folder
        self.limit = math.inf
        """the loss of a policy that ignores what it sees"""
        self.knew = False
        """whether the first loss was that of a trained policy, below the limit"""
        self.losses: list[float] = []
        """of the steps since the last window"""
        self.start: tuple[float, int] | None = None
        """the loss at the start, and the number of batches of which it is the mean: 1, then those of a window"""
        self.lowest: tuple[int, float] | None = None
        """step and value of the lowest held-out loss"""
        self.last, self.rises = math.inf, 0
        self.given: dict[str, str] = {}
        """kind of warning -> its text"""

    def first(self, loss: float, limit: float, learned: bool) -> None:
        """The loss of the first batch, before any update. ``learned``: the policy was trained before, and not cut."""
        self.limit = limit
        self.knew = learned and loss < limit
        self.start = (loss, 1) if learned else None
        if learned and loss > limit:
            text = (
                f"the first loss is {loss:.3g}, above {limit:.3g}, that of a policy that ignores what it sees: if this "
                "policy was trained for this robot, the data does not fit it; check --cameras, --statistics or "
                "--unnorm-key, and the units and order of the actions (rlrc data inspect)"
            )
            self._give("first", 1, text, loss, limit)

    def step(self, loss: float) -> None:
        self.losses.append(loss)

    def window(self, step: int) -> None:
        """Close a window of steps, the last of which is ``step``. It is compared with the start."""
        losses, self.losses = self.losses, []
        mean, count = sum(losses) / len(losses), len(losses)
        # The variance of a batch's loss from the differences of neighbours, on which a trend has no influence.
        variance = sum((after - before) ** 2 for before, after in pairwise(losses)) / 2 / max(1, count - 1)
        start, batches = self.start or (math.inf, count)
        if batches == 1 or self.start is None:
            self.start = mean, count
        chance = SURE * math.sqrt(variance / batches + variance / count)
        if self.knew and start < self.limit:  # what leaves nothing of what it knew is no chance
            chance = min(chance, self.limit - start)
        limit = start + max(chance, self._clear(start))
        if mean > limit:
            text = (
                f"the loss rose from {start:.3g} at the start to {mean:.3g} at step {step}: the rate {self.rate:g} is "
                f"too high for this policy; stop, remove {self.folder} and start again with a lower --rate"
            )
            self._give("rise", step, text, mean, limit)

    def renew(self) -> None:
        """The training set has changed: begin with the losses anew."""
        self.start, self.losses = None, []

    def held_out(self, step: int, loss: float) -> None:
        """A measurement of the held-out loss."""
        self.rises = self.rises + 1 if loss > self.last else 0
        self.last = loss
        if self.lowest is None or loss < self.lowest[1]:
            self.lowest = step, loss
        best, lowest = self.lowest
        if self.rises >= CHECKS and loss > lowest + self._clear(lowest):
            text = (
                f"the held-out loss rose {self.rises} times in a row, to {loss:.3g} at step {step} from {lowest:.3g} "
                f"at step {best}, whose weights are kept: more steps do not help; --patience {CHECKS} would stop here, "
                "a lower --rate or more demonstrations may help"
            )
            self._give("held-out", step, text, loss, lowest + self._clear(lowest))

    def state(self) -> dict[str, Any]:
        """Later calls do not change it."""
        kept = {name: value for name, value in vars(self).items() if name not in ("warn", "rate", "folder")}
        return kept | {"losses": list(self.losses), "given": dict(self.given)}

    def restore(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)

    def _clear(self, loss: float) -> float:
        return max(0.0, CLEAR * (self.limit - loss)) if math.isfinite(self.limit) else 0.0

    def _give(self, kind: str, step: int, text: str, loss: float, limit: float) -> None:
        if kind not in self.given:
            self.given[kind] = text
            self.warn(step, text, loss, limit)


def print_warning(text: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    print(f"warning: {text}", file=sys.stderr, flush=True)

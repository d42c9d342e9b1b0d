"""Statistics as lerobot 0.6 stores them: min, max, mean, std, count and five quantiles of each feature.

lerobot estimates quantiles from histograms and averages them over episodes; here they are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_LARGE, _ABOUT = (
    300,
    150,
)  # pixels: pictures at least this large are thinned to about so many pixels a side, as in lerobot

Stats = dict[str, list[Any]]


def compute_stats(values: NDArray[Any]) -> Stats:
    """(N,) or (N, D) -> lists of D numbers (1 for a plain column), computed in float64; ``count`` is [N]."""
    x = np.asarray(values, np.float64).reshape(len(values), -1)
    quantiles = np.quantile(x, list(QUANTILES.values()), axis=0)
    found = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    found |= dict(zip(QUANTILES, quantiles, strict=True))
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(x)]}


class Colours:
    """Counts of the 256 values of every colour, from which exact statistics of any number of pictures follow."""

    def __init__(self) -> None:
        self.counts, self.pictures = np.zeros((3, 256), np.int64), 0

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Count a picture (H, W, 3)."""
        height, width = picture.shape[:2]
        step = max(1, max(height, width) // _ABOUT) if max(height, width) >= _LARGE else 1
        thinned = picture[::step, ::step]
        for colour in range(3):
            self.counts[colour] += np.bincount(thinned[..., colour].ravel(), minlength=256)
        self.pictures += 1

    def join(self, other: Colours) -> None:
        self.counts += other.counts
        self.pictures += other.pictures

    def stats(self) -> Stats:
        """Statistics of values in [0, 1], each (3, 1, 1); ``count`` is the number of pictures."""
        per_colour = [self._of(counts) for counts in self.counts]
        found: Stats = {name: [[[one[name]]] for one in per_colour] for name in per_colour[0]}
        return found | {"count": [self.pictures]}

    @staticmethod
    def _of(counts: NDArray[np.int64]) -> dict[str, float]:
        values, total = np.arange(256) / 255, counts.sum()
        there = np.flatnonzero(counts)
        mean = float((counts * values).sum() / total)
        variance = float((counts * (values - mean) ** 2).sum() / total)
        reached = np.cumsum(counts)

        def quantile(q: float) -> float:
            """As in numpy: linear between the two values around position q * (total - 1) of the sorted pixels."""
            place = q * (int(total) - 1)
            below, above = (
                values[np.searchsorted(reached, n, side="right")] for n in (np.floor(place), np.ceil(place))
            )
            return float(below + (above - below) * (place - np.floor(place)))

        found = {"min": float(values[there[0]]), "max": float(values[there[-1]]), "mean": mean, "std": variance**0.5}
        return found | {name: quantile(q) for name, q in QUANTILES.items()}

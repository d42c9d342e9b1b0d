"""Counters and histograms in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """For use by one thread."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[Labels]] = defaultdict(Counter)
        self._buckets: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BOUNDS) + 1))
        self._sums: dict[str, float] = defaultdict(float)

    def count(self, name: str, number: int = 1, **labels: str) -> None:
        self._counts[name][tuple(sorted(labels.items()))] += number

    def observe(self, name: str, seconds: float) -> None:
        self._buckets[name][bisect_left(BOUNDS, seconds)] += 1
        self._sums[name] += seconds

    def text(self, **gauges: float) -> str:
        """All counters and histograms, and the given gauges."""
        lines = []
        for name, counter in self._counts.items():
            lines.append(f"# TYPE {name} counter")
            lines += [f"{name}{_format_labels(labels)} {number}" for labels, number in sorted(counter.items())]
        for name, buckets in self._buckets.items():
            lines.append(f"# TYPE {name} histogram")
            total = 0
            for bound, number in zip((*BOUNDS, "+Inf"), buckets, strict=True):
                total += number
                lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
            lines += [f"{name}_sum {self._sums[name]!r}", f"{name}_count {total}"]
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _format_labels(labels: Labels) -> str:
    text = ",".join(f'{name}="{value}"' for name, value in labels)
    return f"{{{text}}}" if text else ""

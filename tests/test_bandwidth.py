"""The bandwidth that decode steps are held against."""

from __future__ import annotations

import numpy as np
import pytest

from rlrc.benchmarks.measure import bandwidth


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_is_read_in_every_sweep(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, read = bandwidth._parts(threads), list[int]()
    assert len(parts) == threads
    assert all(part.min() == part.max() == 1 for part in parts)  # written, or all pages would be one page of zeros
    largest = np.max
    monkeypatch.setattr(np, "max", lambda part: read.append(part.nbytes) or largest(part))
    assert 0.05 < bandwidth.read_bandwidth(threads) < 5000
    assert sum(read) == bandwidth.SWEEPS * bandwidth.BYTES

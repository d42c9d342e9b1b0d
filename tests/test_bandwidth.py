"""The bandwidth that decode steps are held against."""

from __future__ import annotations

import pytest

from rlrc.benchmarks import bandwidth


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_is_read_in_every_sweep(threads: int) -> None:
    parts = bandwidth._parts(threads)
    assert len(parts) == threads
    assert sum(part.nbytes for part in parts) == bandwidth.BYTES
    assert all(part.min() == part.max() == 1 for part in parts)  # written, or all pages would be one page of zeros
    assert 0.05 < bandwidth.read_bandwidth(threads) < 5000

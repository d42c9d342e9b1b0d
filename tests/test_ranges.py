"""One helper for the limits of a configuration's numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from rlrc.errors import UserError
from rlrc.ranges import check_range


@pytest.mark.parametrize(
    ("value", "limit", "message"),
    [
        (0, {"at_least": 1}, r"expected sft\.steps >= 1, found 0"),
        (0.0, {"above": 0}, r"expected sft\.steps > 0, found 0\.0"),
        (1.5, {"within": (0, 1)}, r"expected sft\.steps within \[0, 1\], found 1\.5"),
        (math.nan, {"at_least": 0}, r"expected sft\.steps >= 0, found nan"),
        (math.nan, {"above": 0}, r"expected sft\.steps > 0, found nan"),
        (math.nan, {"within": (0, 1)}, r"expected sft\.steps within \[0, 1\], found nan"),
    ],
)
def test_a_number_out_of_range_is_refused(value: float, limit: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        check_range(SimpleNamespace(batch=1, steps=value), "sft.", "batch", "steps", **limit)


def test_the_ends_of_a_range_are_valid() -> None:
    config = SimpleNamespace(low=0, high=1)
    check_range(config, "", "low", "high", at_least=0)
    check_range(config, "", "high", above=0)
    check_range(config, "", "low", "high", within=(0, 1))

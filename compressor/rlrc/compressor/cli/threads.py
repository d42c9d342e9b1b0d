"""The number of threads that torch uses."""

from __future__ import annotations

import torch

from rlrc.errors import UserError


def set_threads(threads: int) -> None:
    """Sets the threads of torch. Raises UserError for less than one."""
    if threads < 1:
        raise UserError(f"expected at least one thread, found {threads}; give --threads 1 or more")
    torch.set_num_threads(threads)

"""``python -m rlrc.runtime.cli``, for accelerate and torchrun."""

import sys

from rlrc.runtime.cli import main

sys.exit(main())

"""``python -m rlrc.runtime.cli``, as accelerate and torchrun start it."""

import sys

from rlrc.runtime.cli import main

sys.exit(main())

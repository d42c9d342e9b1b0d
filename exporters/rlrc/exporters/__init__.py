"""From an artifact's weights to the graphs that the runtime loads, each verified against torch. Needs torch."""

from rlrc.libraries import keep_local

keep_local()

"""Write the graphs that the runtime loads from an artifact's weights, and verify them against torch. Needs torch."""

from rlrc.libraries import keep_local

keep_local()

"""From an artifact's weights to the graphs that the runtime loads, each verified against torch. Needs torch."""

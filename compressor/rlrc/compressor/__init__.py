"""From a checkpoint to a small artifact: prune, recover, quantize. Needs torch."""

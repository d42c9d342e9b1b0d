"""From a checkpoint to a small artifact: prune, recover, quantize. Needs torch."""

from rlrc.libraries import keep_local

keep_local()

"""One measurement a file: latency, memory, energy, throughput, success."""

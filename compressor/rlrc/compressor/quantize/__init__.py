"""TODO quantize."""

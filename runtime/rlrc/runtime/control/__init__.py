"""The control loop: chunks in time, stops, re-arming, watchdogs, telemetry."""

"""The control loop and the servers under load and faults, with an arm in software."""

"""Devices: where a rank's model is, and the order of the work on it."""

"""Attention from captured queries and keys: weights, rotations, telemetry definitions. On tensors; no engine."""

"""Interventions in the residual stream, on tensors: no engine here, and no run loop.

`library` is the folder of named vectors; `make` and `probe` make them. `sglang_probe.engine` applies them.
"""

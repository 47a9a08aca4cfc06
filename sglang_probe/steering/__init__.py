"""Interventions in the residual stream, on tensors: no engine here, and no run loop.

`spec` says what a request's `steer` means, `plan` which rows of a forward pass it changes, `apply` how.
`library` is the folder of named vectors; `make` and `probe` make them. `sglang_probe.engine` applies them.
"""

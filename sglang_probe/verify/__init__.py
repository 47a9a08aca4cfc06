"""Checking a run directory: the invariants of the ledger, the owners of its rows, and a reference."""

"""The ledger: who computed, reused or lost every token position."""

"""One file an instrument: what the probe can do for a request or a forward pass."""

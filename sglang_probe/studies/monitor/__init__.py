"""Monitoring offline: which requests of recorded runs were unusual, and whether the stream of them has drifted."""

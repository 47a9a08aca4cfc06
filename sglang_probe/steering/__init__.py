"""Interventions on the residual stream: what a request asks, where it applies, and the arithmetic. No engine."""

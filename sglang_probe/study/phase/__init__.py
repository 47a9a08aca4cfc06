"""The phase study: what differs between prefill and decode, split into numerics and content."""

from sglang_probe.study.phase.study import PhaseResult, study_phase

__all__ = ["PhaseResult", "study_phase"]

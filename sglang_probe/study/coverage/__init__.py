"""Coverage: which share of the traffic a harvest computed, by class of token.

`study_coverage` is the study (study.py); `Study` has its passes. A position's activation exists in a run where it was
computed; classes that the cache serves are under-sampled in the rows. `prompts.py` has the short form over the frames
of `Run.tokens()` that the paired study uses.
"""

from sglang_probe.study.coverage.prompts import GENERATED, coverage_by_position, coverage_by_segment, totals
from sglang_probe.study.coverage.result import Coverage, Map
from sglang_probe.study.coverage.study import Study, study_coverage
from sglang_probe.study.coverage.weights import write_weights

__all__ = [
    "GENERATED",
    "Coverage",
    "Map",
    "Study",
    "coverage_by_position",
    "coverage_by_segment",
    "study_coverage",
    "totals",
    "write_weights",
]

"""Every study, in the order in which `sglang-probe --help` lists them."""

from __future__ import annotations

from sglang_probe.studies.ab.command import Ab
from sglang_probe.studies.ab.lossless_command import Lossless
from sglang_probe.studies.base import Study
from sglang_probe.studies.coverage.command import CoverageStudy
from sglang_probe.studies.debug.command import Debug
from sglang_probe.studies.diff.command import Diff
from sglang_probe.studies.evict.command import Evict
from sglang_probe.studies.factorial.command import Factorial
from sglang_probe.studies.features.command import Features
from sglang_probe.studies.lens.command import Lens
from sglang_probe.studies.lens.tune_command import TuneLens
from sglang_probe.studies.monitor.command import Monitor
from sglang_probe.studies.phase.command import Phase
from sglang_probe.studies.query_drift.command import QueryDrift
from sglang_probe.studies.replay.command import Replay
from sglang_probe.studies.row_counts.command import RowCounts
from sglang_probe.studies.sae_eval.command import SaeEval
from sglang_probe.studies.sae_gap.command import SaeGap
from sglang_probe.studies.sae_hybrid.command import SaeHybrid
from sglang_probe.studies.sae_overlap.command import SaeOverlap
from sglang_probe.studies.sae_stability.command import SaeStability
from sglang_probe.studies.sae_train.command import SaeTrain
from sglang_probe.studies.steer_decay.command import SteerDecay
from sglang_probe.studies.steer_dose.command import SteerDose
from sglang_probe.studies.trace.command import Trace
from sglang_probe.studies.what_if.command import WhatIf
from sglang_probe.studies.why.command import Why

STUDIES: tuple[Study, ...] = (
    Ab(),
    CoverageStudy(),
    Why(),
    WhatIf(),
    Lossless(),
    RowCounts(),
    Phase(),
    QueryDrift(),
    Factorial(),
    Evict(),
    Monitor(),
    SteerDecay(),
    SteerDose(),
    Replay(),
    SaeTrain(),
    SaeEval(),
    SaeGap(),
    SaeOverlap(),
    SaeStability(),
    SaeHybrid(),
    Lens(),
    TuneLens(),
    Features(),
    Diff(),
    Trace(),
    Debug(),
)

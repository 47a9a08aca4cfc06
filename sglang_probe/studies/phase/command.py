"""`sglang-probe phase`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_probe.studies.base import Plan, RecordedStudy, Tell

if TYPE_CHECKING:
    from sglang_probe.harvest.prepare import Prepared
    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.run.run import Run
    from sglang_probe.studies.phase.config import PhaseConfig
    from sglang_probe.studies.phase.study import PhaseResult


class Phase(RecordedStudy):
    """Do activations differ between prefill and decode, and if so, because of rounding or because of the text?

    Every text is cut to a prompt and a continuation. The continuation is computed three times: human text prefilled,
    the model's own text decoded, and that text prefilled again. Decoded against prefilled again (same tokens, same
    positions) is numerics; the model's text against human text (both prefilled) is content.

    No key is required. `workload` has the texts, `prompt_tokens` and `continuation_tokens` say where they are
    cut, `hook_points` what is compared.

    Example: `sglang-probe phase experiments/phase/experiment.yaml`
    """

    name = "phase"
    example = """
# sglang-probe phase mine.yaml
model: probe-text                 # built in; or a folder, or a hub id
workload: {source: documents, count: 96, chars: 1500}    # or jsonl, sharegpt
prompt_tokens: 128                # every text is cut to a prompt ...
continuation_tokens: 128          # ... and a continuation, whose positions are compared
sampling: {temperature: 1.0}      # of the decoded continuation
hook_points: [hook_embed, blocks.3.hook_resid_post]
"""

    def config(self) -> type[PhaseConfig]:
        """The YAML."""
        from sglang_probe.studies.phase.config import PhaseConfig

        return PhaseConfig

    def plan(self, prepared: Prepared, config: PhaseConfig) -> Plan:
        """Three runs by replicate, in one engine."""
        import pandas as pd

        from sglang_probe.report.tables import Table
        from sglang_probe.studies.phase.runs import KINDS, names_of

        texts = len(prepared.workload.requests)
        names = [names_of(kind, config)[i] for i in range(config.replicates) for kind in KINDS]
        frame = pd.DataFrame({"run": names, "requests": [texts] * len(names)})
        return Plan(Table(frame, f"plan: {len(names)} runs"), 1, ["texts that are too short are left out"])

    def recorded(self, found: Mapping[str, Sequence[Run]]) -> list[Run]:
        """All replicates."""
        return [run for replicates in found.values() for run in replicates]

    def study(
        self, found: Mapping[str, Sequence[Run]], config: PhaseConfig, folder: Path, name: str, tell: Tell
    ) -> PhaseResult:
        """Compare the continuations."""
        from sglang_probe.studies.phase.study import study_phase

        start, end = config.prompt_tokens, config.prompt_tokens + config.continuation_tokens
        return study_phase(found, start, end, name, tell=tell)

    def page(self, result: PhaseResult) -> Page:
        """The report."""
        from sglang_probe.studies.phase.page import phase_page

        return phase_page(result)

    def shown(self, result: PhaseResult) -> Iterator[Table]:
        """Probes, numerics and moments."""
        from sglang_probe.studies.phase.page import moments_table, numerics_table, probes_table

        yield moments_table(result)
        yield probes_table(result)
        yield numerics_table(result)

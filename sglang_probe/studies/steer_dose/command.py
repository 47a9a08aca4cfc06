"""`sglang-probe steer dose`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_probe.studies.base import Plan, RecordedStudy, Tell

if TYPE_CHECKING:
    from sglang_probe.harvest.prepare import Prepared
    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.run.run import Run
    from sglang_probe.studies.steer_dose.config import SteerDoseConfig
    from sglang_probe.studies.steer_dose.study import SteerDoseResult


class SteerDose(RecordedStudy):
    """What does a dose of steering gain, what does it cost, and which way of steering gains most at equal cost?

    Vectors, features of an SAE, random vectors and prompts, each in several doses. The effect is the shift of the
    log-odds of a target set of tokens, on texts that steering is for; the side effects, in the same run, are KL and
    negative log-likelihood on neutral texts, and repetition where an arm goes on by itself. Arms are compared where
    their KL on neutral texts is equal. Only the comparisons under `registered` have p-values, adjusted by Holm.

    With `select`, features are chosen by their output score, on texts that take no further part.

    Example: `sglang-probe steer dose mine.yaml`
    """

    name = "steer dose"
    example = """
# sglang-probe steer dose mine.yaml
model: smollm2-135m
dtype: float32
workload: {source: documents, count: 40, chars: 900}     # what steering is for
neutral: {source: jsonl, path: neutral.jsonl}            # what it should leave alone
steer: {library: vectors}                                # made by `sglang-probe vector make`
target: {positive: [" the", " of", " is"], negative: ["(", ")", " ="]}
arms:
  contrastive: {vectors: [prose], doses: [0.05, 0.1, 0.2, 0.4]}            # in mean norms of the residual
  feature: {selected: true, doses: [0.05, 0.1, 0.2, 0.4]}
  clamped: {selected: true, op: clamp, doses: [0.5, 1, 2, 4]}              # in the feature's 99th percentile
  ablated: {selected: true, op: ablate_feature, doses: [0.5, 1]}
  random: {vectors: [prose-random-1, prose-random-2], doses: [0.05, 0.1, 0.2, 0.4]}
  prompting: {prefixes: ["Documentation in plain English.", "What follows is English prose, not code."]}
select: {sae: saes/block10, run: runs/mine, candidates: 16, take: 1}       # by output score
side_effects: [0.05, 0.1, 0.2]                                             # nats of KL on neutral texts
registered:
  - {arm: contrastive, against: random, at: 0.1}
  - {arm: feature, against: contrastive, at: 0.1}
  - {arm: prompting, against: contrastive}                                 # at the side effect of the last prompt
  - {arm: ablated}                                                         # its last dose against none
"""

    def config(self) -> type[SteerDoseConfig]:
        """The YAML."""
        from sglang_probe.studies.steer_dose.config import SteerDoseConfig

        return SteerDoseConfig

    def plan(self, prepared: Prepared, config: SteerDoseConfig) -> Plan:
        """Two or three runs in one engine."""
        import pandas as pd

        from sglang_probe.report.tables import Table
        from sglang_probe.studies.steer_dose.runs import planned

        frame = pd.DataFrame(planned(prepared, config), columns=["run", "requests", "tokens"])
        notes = ["texts that are too short are left out", f"registered comparisons: {len(config.registered)}"]
        return Plan(Table(frame, f"plan: {len(frame)} runs"), 1, notes)

    def study(
        self, found: Mapping[str, Run], config: SteerDoseConfig, folder: Path, name: str, tell: Tell
    ) -> SteerDoseResult:
        """Compare predictions and texts."""
        from sglang_probe.studies.steer_dose.study import study_dose

        return study_dose(found, config, name, tell=tell)

    def page(self, result: SteerDoseResult) -> Page:
        """The report."""
        from sglang_probe.studies.steer_dose.page import dose_page

        return dose_page(result)

    def shown(self, result: SteerDoseResult) -> Iterator[Table | str]:
        """The answer, the registered comparisons, and every dose."""
        from rich.markup import escape

        from sglang_probe.studies.steer_dose.page import answer, doses_table, registered_table

        yield escape(answer(result).replace("`", ""))
        yield registered_table(result)
        yield doses_table(result)

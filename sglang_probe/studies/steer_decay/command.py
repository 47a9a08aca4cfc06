"""`sglang-probe steer decay`."""

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
    from sglang_probe.studies.steer_decay.config import SteerDecayConfig
    from sglang_probe.studies.steer_decay.study import SteerDecayResult


class SteerDecay(RecordedStudy):
    """Does one dose of a steering vector do less, the later it is given, and has decoding a part in that?

    The same dose (strength and number of steps) is given at several steps of the model's own continuation, and at the
    same positions of human text that is decoded by force: the depth control. Predictions are compared with those of the
    plain model over the same tokens. Random vectors and a dose of zero are the other controls.

    `steer: {library: FOLDER}`, `vector` and `random` are required. `vector make` makes them.

    Example: `sglang-probe steer decay mine.yaml`
    """

    name = "steer decay"
    example = """
# sglang-probe steer decay mine.yaml
model: probe-text                 # built in; or a folder, or a hub id
workload: {source: documents, count: 24, chars: 3000}    # or jsonl, sharegpt
steer: {library: vectors}         # made by `sglang-probe vector make`
vector: formal                    # whose effect is measured
random: [formal-random-1]         # its control: `sglang-probe vector make random`
strength: 0.3
unit: mean_norm                   # of the layer's mean norm of the residual
onsets: [1, 10, 50, 200]          # steps at which the dose begins
window: 12                        # steps of the dose ...
after: 12                         # ... and steps after it that are measured
prompt_tokens: 64
"""

    def config(self) -> type[SteerDecayConfig]:
        """The YAML."""
        from sglang_probe.studies.steer_decay.config import SteerDecayConfig

        return SteerDecayConfig

    def plan(self, prepared: Prepared, config: SteerDecayConfig) -> Plan:
        """Two or three runs in one engine."""
        import pandas as pd

        from sglang_probe.report.tables import Table
        from sglang_probe.studies.steer_decay.runs import planned

        frame = pd.DataFrame(planned(prepared, config), columns=["run", "requests", "tokens"])
        return Plan(Table(frame, f"plan: {len(frame)} runs"), 1, ["texts that are too short are left out"])

    def study(
        self, found: Mapping[str, Run], config: SteerDecayConfig, folder: Path, name: str, tell: Tell
    ) -> SteerDecayResult:
        """Compare the predictions."""
        from sglang_probe.studies.steer_decay.study import study_decay

        return study_decay(found, config, name, tell=tell)

    def page(self, result: SteerDecayResult) -> Page:
        """The report."""
        from sglang_probe.studies.steer_decay.page import decay_page

        return decay_page(result)

    def shown(self, result: SteerDecayResult) -> Iterator[Table | str]:
        """The answer, slopes and effects."""
        from rich.markup import escape

        from sglang_probe.studies.steer_decay.page import answer, decay_table, effects_table

        yield escape(answer(result).replace("`", ""))
        yield decay_table(result)
        yield effects_table(result)

"""`sglang-probe steer decay`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.studies.base import Parameter, Plan, RecordedStudy, Result, Tell, bar, opened, option

if TYPE_CHECKING:
    from rich.console import Console

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

    def parameters(self) -> list[Parameter]:
        """Those of every study that records, and who judges."""
        judge = "Have what each arm wrote by itself judged, by an OpenAI-compatible endpoint: its address, which ends "
        judge += "in /v1 for most. The YAML's `concept` says what is asked about. A key is read from "
        judge += "SGLANG_PROBE_LABEL_KEY."
        return [
            *super().parameters(),
            option("judge", str | None, None, judge),
            option("judge_model", str | None, None, "Model to ask there; default: the one that it lists."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[Result, Path] | Plan:
        """Record or read the runs and study them; then ask the judge, if there is one."""
        from dataclasses import replace

        from sglang_probe.errors import ConfigError
        from sglang_probe.studies.endpoint import ANSWERS, Endpoint
        from sglang_probe.studies.steer_decay import judge
        from sglang_probe.studies.steer_decay.names import FREE

        if given["judge"] is None:
            if given["judge_model"] is not None:
                raise ConfigError("`--judge-model` needs the address of an endpoint", fix="give --judge URL")
            return super().obtain(given, console)
        config, _, folder = opened(given, self.config())
        if config.concept is None or not config.free:
            raise ConfigError("a judge needs `concept: ...` in the YAML, and not `free: false`")
        # Before anything is recorded, so that an endpoint that is not there is known then.
        endpoint = Endpoint(given["judge"], given["judge_model"], folder / "judge" / ANSWERS)
        found = super().obtain(given, console)
        if isinstance(found, Plan):
            return found
        result: Any = found[0]
        run = self.runs().read(config, folder)[FREE]
        with bar(console, "judging") as tell:
            table = judge.judged(run, config, lambda asked: endpoint.ask(asked, most_tokens=8, tell=tell))
        served = endpoint.served
        who = {
            "model": served.server["id"],
            "weights_sha256": served.weights_sha256,
            "prompts_sha256": judge.prompts_sha256(),
        }
        return replace(result, judged=table, judge=who), found[1]

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

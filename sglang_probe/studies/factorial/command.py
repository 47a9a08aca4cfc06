"""`sglang-probe factorial`."""

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
    from sglang_probe.studies.factorial.config import FactorialConfig
    from sglang_probe.studies.factorial.study import FactorialResult


class Factorial(RecordedStudy):
    """Do pseudo queries resemble the real decode queries because of their content, or because of their position?

    Decodes every prompt, samples another continuation, and runs pseudo tokens of seven contents at six RoPE positions
    after the prompt, in one engine. With `evict_positions` the true continuation is then decoded from the cache that
    each cell would keep, in a second engine.

    The YAML must have `layers`, whose queries, keys and values are captured; evictions need all layers.

    Example: `sglang-probe factorial experiments/factorial/text.yaml --plan`
    """

    name = "factorial"
    example = """
# sglang-probe factorial mine.yaml
model: probe-text                 # built in; or a folder, or a hub id
workload: {source: documents, count: 64, chars: 1300}    # or jsonl, sharegpt
layers: [0, 1, 2, 3]              # what is captured
pseudo_tokens: 32                 # of a cell; as many decode steps are compared with them
decode_steps: 64                  # of the real decoding
evict_positions: ["true", zero]   # also decode after evicting by these cells; [] leaves it out
"""

    def config(self) -> type[FactorialConfig]:
        """The YAML."""
        from sglang_probe.studies.factorial.config import FactorialConfig

        return FactorialConfig

    def plan(self, prepared: Prepared, config: FactorialConfig) -> Plan:
        """Three runs in one engine, and evictions in another."""
        import pandas as pd

        from sglang_probe.report.tables import Table
        from sglang_probe.studies.factorial import cells
        from sglang_probe.studies.factorial.runs import CELLS, DECODED, EVICTED, RESAMPLED

        n = len(prepared.workload.requests)
        rows: list[tuple[str, int | str]] = [(DECODED, n), (RESAMPLED, n), (CELLS, n * (1 + len(cells.all_cells())))]
        if config.evict_positions:
            rows.append((EVICTED, "one by prompt and kept set"))
        frame = pd.DataFrame(rows, columns=["run", "requests"])
        starts = 2 if config.evict_positions else 1
        return Plan(Table(frame, f"plan: {len(rows)} runs"), starts, ["prompts that are too short are left out"])

    def study(
        self, found: Mapping[str, Run], config: FactorialConfig, folder: Path, name: str, tell: Tell
    ) -> FactorialResult:
        """Measure every cell."""
        from sglang_probe.harvest.model import model_folder
        from sglang_probe.studies.factorial.study import study_factorial

        return study_factorial(found, config.options, name, model=model_folder(config.model), tell=tell)

    def page(self, result: FactorialResult) -> Page:
        """The report."""
        from sglang_probe.studies.factorial.page import factorial_page

        return factorial_page(result)

    def shown(self, result: FactorialResult) -> Iterator[Table]:
        """Cosines in DapQ's layout."""
        from sglang_probe.studies.factorial.page import cosines_table

        yield cosines_table(result)

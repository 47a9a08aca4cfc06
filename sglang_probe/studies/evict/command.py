"""`sglang-probe evict`."""

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
    from sglang_probe.studies.evict.config import EvictionConfig
    from sglang_probe.studies.evict.study import EvictionResult


class Evict(RecordedStudy):
    """Which KV-cache eviction methods keep what decoding needs? Measured offline and by generating from what is kept.

    One harvest with the full cache captures queries, keys and values. Every method then selects under every budget and
    protocol and is judged offline; with `in_engine` (the default) each kept set is run for real, and answers,
    likelihood and agreement with the full cache are counted.

    The YAML must have `workloads` (tasks by name), `methods` and `budgets`. Texts without right answers need `cut`.

    Example: `sglang-probe evict experiments/eviction/experiment.yaml --plan`
    """

    name = "evict"
    example = """
# sglang-probe evict mine.yaml
model: probe-recall               # built in; or a folder, or a hub id
workloads:                        # tasks by name; texts without right answers need `cut`
  chase: {source: retrieval, task: chase, count: 32, prompt_tokens: 228}
budgets: [1/8, 1/4]               # shares of what is compressed, or positions per kv head (64)
methods:                          # names, or names with parameters
  - knorm
  - {method: snapkv, window: 8, pooling: none}
  - {method: laq, recent: 8}
oracles: [static_mean]            # bounds: they read the future
trivial: {sinks: 4, window: 8}    # always kept by the baseline, protected random
"""

    def config(self) -> type[EvictionConfig]:
        """The YAML."""
        from sglang_probe.studies.evict.config import EvictionConfig

        return EvictionConfig

    def plan(self, prepared: dict[str, Prepared], config: EvictionConfig) -> Plan:
        """Engine starts, requests and kept sets."""
        import pandas as pd

        from sglang_probe.report.tables import Table
        from sglang_probe.studies.evict.grid import caveats
        from sglang_probe.studies.evict.stages import counts

        found = counts(config, {task: len(p.workload.requests) for task, p in prepared.items()})
        note = (
            f"{found.policies} policies, {len(config.budgets)} budgets, {len(config.protocols)} protocols: "
            f"{found.kept:,} kept sets at most, {found.requests:,} requests"
        )
        layers = next(iter(prepared.values())).model.layers
        notes = [note, *caveats(config.entries, layers)]
        return Plan(Table(pd.DataFrame(found.rows), "plan: requests by task"), found.starts, notes)

    def recorded(self, found: Mapping[str, Run]) -> list[Run]:
        """None: full-cache runs are read by this study alone."""
        return []

    def study(
        self, found: Mapping[str, Run], config: EvictionConfig, folder: Path, name: str, tell: Tell
    ) -> EvictionResult:
        """Read the files of the grid and of what was generated."""
        from sglang_probe.studies.evict.stages import study_files

        return study_files(config, folder, name, found)

    def page(self, result: EvictionResult) -> Page:
        """The report."""
        from sglang_probe.studies.evict.page import eviction_page

        return eviction_page(result)

    def shown(self, result: EvictionResult) -> Iterator[Table | str]:
        """What was generated, what is kept of the attention, and which metric predicts."""
        from sglang_probe.studies.evict.tables import accuracy_table, mass_table, predictor_table, stages_table

        if result.outcomes:
            yield accuracy_table(result)
        yield mass_table(result)
        if len(result.predictors):
            yield predictor_table(result)
        yield stages_table(result)
        yield from (f"[yellow]note[/]: {text}" for text in result.caveats)
        if len(result.excluded):
            left = int(result.excluded["requests"].sum())
            yield f"{left:,} selections were left out; the reasons are in the report"
        yield (
            f"kept counts asserted on {result.asserted:,} selections and {result.asserted_in_engine:,} requests served"
        )
        if (sanity := result.sanity) is not None:
            colour = "green" if sanity.holds else "bold red"
            told = f"budget 100 % gives the full cache's tokens in {sanity.exact} of {sanity.requests} requests"
            yield f"[{colour}]{told}[/]"
            if not sanity.holds:
                yield (
                    "  to fix: in 16-bit dtypes near-ties fall either way, as they do when the full cache is served in "
                    "another order; repeat with `dtype: float32` to tell them from a fault"
                )

"""`sglang-probe sae stability`."""

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
    from sglang_probe.studies.sae_stability.config import SaeStabilityConfig
    from sglang_probe.studies.sae_stability.study import StabilityResult


class SaeStability(RecordedStudy):
    """What does the policy of a harvest (cache, chunks, dtype) do to the dictionary that is trained on it?

    The same requests, with the same output tokens, are recorded under each policy, and a sparse autoencoder is trained
    on the rows of each: with the same initialisation, and with batches drawn from one schedule of requests and
    positions, because another order of the same rows alone moves a dictionary a long way. Each distance stands beside
    those of the same policy recorded again, of another order, and of another initialisation.

    Needs SAELens for training: `pip install 'sglang-probe[sae]'`. `--report-only` does not.

    Example: `sglang-probe sae stability experiments/sae-stability/experiment.yaml`
    """

    name = "sae stability"
    example = """
# sglang-probe sae stability mine.yaml        (needs SAELens: pip install 'sglang-probe[sae]')
model: probe-text
workload: {source: shared_prefix, families: 24, requests_per_family: 4}
hook_point: blocks.2.hook_resid_post
arms:                                  # the first is the reference, which is recorded twice
  cache_off: {cache: off}
  cache_on: {cache: on}
  chunks_64: {cache: off, server: {chunked_prefill_size: 64}}
dictionaries:                          # by default one of each arm, every position with its row
  hits_left_out: {of: cache_on, rows: computed}   # a shared prefix counts once
  with_lineage: {of: cache_on, rows: lineage}     # as often as it was used
  chunks: {of: chunks_64}
latents: 512
k: 16
samples: 200000
seeds: [0, 1]
"""

    def config(self) -> type[SaeStabilityConfig]:
        """The YAML."""
        from sglang_probe.studies.sae_stability.config import SaeStabilityConfig

        return SaeStabilityConfig

    def plan(self, prepared: Prepared, config: SaeStabilityConfig) -> Plan:
        """Runs, and dictionaries after them."""
        import pandas as pd

        from sglang_probe.report.tables import Table
        from sglang_probe.studies.sae_stability.runs import repeat_of, wanted

        texts = len(prepared.workload.requests)
        arms = {config.reference: config.arms[config.reference], repeat_of(config): config.arms[config.reference]}
        arms |= config.arms
        starts, running = 0, None
        for arm in arms.values():
            needs = {"dtype": arm.dtype or config.dtype, **arm.start_args(config.server)}
            starts, running = starts + (needs != running), needs
        frame = pd.DataFrame({"run": list(arms), "requests": texts})
        trained = len(wanted(config))
        return Plan(
            Table(frame, f"plan: {len(arms)} runs"), starts, [f"dictionaries to train: {trained}, one after another"]
        )

    def study(
        self, found: Mapping[str, Run], config: SaeStabilityConfig, folder: Path, name: str, tell: Tell
    ) -> StabilityResult:
        """Judge and match the dictionaries."""
        from sglang_probe.studies.sae_stability.study import study_stability

        return study_stability(found, config, folder, name, tell=tell)

    def page(self, result: StabilityResult) -> Page:
        """The report."""
        from sglang_probe.studies.sae_stability.page import stability_page

        return stability_page(result)

    def shown(self, result: StabilityResult) -> Iterator[Table | str]:
        """Distances, coverage, and reconstruction."""
        from rich.markup import escape

        from sglang_probe.studies.sae_stability.page import answer, coverage_table, distance_table

        yield escape(answer(result).replace("`", ""))
        yield distance_table(result)
        yield coverage_table(result)

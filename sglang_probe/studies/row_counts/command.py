"""`sglang-probe row-counts`."""

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
    from sglang_probe.studies.row_counts.config import RowCountsConfig
    from sglang_probe.studies.row_counts.study import RowCountsResult


class RowCounts(RecordedStudy):
    """Which numbers of rows in a forward pass change the bits of a row, and by how much?

    The same tokens at the same positions are computed whole, after a cached prefix in forwards of 1, 2, 3, ... rows,
    and decoded beside others. Rows whose bits agree belong to one class of row counts. The same is asked of the bare
    matrix products of the model, so that a kernel can be told from the engine.

    No key is required. `row_counts` says which prefills, `decode_batches` which batches, `hook_points` what is
    compared.

    Example: `sglang-probe row-counts experiments/row-counts/float32.yaml`
    """

    name = "row-counts"
    example = """
# sglang-probe row-counts mine.yaml
model: probe-text                 # built in; or a folder, or a hub id
dtype: float32
workload: {source: documents, count: 12, chars: 1000}
prefix_tokens: 64                 # cached before
row_counts: [1, 2, 3, 4, 8, 16, 32, 64]       # computed after it, one request alone
decode_batches: [1, 2, 4, 8]                  # decoded together
hook_points: [hook_embed, blocks.0.attn.hook_v, blocks.0.hook_resid_post, blocks.3.hook_resid_post]
"""

    def config(self) -> type[RowCountsConfig]:
        """The YAML."""
        from sglang_probe.studies.row_counts.config import RowCountsConfig

        return RowCountsConfig

    def plan(self, prepared: Prepared, config: RowCountsConfig) -> Plan:
        """A run of whole texts, its repeat, the tails, and one for every decode batch; in one engine."""
        import pandas as pd

        from sglang_probe.report.tables import Table
        from sglang_probe.studies.row_counts.runs import planned

        frame = pd.DataFrame(planned(prepared, config), columns=["run", "requests", "tokens"])
        return Plan(Table(frame, f"plan: {len(frame)} runs"), 1, ["texts that are too short are left out"])

    def study(
        self, found: Mapping[str, Run], config: RowCountsConfig, folder: Path, name: str, tell: Tell
    ) -> RowCountsResult:
        """Compare the rows."""
        from sglang_probe.studies.row_counts.study import study_row_counts

        return study_row_counts(found, folder, config.prefix_tokens, name, tell=tell)

    def page(self, result: RowCountsResult) -> Page:
        """The report."""
        from sglang_probe.studies.row_counts.page import row_counts_page

        return row_counts_page(result)

    def shown(self, result: RowCountsResult) -> Iterator[Table | str]:
        """The answer, and the classes in the engine and of the bare products."""
        from sglang_probe.studies.row_counts.page import answer, classes_table, products_table

        yield answer(result)
        yield classes_table(result)
        yield products_table(result)

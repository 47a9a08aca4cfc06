"""`sglang-probe sae hybrid`."""

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
    from sglang_probe.studies.sae_hybrid.config import SaeHybridConfig
    from sglang_probe.studies.sae_hybrid.study import HybridResult


class SaeHybrid(RecordedStudy):
    """Should a dictionary be trained on decode rows? Mixtures at equal rows, steps, order and initialisation.

    Every text is cut to a prompt and a continuation, which is recorded three times: human text prefilled, the model's
    own text decoded, and that text prefilled again. Dictionaries are trained on a share of 0, 1/4, 1/2 and 1 of decoded
    rows, and, as a control, of the same rows prefilled again; judged on human and on decoded rows of other texts. Runs
    that are there (of `sae gap` or `phase`) are named by `runs` in the YAML, and are not recorded again.

    Needs SAELens for training: `pip install 'sglang-probe[sae]'`. `--report-only` does not.

    Example: `sglang-probe sae hybrid mine.yaml`
    """

    name = "sae hybrid"
    example = """
# sglang-probe sae hybrid mine.yaml        (needs SAELens: pip install 'sglang-probe[sae]')
model: probe-text
workload: {source: documents, count: 300, chars: 1800}
prompt_tokens: 96                 # every text is cut to a prompt ...
continuation_tokens: 160          # ... and a continuation, whose rows are trained on
sampling: {temperature: 1.0}      # of the decoded continuation
hook_point: blocks.2.hook_resid_post
shares: [0, 0.25, 0.5, 1]         # of the model's own rows
latents: 512
k: 16
samples: 200000
seeds: [0, 1, 2]
"""

    def config(self) -> type[SaeHybridConfig]:
        """The YAML."""
        from sglang_probe.studies.sae_hybrid.config import SaeHybridConfig

        return SaeHybridConfig

    def plan(self, prepared: Prepared | dict[str, Run], config: SaeHybridConfig) -> Plan:
        """Three runs, unless they are there, and dictionaries after them."""
        import pandas as pd

        from sglang_probe.report.tables import Table
        from sglang_probe.studies.sae_hybrid.runs import ARMS, wanted

        trained = f"dictionaries to train: {len(wanted(config))}, one after another"
        if isinstance(prepared, dict):
            frame = pd.DataFrame({"run": list(ARMS), "requests": [len(r.requests()) for r in prepared.values()]})
            return Plan(Table(frame, f"plan: the runs of {config.runs}"), 0, [trained])
        frame = pd.DataFrame({"run": list(ARMS), "requests": len(prepared.workload.requests)})
        return Plan(Table(frame, "plan: 3 runs"), 1, ["texts that are too short are left out", trained])

    def study(
        self, found: Mapping[str, Run], config: SaeHybridConfig, folder: Path, name: str, tell: Tell
    ) -> HybridResult:
        """Judge the dictionaries."""
        from sglang_probe.studies.sae_hybrid.study import study_hybrid

        return study_hybrid(found, config, folder, name, tell=tell)

    def page(self, result: HybridResult) -> Page:
        """The report."""
        from sglang_probe.studies.sae_hybrid.page import hybrid_page

        return hybrid_page(result)

    def shown(self, result: HybridResult) -> Iterator[Table | str]:
        """Reconstruction, gap, identity."""
        from rich.markup import escape

        from sglang_probe.studies.sae_hybrid.page import answer, fvu_table, gap_table, match_table

        yield escape(answer(result).replace("`", ""))
        yield fvu_table(result)
        yield gap_table(result)
        yield match_table(result)

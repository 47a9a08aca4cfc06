"""`sglang-probe sae gap`."""

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
    from sglang_probe.studies.sae_gap.config import SaeGapConfig
    from sglang_probe.studies.sae_gap.study import GapResult


class SaeGap(RecordedStudy):
    """Does a sparse autoencoder trained on prompts hold while the model decodes, and what do its errors do there?

    Every text is cut to a prompt and a continuation, which is computed three times: as human text prefilled, as the
    model's own text decoded, and as that text prefilled again. The unexplained share of each is of one variance. The
    gap is split into content and numerics, and into what happens at equal entropy and what is another mixture; it is
    shown by depth, position and entropy, with intervals over texts. Then the residual stream is replaced in the
    engine, while prefilling and while decoding: by the reconstruction, by a random error of the same length, by the
    mean row and by zero.

    Only `sae` is needed. Name the runs that it was trained on in `apart_from`, so that their documents are left out.

    Example: `sglang-probe sae gap experiments/sae-gap-smollm2/experiment.yaml`
    """

    name = "sae gap"
    example = """
# sglang-probe sae gap mine.yaml
model: smollm2-135m               # a name, a folder, or a hub id
dtype: float32
sae: saes/mine/batchtopk-2304-seed0     # folder of the SAE
# apart_from: [runs/mine]         # runs that it was trained on: their documents are left out
workload: {source: documents, count: 64, chars: 1500}    # or jsonl, sharegpt
prompt_tokens: 64                 # every text is cut to a prompt ...
continuation_tokens: 224          # ... and a continuation, whose positions are compared
sampling: {temperature: 1.0}      # of the decoded continuation
# spliced: [human, decoded]       # kinds that are recorded again with their rows replaced; []: none
"""

    def config(self) -> type[SaeGapConfig]:
        """The YAML."""
        from sglang_probe.studies.sae_gap.config import SaeGapConfig

        return SaeGapConfig

    def plan(self, prepared: Prepared, config: SaeGapConfig) -> Plan:
        """Three runs by replicate in one engine, and four by replaced kind in another."""
        import pandas as pd

        from sglang_probe.report.tables import Table
        from sglang_probe.studies.phase.runs import KINDS, names_of
        from sglang_probe.studies.sae_gap.runs import VARIANTS

        names = [names_of(kind, config)[i] for i in range(config.replicates) for kind in KINDS]
        names += [f"{kind}.{variant}" for kind in config.spliced for variant in VARIANTS]
        texts = len(prepared.workload.requests)
        frame = pd.DataFrame({"run": names, "requests": [texts] * len(names)})
        return Plan(Table(frame, f"plan: {len(names)} runs"), 1 + bool(config.spliced))

    def study(self, found: Mapping[str, Run], config: SaeGapConfig, folder: Path, name: str, tell: Tell) -> GapResult:
        """Compare the continuations."""
        from sglang_probe.studies.sae_gap.study import study_gap

        return study_gap(found, config, name, tell=tell)

    def page(self, result: GapResult) -> Page:
        """The report."""
        from sglang_probe.studies.sae_gap.page import gap_page

        return gap_page(result)

    def shown(self, result: GapResult) -> Iterator[Table | str]:
        """The gaps, the kinds of row, and what replacing them does."""
        from sglang_probe.studies.sae_gap.page import arms_table, effects_table, gaps_table

        yield arms_table(result)
        yield gaps_table(result)
        if len(result.effects):
            yield effects_table(result)

"""`sglang-probe ab`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.studies.base import Plan, RecordedStudy, Tell

if TYPE_CHECKING:
    from sglang_probe.harvest.prepare import Prepared
    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.run.run import Run
    from sglang_probe.studies.ab.config import AbConfig
    from sglang_probe.studies.ab.study import AbResult


class Ab(RecordedStudy):
    """What does a serving policy change? Several policies over the same requests with the same output tokens.

    The first arm samples its outputs; the others decode the same tokens through the real decode path. Each arm runs at
    least twice, so that every effect stands beside the difference between two runs of the same arm. SGLang is started
    again only for arms that need an engine of their own; `--plan` shows for which.

    The YAML must hold `workload`. `arms` names the policies (default: cache on and cache off), `hook_points` the rows
    that are compared.

    Example: `sglang-probe ab experiments/cache-on-off.yaml --plan`
    """

    name = "ab"
    example = """
# sglang-probe ab mine.yaml
model: probe-text                 # built in; or a folder, or a hub id
workload:                         # also: jsonl, sharegpt (read a file), documents, retrieval
  source: shared_prefix
  families: 6                     # intervals need six prefix families or more
  requests_per_family: 8
sampling: {max_new_tokens: 48, temperature: 0.0}
hook_points: [hook_embed, blocks.0.hook_resid_post]
baseline: cache_off               # what the other arms are compared with
arms:                             # the first samples, the others decode its tokens
  cache_on: {cache: on}
  cache_off: {cache: off}
  chunk_64: {cache: off, server: {chunked_prefill_size: 64}}
"""

    def config(self) -> type[AbConfig]:
        """The YAML."""
        from sglang_probe.studies.ab.config import AbConfig

        return AbConfig

    def plan(self, prepared: Prepared, config: AbConfig) -> Plan:
        """What runs in which order, what is changed in the running engine, and what needs a start of SGLang."""
        from sglang_probe.studies.ab.plan import START_SECONDS, plan

        starts = sum(p.starts_engine for p in plan(config))
        note = (
            f"about {START_SECONDS} s a start on the CPU reference platform; the first run tells how long a run takes"
        )
        return Plan(plan_table(config, len(prepared.workload.requests)), starts, [note])

    def study(self, found: Mapping[str, Run], config: AbConfig, folder: Path, name: str, tell: Tell) -> AbResult:
        """Compare the arms."""
        from sglang_probe.studies.ab.plan import plan
        from sglang_probe.studies.ab.study import study_ab

        arms = {p.name: p.arm for p in plan(config)}
        return study_ab(found, arms, name, baseline=config.baseline, margin=config.margin, tell=tell)

    def page(self, result: AbResult) -> Page:
        """The report."""
        from sglang_probe.studies.ab.page import ab_page

        return ab_page(result)

    def shown(self, result: AbResult) -> Iterator[Table | str]:
        """Tokens, coverage and verdicts."""
        from sglang_probe.studies.ab.tables import coverage_table, effects_table, flips_table, tokens_table
        from sglang_probe.studies.floor import ALARM, NO_TEST
        from sglang_probe.studies.pages import ALARMED

        yield tokens_table(result)
        yield coverage_table(result)
        if len(result.floors):
            yield effects_table(result)
            verdicts = result.floors["verdict"]
            if (few := verdicts.str.endswith(NO_TEST)).any():
                families = int(result.floors.loc[few, "clusters"].max())
                yield f"no test: {families} prefix families are too few for an interval; use six or more"
            if (verdicts == "unresolved").any():
                yield "unresolved: the interval holds both no excess and more than the margin; more families narrow it"
            if (verdicts == ALARM).any():
                yield f"[bold red]{ALARM}[/]: {ALARMED}"
        if len(result.flips):
            yield flips_table(result)
        yield result.reconciled


def plan_table(config: AbConfig, requests: int) -> Table:
    """Runs in execution order: what SGLang is started with, and what is set in the engine that is running."""
    import pandas as pd

    from sglang_probe.report.tables import Table
    from sglang_probe.studies.ab.plan import plan

    rows = []
    for p in plan(config):
        arm = config.arms[p.arm]
        set_now = arm.switches(config.server).model_dump(exclude_none=True)
        told = {} if arm.bypass is None else {"requests": arm.bypass}
        partners = {} if arm.partners is None else {"partners": f"{arm.partners.count} {arm.partners.draw}"}
        started_with = {k: v for k, v in arm.start_args(config.server).items() if k not in config.server}
        started_with |= {} if arm.dtype is None else {"dtype": arm.dtype}
        rows.append(
            {
                "run": p.name,
                "engine": "start" if p.starts_engine else "keep",
                "started with": _text(started_with),
                "set while it runs": _text({**set_now, **told, **partners}),
            }
        )
    return Table(pd.DataFrame(rows), f"plan: {len(rows)} runs of {requests} requests")


def _text(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}: {v}" for k, v in values.items())

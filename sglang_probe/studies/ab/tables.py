"""Tables of arms that are compared, for the report and the terminal."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.numbers import Kind
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.ab.study import AbResult
from sglang_probe.studies.pages import HOOK_POINT, verdicts

ARM, RUN, PHASE = Column("arm"), Column("run"), Column("phase")


def arms_of(result: AbResult) -> list[str]:
    """Arms in the order of the experiment's runs."""
    return list(dict.fromkeys(result.totals["arm"])) if len(result.totals) else []


def tokens_table(result: AbResult) -> Table:
    """Prompt tokens by fate, and speed, of each run."""
    columns = [
        RUN,
        Column("prompt_tokens"),
        Column("computed"),
        Column("reused"),
        Column("generated"),
        Column("seconds", kind="seconds"),
        Column("tokens_per_second", "tokens per second", "rate"),
    ]
    return Table(result.totals, "Tokens and time of each run", columns=columns)


def counts_table(result: AbResult) -> Table:
    """What else is counted of each run."""
    columns = [
        RUN,
        Column("requests"),
        Column("decode_steps"),
        Column("overshoot"),
        Column("recomputed"),
        Column("sglang_cached_tokens", "SGLang's cached tokens"),
        Column("requests_reconciled", "requests with equal counts"),
    ]
    return Table(result.totals, "Steps and reconciliation of each run", columns=columns, long=True, file="totals")


def coverage_table(result: AbResult) -> Table:
    """Computed share of prompt positions, segments by arms; the longer of the two runs down."""
    title = "Computed share of prompt positions"
    if result.by_segment.empty:
        return Table(pd.DataFrame(), title)
    arms, segments = list(dict.fromkeys(result.by_segment["arm"])), list(dict.fromkeys(result.by_segment["segment"]))
    shares = result.by_segment.pivot(index="segment", columns="arm", values="coverage").loc[segments, arms]
    if len(arms) > 3:
        return Table(shares.T.reset_index(), title, columns=[ARM, *(Column(s, s, "percent") for s in segments)])
    counts = result.by_segment.drop_duplicates("segment").set_index("segment")["positions"]
    frame = shares.assign(positions=counts).reset_index()
    columns = [Column("segment"), *(Column(a, a, "percent") for a in arms), Column("positions")]
    return Table(frame, title, columns=columns)


def effects_table(result: AbResult) -> Table:
    """Effect beside floor at the deepest hook point; an arm that is bit-identical everywhere takes one row."""
    if result.floors.empty:
        return Table(pd.DataFrame(), "Effect beside floor")
    deepest = result.floors["hook_point"].iloc[-1]
    parts = []
    for _, part in result.floors.groupby("arm", sort=False):
        same = (part["verdict"] == "bit-identical").all()
        here = part[part["hook_point"] == deepest]
        parts.append(here.iloc[:1].assign(phase="all", verdict="bit-identical at every hook point") if same else here)
    title = f"Mean relative L2 of `{deepest}` against `{result.baseline}`"
    return Table(pd.concat(parts), title, columns=verdicts(ARM, PHASE))


def flips_table(result: AbResult) -> Table:
    """Where outputs that were not forced part."""
    columns = [
        ARM,
        Column("kind"),
        Column("parted", "requests whose outputs part"),
        Column("requests"),
        Column("tokens_before_median", "output tokens before, median"),
        Column("tokens_before_min", "least"),
        Column("comparison"),
    ]
    there = [c for c in columns if c.name in result.flips]
    return Table(result.flips, "Outputs were not forced: where they part", columns=there)


def every_effect(result: AbResult) -> list[Table]:
    """Effect beside floor at every hook point, and by class of token."""
    found = [
        ("floors", "Effect and floor at every hook point", [ARM, HOOK_POINT, PHASE]),
        ("by_class", "Effect and floor by class of token", [ARM, HOOK_POINT, PHASE, Column("segment")]),
    ]
    return [Table(getattr(result, k), title, columns=verdicts(*by), long=True, file=k) for k, title, by in found]


def every_comparison(result: AbResult) -> Table:
    """Distances of every pair of runs."""
    kind: Kind = "scientific"
    columns = [
        Column("comparison"),
        Column("kind"),
        HOOK_POINT,
        PHASE,
        Column("identical", "bit-identical", "percent"),
        Column("l2_median", "relative L2, median", kind),
        Column("l2_p99", "99th percentile", kind),
        Column("l2_max", "largest", kind),
        Column("cosine_min", "least cosine", "decimal"),
        Column("deviation_max", "largest deviation", kind),
        Column("positions"),
    ]
    order = result.drift.sort_values(["hook_point", "phase", "kind"]) if len(result.drift) else result.drift
    return Table(order, "Every comparison of two runs", columns=columns, long=True, file="drift")

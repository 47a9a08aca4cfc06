"""The factorial study: what content and what position of pseudo tokens do to each outcome, with intervals over prompts.

Published numbers beside it: DapQ, arXiv 2603.11564v1, tables 1, 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sglang_probe.attention.run_telemetry import captured_layers
from sglang_probe.eviction.from_run import layer_from_run
from sglang_probe.run.hook_points import QUERY, ROTATED_KEY, ROTATED_QUERY
from sglang_probe.run.run import Run
from sglang_probe.studies.base import records
from sglang_probe.studies.factorial import cells, outcomes
from sglang_probe.studies.factorial.distances import curves
from sglang_probe.studies.factorial.effects import factorial_effects
from sglang_probe.studies.factorial.evicted import NO_LAYER, predictions
from sglang_probe.studies.factorial.outcomes import Pseudo, Reference
from sglang_probe.studies.query_drift.cosine import prompt_mean
from sglang_probe.studies.query_drift.summary import ALL, means
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import asked_rid

PUBLISHED = pd.DataFrame(
    [
        ("DapQ table 1: Llama-3-8B, one GovReport example", "post", 1, 0.7238, 0.3522, 0.3267),
        ("DapQ table 1: Llama-3-8B, one GovReport example", "pre", 1, 0.7238, 0.7913, 0.7434),
        ("DapQ table 5: Qwen2.5-7B, LCC, 100 examples", "post", 1, 0.7142, 0.4270, 0.4113),
        ("DapQ table 5: Qwen2.5-7B, LCC, 100 examples", "pre", 1, 0.7142, 0.7341, 0.7224),
        ("DapQ table 6: Qwen2.5-7B, 2WikiMQA, 100 examples", "post", 1, 0.7236, 0.4671, 0.4428),
        ("DapQ table 6: Qwen2.5-7B, 2WikiMQA, 100 examples", "pre", 1, 0.7236, 0.7359, 0.7192),
    ],
    columns=["source", "outcome", "SC&SP", "DC&SP", "SC&DP", "DC&DP"],
)
"""Cosines as published; S same, D different; C content, P position."""

SAME_CONTENTS = (cells.RESAMPLED, cells.REAL)
DIFFERENT_CONTENTS = (cells.FILLER, cells.PROMPT, cells.RANDOM)
DIFFERENT_POSITIONS = (cells.ZERO, "+32", "+8")
BASELINES = {"window": "last prompt queries", "oracle": "the real decoding itself", "random": "random candidates"}


@dataclass(frozen=True)
class FactorialOptions:
    """What the outcomes depend on."""

    pseudo_tokens: int
    window: int
    sinks: int
    budgets: Sequence[float]


@dataclass(frozen=True)
class FactorialResult:
    """Everything the report and the terminal show; an estimate `value` has its interval beside it."""

    name: str
    options: FactorialOptions
    rows: pd.DataFrame
    """rid, layer, content, position, outcome, value; `tables/cells`. Baselines have content `baseline`."""
    cells: pd.DataFrame
    """layer, content, position, outcome: means over prompts."""
    effects: pd.DataFrame
    """layer, outcome, same, different, position, effect (`content`, `position`, `interaction`)."""
    table: pd.DataFrame
    """DapQ's layout: source, outcome, the four cells, and the effects."""
    curves: pd.DataFrame
    """Outcomes over measured distances (`distances.curves`)."""
    prompts: int
    reused: float
    """Share of the cells' prompt positions that came from the prefix cache."""
    checks: dict[str, list[Check]]
    manifest: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every invariant holds in every run."""
        return all_hold(self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the rows; of single layers the effects of the first design alone."""
        e = self.effects
        first = (e["same"] == SAME_CONTENTS[0]) & (e["different"] == DIFFERENT_CONTENTS[0])
        first &= e["position"] == DIFFERENT_POSITIONS[0]
        shown = {"cells": self.cells, "effects": e[first | (e["layer"] == ALL)], "table": self.table}
        shown["curves"] = self.curves
        frames = {k: records(f, digits=5) for k, f in shown.items()}
        return {
            "name": self.name,
            "model": self.manifest["model"]["name"],
            "prompts": self.prompts,
            "options": {**self.options.__dict__, "budgets": list(self.options.budgets)},
            "reused": self.reused,
            **frames,
            "versions": self.manifest["versions"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """`cells` by prompt and layer, their means, the effects, and DapQ's layout."""
        return {"cells": self.rows, "means": self.cells, "effects": self.effects, "published": self.table} | {
            "curves": self.curves
        }


def study_factorial(
    runs: Mapping[str, Run],
    options: FactorialOptions,
    name: str,
    *,
    model: str | Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> FactorialResult:
    """Measure every cell.

    Args:
        runs: `decoded` and `cells`, as `sglang-probe factorial` harvests them, and `evicted` where it was run.
        model: folder of the model, for the output projection; None: output error by head.

    Raises:
        RunDirectoryError: a position has no row.
    """
    decoded, treated = runs["decoded"], runs["cells"]
    checks = {kind: verify(run) for kind, run in runs.items()}
    requests = decoded.requests()
    rows: list[dict[str, Any]] = []
    where = pseudo_rows(treated, requests)
    for layer in captured_layers(decoded):
        pseudo = pseudo_of(treated, where, layer)
        for r in requests.itertuples():
            tell(f"measuring layer {layer} of {r.rid}")
            asked = asked_rid(r.rid)
            # Runs of an earlier release have fewer cells.
            ours = {cell: pseudo[cell.rid(asked)] for cell in cells.all_cells() if cell.rid(asked) in pseudo}
            measured = _measure(decoded, r.rid, layer, ours, options, model)
            rows += [{"rid": asked, "layer": layer, **row} for row in measured]
    frame = pd.DataFrame(rows).melt(
        id_vars=["rid", "layer", "content", "position"], var_name="outcome", value_name="value"
    )
    frame = frame[frame["value"].notna()].reset_index(drop=True)
    if "evicted" in runs:
        after = predictions(runs["evicted"], decoded, Path(model or decoded.manifest["model_path"]))
        frame = pd.concat([frame, after], ignore_index=True)
    rids = requests["rid"].map(asked_rid)
    clusters = dict(zip(rids, requests["family"].fillna(rids), strict=True))
    long = frame.assign(layer=frame["layer"].astype(str), cluster=frame["rid"].map(clusters))
    # What the model predicts has no layer.
    inner = long[long["layer"] != str(NO_LAYER)]
    long = pd.concat([inner, long.assign(layer=ALL)], ignore_index=True)
    effects = _effects(long)
    found = means(long, ["layer", "content", "position", "outcome"], "value")
    spans = treated.last_attempt()
    asked = spans["rid"].str.contains(".", regex=False)
    reused = spans[asked & (spans["status"] == "reused")]
    lengths = requests.set_index(rids)["prompt_len"]
    prompts = sum(int(lengths[rid.split(".")[0]]) for rid in where)
    return FactorialResult(
        name=name,
        options=options,
        rows=frame,
        cells=found,
        effects=effects,
        table=dapq_table(found),
        curves=curves(found),
        prompts=len(requests),
        reused=float((reused["end"] - reused["start"]).sum() / prompts),
        checks=checks,
        manifest=decoded.manifest,
    )


def pseudo_rows(treated: Run, requests: pd.DataFrame) -> dict[str, list[int]]:
    """Rows of the pseudo tokens of every cell, in order, by the id of the request that asked for them.

    They were computed by that request, without exception.
    """
    lengths = {cell.rid(asked_rid(r.rid)): r.prompt_len for r in requests.itertuples() for cell in cells.all_cells()}
    tokens = treated.tokens()
    tokens["rid"] = tokens["rid"].map(asked_rid)
    tokens = tokens[tokens["position"] >= tokens["rid"].map(lengths)].sort_values(["rid", "position"])
    return {rid: mine.tolist() for rid, mine in tokens.groupby("rid")["row"]}


def pseudo_of(treated: Run, where: Mapping[str, list[int]], layer: int) -> dict[str, Pseudo]:
    """Queries and keys of all pseudo tokens in one layer, by the id of the request that ran them."""
    flat = [row for rows in where.values() for row in rows]
    read = [treated.rows(f"blocks.{layer}.{s}", flat, split_heads=True) for s in (QUERY, ROTATED_QUERY, ROTATED_KEY)]
    sizes = [len(rows) for rows in where.values()]
    parts = zip(where, *(torch.split(x, sizes) for x in read), strict=True)
    return {rid: Pseudo(q_pre, q_post, k) for rid, q_pre, q_post, k in parts}


def reference_of(decoded: Run, rid: str, layer: int, o: FactorialOptions, model: str | Path | None) -> Reference:
    """The real decoding of one request in one layer."""
    found = layer_from_run(decoded, rid, layer, model=model)
    point = f"blocks.{layer}.{QUERY}"
    return Reference(
        found,
        decoded.activations(rid, point)[found.length :].view(-1, *decoded.heads(point)).float(),
        prompt_mean(found.pre_rope_queries(), sinks=o.sinks),
        outcomes.trivial_of(found.length, sinks=o.sinks, window=o.window),
    )


def budget_of(length: int, share: float, o: FactorialOptions) -> int:
    """Positions to keep of a prompt of `length`, with at least four that are chosen."""
    return max(round(share * length), o.sinks + o.window + 4)


def _measure(
    decoded: Run,
    rid: str,
    layer: int,
    pseudo: Mapping[cells.Cell, Pseudo],
    o: FactorialOptions,
    model: str | Path | None,
) -> list[dict[str, Any]]:
    reference = reference_of(decoded, rid, layer, o, model)
    budgets = {f"{share:g}": budget_of(reference.layer.length, share, o) for share in o.budgets}

    def worth(scores_GL: Any) -> dict[str, float]:
        values = outcomes.agreement(reference, scores_GL)
        for share, budget in budgets.items():
            values |= {f"{k}@{share}": v for k, v in outcomes.at_budget(reference, scores_GL, budget).items()}
        return values

    rows: list[dict[str, Any]] = []
    for cell, said in pseudo.items():
        values = outcomes.cosines(reference, said) | worth(outcomes.pseudo_scores(reference, said))
        rows.append({"content": cell.content, "position": cell.position, **values})
    window = worth(outcomes.window_scores(reference, o.pseudo_tokens))
    oracle = worth(outcomes.true_scores(reference))
    chance = {f"output_error@{s}": outcomes.random_output_error(reference, b) for s, b in budgets.items()}
    chance |= {f"{k}@{s}": window[f"{k}_{outcomes.CHANCE}@{s}"] for s in budgets for k in ("overlap", "mass")}
    for kind, values in (("window", window), ("oracle", oracle), ("random", {"spearman": 0.0, **chance})):
        rows.append({"content": "baseline", "position": kind, **values})
    return [{k: v for k, v in row.items() if outcomes.CHANCE not in k} for row in rows]


def _effects(long: pd.DataFrame) -> pd.DataFrame:
    """Effects of each prompt, then their mean: they are linear, so that this is the effect of the mean cells."""
    keys = ["rid", "cluster", "layer", "outcome"]
    wide = long[long["content"] != "baseline"].pivot_table(
        index=keys, columns=["content", "position"], values="value", aggfunc="mean"
    )
    parts = []
    for same in SAME_CONTENTS:
        for different in DIFFERENT_CONTENTS:
            for position in DIFFERENT_POSITIONS:
                found = factorial_effects(
                    ss=wide[same, cells.TRUE],
                    ds=wide[different, cells.TRUE],
                    sd=wide[same, position],
                    dd=wide[different, position],
                )
                for effect in ("content", "position", "interaction"):
                    part = getattr(found, effect).rename("value").reset_index()
                    parts.append(part.assign(same=same, different=different, position=position, effect=effect))
    by = ["layer", "outcome", "same", "different", "position", "effect"]
    return means(pd.concat(parts, ignore_index=True), by, "value")


def dapq_table(found: pd.DataFrame) -> pd.DataFrame:
    """Published cosines and ours, in one layout: positions 0, 1, ... as the different one, filler as other content."""
    rows = [{**r, "published": True} for r in PUBLISHED.to_dict("records")]
    value = found[found["layer"] == ALL].set_index(["content", "position", "outcome"])["value"]
    for same, label in ((cells.REAL, "identity"), (cells.RESAMPLED, "second sample")):
        for outcome in outcomes.COSINES:
            four = {
                "SC&SP": value[same, cells.TRUE, outcome],
                "DC&SP": value[cells.FILLER, cells.TRUE, outcome],
                "SC&DP": value[same, cells.ZERO, outcome],
                "DC&DP": value[cells.FILLER, cells.ZERO, outcome],
            }
            rows.append({"source": f"here, same content is the {label}", "outcome": outcome, **four})
    table = pd.DataFrame(rows)
    of = factorial_effects(ss=table["SC&SP"], ds=table["DC&SP"], sd=table["SC&DP"], dd=table["DC&DP"])
    return table.assign(
        content=of.content, position=of.position, interaction=of.interaction, published=table["published"].eq(True)
    )

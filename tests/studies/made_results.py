"""Results of every study, made up by the studies' own functions from random rows: as large or as small as is asked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.studies.ab.lossless import DECODED, GATHERED, HERE, LosslessResult
from sglang_probe.studies.ab.study import AbResult
from sglang_probe.studies.evict import study as evict_study
from sglang_probe.studies.evict.judge import METRICS
from sglang_probe.studies.evict.outcome import OUTCOMES
from sglang_probe.studies.evict.predict import predictor_pairs, predictors
from sglang_probe.studies.evict.study import EvictionResult, Sanity
from sglang_probe.studies.evict.summary import by_head, gaps, means, protection
from sglang_probe.studies.factorial import cells
from sglang_probe.studies.factorial import study as factorial_study
from sglang_probe.studies.factorial.distances import curves
from sglang_probe.studies.factorial.study import FactorialOptions, FactorialResult
from sglang_probe.studies.floor import EFFECT, FLOOR, floor_table
from sglang_probe.studies.phase.study import CONTRASTS, HUMAN, REFORWARD, PhaseResult
from sglang_probe.studies.phase.study import DECODED as PHASE_DECODED
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.steps import METRICS as STEP_METRICS
from sglang_probe.studies.query_drift.study import DriftResult
from sglang_probe.studies.query_drift.summary import ALL, summarise
from sglang_probe.studies.query_drift.summary import means as drift_means
from sglang_probe.studies.row_counts.study import RowCountsResult
from sglang_probe.studies.sae_gap import tables as gap_tables
from sglang_probe.studies.sae_gap.study import GapResult
from sglang_probe.verify.check import Check
from tests.studies.sae_gap.planted import VARIANCE
from tests.studies.sae_gap.planted import points as planted_points

MANIFEST: dict[str, Any] = {
    "model": {"name": "m", "architecture": "A", "layers": 4},
    "versions": {"sglang-probe": "1", "sglang": "2", "torch": "3"},
    "workload": {"source": "jsonl"},
    "rows_dtype": "bfloat16",
    "created": "today",
    "workload_digest": "0" * 64,
    "requests_expected": 2,
    "concurrency": 4,
}
CHECKS = {"run": [Check("tiling", "spans tile", 2, "requests")]}


def every(**levels: Sequence[Any]) -> pd.DataFrame:
    """A row for every combination."""
    return pd.DataFrame(list(itertools.product(*levels.values())), columns=list(levels))


def random(frame: pd.DataFrame, *columns: str, seed: int = 0) -> pd.DataFrame:
    """With columns of numbers between 0 and 1."""
    rng = np.random.default_rng(seed)
    return frame.assign(**{c: rng.random(len(frame)) for c in columns})


def points(layers: int) -> list[str]:
    """The embedding, and the residual stream after each layer."""
    return ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(layers))]


def ab(arms: int = 2, families: int = 6, layers: int = 1, replicates: bool = True) -> AbResult:
    """Arms `arm_0`, ..., the last of which is the baseline and reuses nothing."""
    names = [f"arm_{i}" for i in range(arms)]
    rows = every(hook_point=points(layers), phase=["prefill", "decode"], arm=names, kind=[EFFECT, FLOOR])
    rows = rows[(rows["kind"] == EFFECT) & (rows["arm"] != names[-1]) | ((rows["kind"] == FLOOR) & replicates)]
    rows = rows.merge(pd.DataFrame({"cluster": range(families)}), how="cross")
    rows = random(rows, "sum").assign(n=10, same=1, comparison=lambda d: d["arm"] + d["kind"])
    floors = floor_table(rows, names[-1])
    counts = {"requests": 2, "prompt_tokens": 40, "computed": 10, "reused": 30, "generated": 4, "decode_steps": 2}
    counts |= {"overshoot": 0, "recomputed": 0, "sglang_cached_tokens": 30, "requests_reconciled": 2}
    totals = pd.DataFrame({"run": names, "arm": names}).assign(**counts, seconds=1.0, tokens_per_second=44.0)
    coverage = {"positions": 20, "computed": 5, "reused": 15, "coverage": 0.25}
    drift = random(rows[["kind", "arm", "comparison", "hook_point", "phase"]].drop_duplicates(), "identical")
    drift = random(drift, "l2_median", "l2_p99", "l2_max", "cosine_min", "deviation_max").assign(positions=60)
    strip = [(0, 15, "reused"), (15, 19, "computed"), (19, 20, "decode")]
    return AbResult(
        name="made",
        totals=totals,
        by_segment=every(arm=names, segment=["system", "user", "all"]).assign(**coverage),
        by_position=every(arm=names, start=[0, 32, 64]).assign(**coverage, end=lambda d: d["start"] + 32),
        baseline=names[-1],
        drift=drift,
        floors=floors,
        by_class=floors.assign(segment="user"),
        by_bin=floors.assign(start=0),
        flips=pd.DataFrame(),
        checks=CHECKS,
        manifests=dict.fromkeys(names, MANIFEST),
        example={
            "rid": "r0",
            "arm": names[0],
            "reuses": True,
            "related": True,
            "requests": {f"request {i}": strip for i in range(min(families, 8))},
            "strips": dict.fromkeys(names, strip),
            "segments": [(0, 18, "user"), (18, 20, "generated")],
        },
    )


def lossless(layers: int = 1) -> LosslessResult:
    """A cached arm beside one without, and one whose prefill is cut elsewhere."""
    compared = every(
        comparison=["on against off", "off against itself", "cut against off"],
        runs=["a, b"],
        hook_point=points(layers),
        positions=[HERE, GATHERED, DECODED],
        order=["same", "another"],
    )
    counts = {"positions": 40, "computed": 10, "rows": 10, "covered": 1.0, "seconds": 1.0}
    return LosslessResult(
        name="made",
        cached="on",
        reference="off",
        coverage=pd.DataFrame({"run": ["on", "off"], "arm": ["on", "off"]}).assign(**counts),
        distance=random(compared, "identical", "l2_median", "l2_p99", "l2_max").assign(n=30),
        speedup=[1.5, 1.4],
        manifest=MANIFEST,
    )


def phase(layers: int = 1) -> PhaseResult:
    """Every contrast and kind of row."""
    kinds = every(hook_point=points(layers), kind=[HUMAN, PHASE_DECODED, REFORWARD])
    described = ("norm", "mean", "variance", "kurtosis", "outliers")
    described += tuple(f"{c}_{e}" for c in ("norm", "outliers") for e in ("low", "high"))
    sums = every(hook_point=points(layers), phase=["both"], arm=[PHASE_DECODED, REFORWARD], kind=[EFFECT, FLOOR])
    sums = sums[(sums["kind"] == FLOOR) | (sums["arm"] == PHASE_DECODED)]
    sums = sums.merge(pd.DataFrame({"cluster": range(8)}), how="cross").assign(n=10, same=1)
    sums = random(sums, "sum").assign(comparison=lambda d: d["arm"] + d["kind"])
    probes = every(contrast=list(CONTRASTS), hook_point=points(layers))
    return PhaseResult(
        name="made",
        moments=random(kinds, *described),
        by_position=random(kinds.merge(pd.DataFrame({"start": [0, 32]}), how="cross"), *described),
        probes=random(probes, "auc", "low", "high", "null_low", "null_high", "p").sort_values(
            "hook_point", kind="stable"
        ),
        numerics=floor_table(sums, REFORWARD),
        texts=8,
        positions=80,
        checks=CHECKS,
        manifest=MANIFEST,
    )


def sae_gap(texts: int = 8, steps: int = 24, spliced: Sequence[str] = (HUMAN, PHASE_DECODED)) -> GapResult:
    """Every table, from planted numbers."""
    found = planted_points(texts, steps)
    floors = dict.fromkeys((HUMAN, REFORWARD, PHASE_DECODED), 0.0)
    of = every(kind=list(floors), text=range(texts)).assign(repeated=0.0, distinct=1.0)
    return GapResult(
        name="made",
        sae={"folder": "seed-0", "hook_point": points(1)[1], "latents": 8, "weights_sha256": "0" * 64},
        variance=VARIANCE,
        sinks=0,
        temperature=1.0,
        arms=gap_tables.arms(found, VARIANCE, dict.fromkeys(floors, VARIANCE), of),
        gaps=gap_tables.gaps(found, VARIANCE, set(), floors),
        by_depth=gap_tables.by_depth(found, VARIANCE),
        by_position=gap_tables.by_position(found, VARIANCE),
        by_band=gap_tables.by_band(found, VARIANCE),
        effects=gap_tables.effects(found, spliced),
        effects_by=gap_tables.effects_by(found, spliced),
        points=found,
        checks=CHECKS,
        manifest=MANIFEST,
    )


def row_counts(layers: int = 1, counts: int = 8) -> RowCountsResult:
    """Every phase, and a class of row counts by hook point."""
    cells = every(hook_point=points(layers), phase=["prefill", "decode"], rows=range(1, counts + 1))
    alone = every(hook_point=points(layers), phase=["prefix", "repeat"], rows=[64])
    classes = pd.DataFrame({"class": ["1", "2"], "prefill": ["1", "2-8"], "decode": ["1", ""], "whole": [False, True]})
    return RowCountsResult(
        name="made",
        distances=random(pd.concat([cells, alone]), "identical", "l2", "low", "high", "l2_max").assign(
            texts=6, positions=60
        ),
        classes=every(hook_point=points(layers)).merge(classes, how="cross"),
        products=every(product=["qkv"], inputs=[8], outputs=[24], rows=range(1, 5)).assign(**{"class": [0, 1, 1, 2]}),
        machine={"cpu": "c", "instructions": "i", "torch": "3", "threads": "1"},
        texts=6,
        prefix=64,
        whole=128,
        checks=CHECKS,
        manifest=MANIFEST,
    )


def drift(layers: int = 2, heads: int = 2, prompts: int = 6, steps: int = 9) -> DriftResult:
    """Random measures of every layer of every request."""
    o = DriftOptions()
    rids, numbers, all_heads = [f"r{i}" for i in range(prompts)], list(range(layers)), list(range(heads))
    base = {"rid": rids, "layer": numbers}
    bins = [s for s in (1, 2, 4, 8) if s <= steps]
    tables = {
        "steps": random(every(**base, head=all_heads, step=bins).assign(steps=1), *STEP_METRICS),
        "excess": random(
            every(**base, kind=["raw", "centred"], head=all_heads, distance=[1, 8]).assign(pairs=3), "prompt", "decode"
        ),
        "subspace": random(
            every(**base, head=all_heads).assign(rank=2),
            *("captured", "first", "last", "earlier", "split_half", "random"),
        ),
        "recall": random(every(**base, step=list(range(1, steps + 1))), "window", "recency", "random"),
        "placebo": random(
            every(**base, border=[0, 1, 2], kind=["raw", "centred"], distance=[1, 8]).assign(
                at=70, where="text", pairs=3
            ),
            *("prompt", "decode"),
        ),
        "placebo_recall": random(
            every(**base, border=[0, 1], step=list(range(1, steps + 1))), "window", "recency", "random", seed=1
        ),
        "changes": random(every(**base, head=all_heads).assign(steps=steps, step=2, block=2), "p", "p_text"),
        "controls": random(
            every(**base, control=["as recorded", "shuffled keys"]),
            *("pre_centred", "pre_centred_nearest", "js", "mass", "mass_chance"),
        ),
        "windows": random(every(**base, window=[8, 1]), "cosine", "without_sinks"),
        "coverage": random(every(**base).assign(window=32, computed=30, gathered=2), "pre_centred", "pre_centred_own"),
    }
    return DriftResult(
        name="made",
        options=o,
        layers=numbers,
        heads=heads,
        requests=prompts,
        left_out={"too few decode steps": 1},
        lengths=(100, 228),
        steps=(steps, steps),
        rows=tables,
        found=summarise(tables, {r: r for r in rids}, o),
        checks=CHECKS,
        manifest=MANIFEST,
    )


def factorial(layers: int = 1, prompts: int = 3) -> FactorialResult:
    """Every cell; further layers are copies of the first."""
    outcomes = ["post", "pre", "pre_centred", "spearman", "overlap@0.1", "mass@0.1", "output_error@0.1", "nll"]
    rids = [f"r{i}" for i in range(prompts)]
    wanted = every(rid=rids, layer=["0", ALL], content=cells.CONTENTS, position=cells.POSITIONS, outcome=outcomes)
    baselines = every(rid=rids, layer=["0", ALL], content=["baseline"], position=["window", "random"], outcome=outcomes)
    long = random(pd.concat([wanted, baselines], ignore_index=True), "value").assign(cluster=lambda d: d["rid"])
    effects = factorial_study._effects(long)
    found = drift_means(long, ["layer", "content", "position", "outcome"], "value")
    more = [effects[effects["layer"] == "0"].assign(layer=str(i)) for i in range(1, layers)]
    return FactorialResult(
        name="made",
        options=FactorialOptions(8, 8, 4, [0.1]),
        rows=long,
        cells=found,
        effects=pd.concat([effects, *more], ignore_index=True),
        table=factorial_study.dapq_table(found),
        curves=curves(found),
        prompts=prompts,
        reused=0.5,
        checks=CHECKS,
        manifest=MANIFEST,
    )


def evict(methods: int = 4, prompts: int = 6, layers: int = 2, heads: int = 2, engine: bool = True) -> EvictionResult:
    """Random selections, judged; with `engine`, answers too."""
    policies = [("baseline", "protected random"), *(("method", f"method_{i}") for i in range(methods))]
    policies += [("published", f"method_{i}") for i in range(methods)]
    policies += [("oracle", "static_mean"), ("control", "method_0: shuffled keys")]
    budgets = ["1/8", "1/2"]
    listed = pd.DataFrame(policies, columns=["kind", "policy"])
    asked = every(task=["recall"], protocol=["query_visible", "query_hidden"], budget=budgets)
    asked = listed.merge(asked, how="cross").merge(
        pd.DataFrame({"rid": [f"r{i}" for i in range(prompts)]}), how="cross"
    )
    metrics = [m for m in METRICS if m != "lost_everywhere"]
    offline = random(asked, *metrics, "nontrivial_chance").assign(
        length=200, tokens=lambda d: d["budget"].map({"1/8": 25, "1/2": 100 if methods > 1 else 25})
    )
    full = every(task=["recall"], protocol=["query_visible", "query_hidden"], budget=["1"], kind=["full"])
    full = (
        full.assign(policy="full cache")
        .merge(offline[["rid"]].drop_duplicates(), how="cross")
        .assign(**dict.fromkeys(OUTCOMES, 1.0))
    )
    answered = pd.concat([full, random(asked, *OUTCOMES)], ignore_index=True)
    known = ["nontrivial", "output_error"]
    grid = every(layer=list(range(layers)), head=list(range(heads)))
    by_cell = asked.drop(columns="rid").drop_duplicates().merge(grid, how="cross")
    return EvictionResult(
        name="made",
        config={"model": "somewhere/else", "trivial": {"sinks": 4, "window": 8}},
        manifest=MANIFEST,
        policies=listed.assign(parameters="", source="here"),
        lengths=evict_study._lengths(offline),
        offline=means(offline, metrics),
        outcomes={"greedy": means(answered, list(OUTCOMES))} if engine else {},
        mass_gaps=gaps(offline, "prompt_mass", "static_mean"),
        outcome_gaps=evict_study._outcome_gaps(answered, "accuracy") if engine else pd.DataFrame(),
        predictors=predictors(offline, answered, known, "accuracy") if engine else pd.DataFrame(),
        predictor_pairs=predictor_pairs(offline, answered, known, "accuracy") if engine else pd.DataFrame(),
        heads=by_head(random(by_cell, "held").assign(mass=1.0)),
        points=evict_study._points(offline, answered, known, "accuracy") if engine else pd.DataFrame(),
        excluded=pd.DataFrame(),
        asserted=100,
        sanity=Sanity(4, 4) if engine else None,
        served=pd.DataFrame(),
        seconds={"offline grid": 1.0},
        needed=every(task=["recall"], protocol=["query_visible", "query_hidden"]).assign(
            prompts=prompts,
            right=1.0,
            ranges=2.0,
            positions=3.0,
            breaks=0.9,
            control_breaks=0.0,
            drop=4.0,
            control_drop=0.1,
        ),
        protection=pd.concat(
            [protection(answered, ["accuracy"]), protection(offline, evict_study.PROTECTED_METRICS)], ignore_index=True
        ),
    )


def frames_of(found: Mapping[str, Any] | object) -> Mapping[str, pd.DataFrame]:
    """The tables of a result that it holds itself, by the name of the field."""
    fields = found if isinstance(found, Mapping) else vars(found)
    return {name: value for name, value in fields.items() if isinstance(value, pd.DataFrame)}

"""What the tables of a drift study say together: means with intervals over prompt families."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ProbeError
from sglang_probe.stats.intervals import cluster_interval
from sglang_probe.studies.query_drift.horizon import first_failure, fit_decay, kaplan_meier, median_interval
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.placebos import beside_excess, beside_horizon
from sglang_probe.studies.query_drift.steps import METRICS

BASELINES = ("random", "recency")
ALL = "all"


@dataclass(frozen=True)
class Summary:
    """Tidy frames; an estimate `x` has its interval in `x_low` and `x_high`."""

    steps: pd.DataFrame
    """layer (or `all`), step, metric, value, prompts: means over heads and the steps of a bin."""
    maps: pd.DataFrame
    """layer, head, pre_centred_late, excess_raw, excess_centred: late is the last bin that every prompt reaches."""
    excess: pd.DataFrame
    """layer, kind, distance: excess with the prompt and decode cosines it is made of, beside its placebo
    (`placebos.beside_excess`)."""
    subspace: pd.DataFrame
    """layer, measure, value."""
    horizon: pd.DataFrame
    """layer, baseline: median horizon in steps, share of requests that end first, mean recall and half-life; and the
    horizon at placebo borders (`placebos.beside_horizon`)."""
    survival: pd.DataFrame
    """layer, baseline, step, survival."""
    recall: pd.DataFrame
    """layer, step, policy, value, over requests that reach the last step that at least half of them reach."""
    changes: pd.DataFrame
    """layer: share of heads with a change point, the same after a border inside the prompt (`text`) and the difference
    (`beyond`), agreement of heads, and steps per block of the null."""
    controls: pd.DataFrame
    """layer, control, measure, value."""
    windows: pd.DataFrame
    """window, measure (`cosine`, `without_sinks`), value."""
    coverage: pd.DataFrame
    """One row: window coverage and the two cosines."""

    def to_json(self) -> dict[str, Any]:
        """Lists of records."""
        return {
            f.name: json.loads(getattr(self, f.name).to_json(orient="records", double_precision=6))
            for f in fields(self)
        }


def summarise(tables: Mapping[str, pd.DataFrame], clusters: Mapping[str, str], o: DriftOptions) -> Summary:
    """All summaries.

    Args:
        clusters: what is independent of each other (the prompt family), by rid.
    """
    t = {name: frame.assign(cluster=frame["rid"].map(clusters)) for name, frame in tables.items()}
    survival, horizon = _horizon(t["recall"], clusters, o)
    horizon = beside_horizon(horizon, t["recall"], t["placebo_recall"], o, ALL)
    measures = ("captured", "first", "last", "earlier", "split_half", "random")
    return Summary(
        steps=_steps(t["steps"]),
        maps=_maps(t),
        excess=_excess(t["excess"], t["placebo"]),
        subspace=means(_melt(t["subspace"], ["layer"], measures), ["layer", "measure"], "value"),
        horizon=horizon,
        survival=survival,
        recall=_recall(t["recall"]),
        changes=_changes(t["changes"]),
        controls=means(
            _melt(
                t["controls"], ["layer", "control"], ("pre_centred", "pre_centred_nearest", "js", "mass", "mass_chance")
            ),
            ["layer", "control", "measure"],
            "value",
        ),
        windows=means(_melt(t["windows"], ["window"], ("cosine", "without_sinks")), ["window", "measure"], "value"),
        coverage=_coverage(t["coverage"]),
    )


def means(frame: pd.DataFrame, by: Sequence[str], value: str, weight: str | None = None) -> pd.DataFrame:
    """Weighted mean of `value` per group with its interval over clusters: `value, value_low, value_high, prompts`.

    Missing values are left out. With fewer than six clusters there is no interval.
    """
    frame = frame[frame[value].notna()]
    weights = frame[weight] if weight else pd.Series(1.0, index=frame.index)
    sums = (
        frame.assign(_total=frame[value] * weights, _weight=weights)
        .groupby([*by, "cluster"], sort=False)[["_total", "_weight"]]
        .sum()
        .reset_index()
    )
    rows = []
    for key, group in sums.groupby(list(by), sort=False):
        values = group[["_total", "_weight"]].to_numpy(np.float64)
        found = cluster_interval(values, lambda s: s[..., :1] / s[..., 1:])
        rows.append((*key, float(found.estimate[0]), float(found.low[0]), float(found.high[0]), len(values)))
    return pd.DataFrame(rows, columns=[*by, value, f"{value}_low", f"{value}_high", "prompts"])


def _melt(frame: pd.DataFrame, by: list[str], columns: Sequence[str]) -> pd.DataFrame:
    return frame.melt(id_vars=["cluster", *by], value_vars=list(columns), var_name="measure", value_name="value")


def _steps(steps: pd.DataFrame) -> pd.DataFrame:
    # The last bin of a response may be cut short: it counts by its steps.
    long = steps.melt(
        id_vars=["cluster", "layer", "step", "steps"], value_vars=list(METRICS), var_name="metric", value_name="value"
    )
    both = pd.concat([long.assign(layer=ALL), long.assign(layer=long["layer"].astype(str))])
    return means(both, ["layer", "metric", "step"], "value", "steps")


def _maps(t: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    steps = t["steps"]
    reached = steps.groupby("step")["rid"].nunique()
    late = int(reached[reached == reached.max()].index.max())
    at = steps[steps["step"] == late]
    found = at.groupby(["layer", "head"])["pre_centred"].mean().rename("pre_centred_late").to_frame()
    for kind in ("raw", "centred"):
        part = t["excess"][t["excess"]["kind"] == kind]
        gap = (part["prompt"] - part["decode"]) * part["pairs"]
        sums = part.assign(gap=gap).groupby(["layer", "head"])[["gap", "pairs"]].sum()
        found[f"excess_{kind}"] = sums["gap"] / sums["pairs"]
    return found.reset_index().assign(late_step=late)


def _excess(excess: pd.DataFrame, placebo: pd.DataFrame) -> pd.DataFrame:
    by = ["layer", "kind", "distance"]
    both = each_and_all(excess)
    out = means(both, by, "excess", "pairs")
    for side in ("prompt", "decode"):
        out = out.merge(means(both, by, side, "pairs")[[*by, side]], on=by)
    return beside_excess(out, both, each_and_all(placebo), ALL)


def each_and_all(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with `excess`, once under their layer and once under all."""
    frame = frame.assign(layer=frame["layer"].astype(str), excess=frame["prompt"] - frame["decode"])
    return pd.concat([frame, frame.assign(layer=ALL)])


def _horizon(recall: pd.DataFrame, clusters: Mapping[str, str], o: DriftOptions) -> tuple[pd.DataFrame, pd.DataFrame]:
    pooled = recall.groupby(["rid", "step"], sort=False)[["window", "recency", "random"]].mean().reset_index()
    by_layer = {str(k): g for k, g in recall.groupby("layer")}
    survival, rows = [], []
    for layer, frame in {**by_layer, ALL: pooled}.items():
        for baseline in BASELINES:
            ends = [
                first_failure((g["window"] - g[baseline]).to_numpy(), delta=o.delta, run=o.run)
                for _, g in frame.groupby("rid", sort=False)
            ]
            times, observed = (np.array(x) for x in zip(*ends, strict=True))
            estimate = kaplan_meier(times, observed)
            families = [clusters[rid] for rid in dict.fromkeys(frame["rid"])]
            low, high = median_interval(times, observed, families)
            reach = frame.groupby("step")["rid"].nunique()
            common = frame[frame["step"] <= reach[reach == reach.max()].index.max()]
            curve = common.groupby("step")["window"].mean().to_numpy()
            rows.append(
                {
                    "layer": layer,
                    "baseline": baseline,
                    "requests": len(times),
                    "failed": int(observed.sum()),
                    "failed_at_once": int((observed & (times == 0)).sum()),
                    "median": estimate.median,
                    "median_low": low,
                    "median_high": high,
                    "recall": float(frame["window"].mean()),
                    "baseline_recall": float(frame[baseline].mean()),
                    **_decay(curve),
                }
            )
            last = float(times.max())
            curve_times = np.array([0.0, *estimate.times, last])
            values = np.array([1.0, *estimate.survival, estimate.survival[-1] if len(estimate.survival) else 1.0])
            survival.append(
                pd.DataFrame({"layer": layer, "baseline": baseline, "step": curve_times, "survival": values})
            )
    return pd.concat(survival, ignore_index=True).drop_duplicates(
        ["layer", "baseline", "step"], keep="last"
    ), pd.DataFrame(rows)


def _decay(curve: np.ndarray[Any, Any]) -> dict[str, float | None]:
    """Half-life of the recall, where the curve does come down to a limit within the steps seen."""
    try:
        fit = fit_decay(curve)
    except ProbeError:
        return {"half_life": None, "decay_limit": None}
    decays = fit.start > fit.limit and fit.half_life < len(curve)
    return {"half_life": fit.half_life if decays else None, "decay_limit": fit.limit if decays else None}


def _recall(recall: pd.DataFrame) -> pd.DataFrame:
    reach = recall.groupby("step")["rid"].nunique()
    last = int(reach[reach >= reach.max() / 2].index.max())
    lengths = recall.groupby("rid")["step"].transform("max")
    frame = recall[(lengths >= last) & (recall["step"] <= last)]
    start = 2 ** np.floor(np.log2(frame["step"])).astype(int)
    long = frame.assign(step=start).melt(
        id_vars=["cluster", "layer", "step"], value_vars=["window", *BASELINES], var_name="policy", value_name="value"
    )
    both = pd.concat([long.assign(layer=long["layer"].astype(str)), long.assign(layer=ALL)])
    return means(both, ["layer", "policy", "step"], "value")


def _changes(changes: pd.DataFrame) -> pd.DataFrame:
    level = 0.05
    text = (changes["p_text"] <= level).where(changes["p_text"].notna()).astype(float)
    frame = changes.assign(found=(changes["p"] <= level) * 1.0, text=text)
    frame = frame.assign(beyond=frame["found"] - frame["text"])
    agreement = []
    for (_rid, layer), g in frame.groupby(["rid", "layer"], sort=False):
        at = g["step"].to_numpy()
        near = (np.abs(at[:, None] - at[None]) <= 1) & (g["found"].to_numpy() > 0)[:, None]
        agreement.append({"layer": layer, "cluster": g["cluster"].iloc[0], "agreement": near.mean(0).max()})
    out = means(frame, ["layer"], "found")
    for column, source in (("text", frame), ("beyond", frame), ("agreement", pd.DataFrame(agreement))):
        out = out.merge(means(source, ["layer"], column).drop(columns="prompts"), on="layer", how="left")
    return out.assign(level=level, block=out["layer"].map(frame.groupby("layer")["block"].median()))


def _coverage(coverage: pd.DataFrame) -> pd.DataFrame:
    first = coverage[coverage["layer"] == coverage["layer"].min()]
    part = coverage[coverage["computed"] < coverage["window"]]
    own = part[part["pre_centred_own"].notna()]
    return pd.DataFrame(
        [
            {
                "requests": len(first),
                "window_coverage": float((first["computed"] / first["window"]).mean()),
                "whole_windows": int((first["computed"] == first["window"]).sum()),
                "gathered": float((first["gathered"] / first["window"]).mean()),
                "cut_windows": len(first) - int((first["computed"] == first["window"]).sum()),
                "cosine_with_lineage": float(own["pre_centred"].mean()) if len(own) else None,
                "cosine_of_own_queries": float(own["pre_centred_own"].mean()) if len(own) else None,
            }
        ]
    )

"""Four training seeds side by side: `python experiments/eviction-seeds/compare.py RUN0 RUN1 RUN2 RUN3`.

Of each study's summary the accuracy of every method with the question visible, less protected random's; the spread
between seeds beside the standard error over prompts; what became of the hypotheses. Prints tables.
"""

# ruff: noqa: T201
from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
from scipy.stats import t

RANDOM, HALF = "protected random", t.ppf(0.975, 23)


def read(folder: Path, seed: int) -> pd.DataFrame:
    """Rows of one study: task, policy, seed, mean, difference, its standard error over 24 prompts, and its interval."""
    outcomes = pd.DataFrame(json.loads((folder / "summary.json").read_text())["outcomes"]["greedy"])
    visible = outcomes[(outcomes["metric"] == "accuracy") & (outcomes["protocol"] == "query_visible")]
    found = visible[visible["kind"].isin(["method", "baseline"])].assign(seed=seed)
    found["error"] = (found["difference_high"] - found["difference_low"]) / (2 * HALF)
    return found


def main() -> None:
    rows = pd.concat([read(Path(p), seed) for seed, p in enumerate(sys.argv[1:])], ignore_index=True)
    seeds = len(sys.argv) - 1
    for value in ("mean", "difference"):
        table = rows.pivot(index="policy", columns=["task", "seed"], values=value)[["recall", "chase", "copy"]]
        print(f"\n{value}\n\n{table.round(2).to_string()}")
    methods = rows[rows["kind"] == "method"]
    cells = methods.groupby(["task", "policy"]).agg(
        mean=("difference", "mean"), between=("difference", "std"), within=("error", "mean")
    )
    cells["half"] = t.ppf(0.975, seeds - 1) * cells["between"] / seeds**0.5
    print(f"\nspread\n\n{cells.round(3).to_string()}")
    retrieval = cells.loc[["recall", "chase"]]
    print(f"\n1. larger between seeds: {(retrieval['between'] > retrieval['within']).sum()} of {len(retrieval)}")
    best = methods.loc[methods.groupby(["task", "seed"])["mean"].idxmax()].pivot(
        index="task", columns="seed", values="policy"
    )
    print(f"\n2. best\n\n{best.to_string()}")
    wide = methods.pivot(index=["task", "seed"], columns="policy", values="mean")
    plain, pooled = "snapkv window 8, pooling none", "snapkv window 8"
    print("\n3. LAQ less SnapKV on copy:", (wide["laq"] - wide[plain]).loc["copy"].round(2).tolist())
    print("4. SnapKV not pooled less pooled:", (wide[plain] - wide[pooled]).round(2).to_dict())
    first = methods[(methods["seed"] == 0) & methods["task"].isin(["recall", "chase"])].set_index(["task", "policy"])
    told = first[(first["difference_low"] > 0) | (first["difference_high"] < 0)].index
    lost = [i for i in told if abs(cells.loc[i, "mean"]) <= cells.loc[i, "half"]]
    print(f"5. told over prompts in seed 0: {len(told)}; no longer over seeds: {len(lost)}: {lost}")


if __name__ == "__main__":
    main()

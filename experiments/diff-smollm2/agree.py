"""How rows of the engine and rows by transformers agree, and what `sglang-probe diff` says of either.

    python experiments/diff-smollm2/agree.py SAE ENGINE-RUN TRANSFORMERS-RUN ENGINE-DIFF TRANSFORMERS-DIFF

Prints JSON: the same texts; relative distances of their rows; active latents; latents tested, discovered and confirmed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.run.run import load_run
from sglang_probe.sae.folder import read_sae

BLOCK = 4096


def main(sae: Path, engine: Path, other: Path, diffs: list[Path]) -> dict[str, Any]:
    """Compare the two sources."""
    read, runs = read_sae(sae), [load_run(p) for p in (engine, other)]
    point = str(read.hook_point)
    ids = [r.requests().set_index("rid")["prompt_ids"].map(tuple).sort_index() for r in runs]
    assert ids[0].equals(ids[1]), "the two runs are of other texts"
    tokens = [r.tokens() for r in runs]
    both = tokens[0].merge(tokens[1], on=["rid", "position"], suffixes=("", "_other"))
    both = both[(both["row"] >= 0) & (both["row_other"] >= 0)]
    far, same, alike, union, found = [], 0, 0, 0, 0
    largest = 0.0
    for start in range(0, len(both), BLOCK):
        part = both.iloc[start : start + BLOCK]
        a, b = (r.rows(point, part[c].to_numpy()).float() for r, c in zip(runs, ("row", "row_other"), strict=True))
        far.append(((a - b).norm(dim=1) / b.norm(dim=1)).numpy())
        z, w = read.encode(a), read.encode(b)
        on = [x > 0 for x in (z, w)]
        same += int((on[0] == on[1]).all(1).sum())
        alike += int((on[0] & on[1]).sum())
        union += int((on[0] | on[1]).sum())
        largest = max(largest, float((z - w).abs().max() / torch.maximum(z, w).max()))
        found += len(part)
    distances = np.concatenate(far)
    tables = [pd.read_parquet(d / "tables" / "latents.parquet").set_index("latent") for d in diffs]
    told: dict[str, Any] = {
        "texts": len(ids[0]),
        "rows": found,
        "rows_only_one_has": len(tokens[0]) + len(tokens[1]) - 2 * found,
        "relative_distance_median": float(np.median(distances)),
        "relative_distance_largest": float(distances.max()),
        "rows_with_the_same_active_latents": same / found,
        "jaccard_of_active_latents": alike / union,
        "largest_difference_of_an_activation_over_the_largest_activation": largest,
    }
    for name in ("tested", "discovered", "confirmed", "beyond_tokens"):
        sets = [set(t.index if name == "tested" else t.index[t[name].fillna(False).astype(bool)]) for t in tables]
        told[name] = {"engine": len(sets[0]), "transformers": len(sets[1]), "both": len(sets[0] & sets[1])}
    common = tables[0].join(tables[1].add_suffix("_other"), how="inner")
    told["largest_difference_of_a_difference_of_rates"] = float(
        (common["difference"] - common["difference_other"]).abs().max()
    )
    return told


if __name__ == "__main__":
    given = [Path(a) for a in sys.argv[1:]]
    sys.stdout.write(json.dumps(main(*given[:3], given[3:]), indent=1) + "\n")

"""How far rows are functions of their token: what the mean row of each token, of half of the texts, explains of others.

    python experiments/diff-smollm2/token_share.py RUN ...

Prints JSON: of each run, rows of tokens that the first half has, and the share of their variance that is explained.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from sglang_probe.run.run import load_run
from sglang_probe.sae.labels import halves

POINT = "blocks.10.hook_resid_post"


def main(path: Path) -> dict[str, Any]:
    """Of one run."""
    run = load_run(path)
    tokens = run.tokens()
    tokens = tokens[(tokens["row"] >= 0) & (tokens["position"] > 0) & (tokens["phase"] == "prefill")]
    family = run.requests().set_index("rid")["family"]
    first = tokens["rid"].map(dict(zip(family.index, halves(family.tolist()), strict=True))).to_numpy(dtype=bool)
    known, code = np.unique(tokens["token_id"].to_numpy(), return_inverse=True)
    x = run.rows(POINT, tokens["row"].to_numpy()).float().numpy()
    at = np.flatnonzero(first)
    one = sparse.csr_array((np.ones(len(at), np.float32), (code[at], np.arange(len(at)))), (len(known), len(at)))
    count = np.asarray(one.sum(1)).ravel()
    means = (one @ x[at]) / np.maximum(count, 1)[:, None]
    told = np.flatnonzero(~first & (count[code] > 0))
    y = x[told]
    left = float(((y - means[code[told]]) ** 2).sum(1).mean())
    return {
        "rows": len(told),
        "of": int((~first).sum()),
        "norm_median": float(np.median(np.linalg.norm(y, axis=1))),
        "explained_by_token": 1 - left / float(((y - y.mean(0)) ** 2).sum(1).mean()),
    }


if __name__ == "__main__":
    found = {Path(p).name: main(Path(p)) for p in sys.argv[1:]}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")

"""What pseudo queries are worth, over how far they are from the true ones: a curve for contents, and one for positions.

Contents have no distance of their own, and a shift of positions has none that content could be held against. So the
distance is measured, and the same for both: one minus the mean cosine, after RoPE, of pseudo queries to the decode
queries of the same number. Along the *content* curve positions are the true ones; along the *position* curve the tokens
are. Where the two curves run together, what counts is how far the queries are, not what moved them. Neither factor is
ranked: how large an effect is follows from which levels were chosen.
"""

from __future__ import annotations

import pandas as pd

from sglang_probe.studies.factorial import cells

CONTENT, POSITION = "content", "position"
_DISTANCE = "post"


def curves(found: pd.DataFrame) -> pd.DataFrame:
    """Every outcome over the measured distance.

    Args:
        found: layer, content, position, outcome, value, value_low, value_high: means over prompts.

    Returns:
        layer, outcome, `curve` (content or position), `level` (the content, or the position), `distance` of the
        queries, `tokens` (how far the positions were shifted; 0 along the content curve), value, value_low, value_high;
        by layer, outcome and curve, the nearest first. What has no layer of its own stands under `all` alone.
    """
    cell = ["layer", "content", "position"]
    post = found[found["outcome"] == _DISTANCE].set_index(cell)["value"]
    grid = found[(found["content"] != "baseline") & (found["outcome"] != _DISTANCE)]
    parts = [
        grid[grid["position"] == cells.TRUE].assign(curve=CONTENT, level=lambda f: f["content"]),
        grid[grid["content"] == cells.REAL].assign(curve=POSITION, level=lambda f: f["position"]),
    ]
    both = pd.concat(parts, ignore_index=True)
    both["distance"] = 1 - post.reindex(pd.MultiIndex.from_frame(both[cell])).to_numpy()
    # Positions 0, 1, ... are as far away as the prompt is long, which differs by prompt.
    tokens = both["position"].map({**cells.SHIFTS, cells.ZERO: float("nan")})
    both["tokens"] = tokens.where(both["curve"] == POSITION, 0)
    columns = ["layer", "outcome", "curve", "level", "distance", "tokens", "value", "value_low", "value_high"]
    both = both[both["distance"].notna()]
    return both.sort_values(["layer", "outcome", "curve", "distance"], kind="stable")[columns].reset_index(drop=True)

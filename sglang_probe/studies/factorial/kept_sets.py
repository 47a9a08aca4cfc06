"""The kept sets that the cells of a factorial choose, for the engine to decode with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sglang_probe.attention.run_telemetry import captured_layers
from sglang_probe.eviction.select import top_k
from sglang_probe.kept_set import Kept
from sglang_probe.run.run import Run
from sglang_probe.studies.factorial import cells, outcomes
from sglang_probe.studies.factorial.evicted import BASELINE, evicted_rid
from sglang_probe.studies.factorial.study import (
    FactorialOptions,
    budget_of,
    pseudo_of,
    pseudo_rows,
    reference_of,
)
from sglang_probe.workload.request import asked_rid


def kept_sets(
    runs: Mapping[str, Run], o: FactorialOptions, positions: Sequence[str], *, seed: int = 0
) -> dict[str, Kept]:
    """Kept sets of the first budget by `evicted_rid`, for every content at `positions` and for the baselines.

    The real decoding itself (`oracle`) reads the future. All layers of the model must have been captured.
    """
    decoded, treated = runs["decoded"], runs["cells"]
    requests = decoded.requests()
    where = pseudo_rows(treated, requests)
    chosen: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for layer in captured_layers(decoded):
        pseudo = pseudo_of(treated, where, layer)
        for rid in requests["rid"]:
            reference = reference_of(decoded, rid, layer, o, None)
            asked = asked_rid(rid)
            budget = budget_of(reference.layer.length, o.budgets[0], o)
            scores = {
                evicted_rid(asked, c.content, c.position): outcomes.pseudo_scores(reference, pseudo[c.rid(asked)])
                for c in cells.all_cells()
                if c.position in positions and c.rid(asked) in pseudo
            }
            scores |= {
                evicted_rid(asked, BASELINE, "window"): outcomes.window_scores(reference, o.pseudo_tokens),
                evicted_rid(asked, BASELINE, "oracle"): outcomes.true_scores(reference),
                evicted_rid(asked, BASELINE, "random"): torch.rand(reference.layer.shape_GL, generator=generator),
            }
            for key, scores_GL in scores.items():
                chosen.setdefault(key, []).append(top_k(scores_GL, budget, reference.trivial_L))
    return {key: Kept(torch.stack(layers)[None]) for key, layers in chosen.items()}

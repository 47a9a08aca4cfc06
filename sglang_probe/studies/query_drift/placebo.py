"""Borders at which nothing happens: the same request, read as though its prompt had ended earlier.

What stands after such a border is text of the prompt and was computed in a prefill, like the text before it. Whatever a
statistic of "window against decode steps" shows there is what text does by itself: the null of excess drift, of
horizons and of change points. In a chat the borders are where earlier answers of the assistant begin, which is what the
true border is, too; else they are drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pandas as pd
import torch
from torch import Tensor

from sglang_probe.eviction.layer import Queries
from sglang_probe.studies.query_drift.captured import Captured
from sglang_probe.studies.query_drift.cosine import unit
from sglang_probe.studies.query_drift.options import DriftOptions

TURN, TEXT = "turn", "text"


@dataclass(frozen=True)
class Border:
    """A place in a prompt that is taken for its end."""

    at: int
    """First position after it."""
    steps: int
    """Positions after it that are taken for decode steps."""
    where: str
    """`turn`, where an earlier answer begins, or `text`."""


def placebo_borders(c: Captured, o: DriftOptions, *, seed: int) -> list[Border]:
    """At most `o.placebos` borders with as much text before them as a prompt must have, and as many steps after them as
    the request decoded, as far as there are.

    Args:
        seed: the same for all layers of a request, which then have the same borders.
    """
    first = o.shortest_prompt
    turns = [Border(start, min(c.steps, end - start), TURN) for start, end in c.turns if start >= first]
    turns = [b for b in turns if b.steps >= o.fewest_steps]
    if turns:
        return turns[-o.placebos :]
    steps = min(c.steps, c.length - first)
    if steps < o.fewest_steps:
        return []
    choices = c.length - steps - first + 1
    order = torch.randperm(choices, generator=torch.Generator().manual_seed(seed))[: o.placebos]
    return [Border(first + int(i), steps, TEXT) for i in order.sort().values]


def at_border(c: Captured, border: Border) -> Captured:
    """The request as though its prompt ended at a border; keys and queries are views of those that were captured."""
    end, stop = border.at, border.at + border.steps
    layer = c.layer
    v, q_pre = layer.v_LGD, layer.q_pre_NHD
    cut = replace(
        layer,
        q_NHD=layer.q_NHD[:end],
        k_LGD=layer.k_LGD[:end],
        v_LGD=None if v is None else v[:end],
        q_pre_NHD=None if q_pre is None else q_pre[:end],
        needed_L=None,
        future=Queries(layer.q_NHD[end:stop], layer.k_LGD[end:stop], None if v is None else v[end:stop]),
    )
    return replace(
        c, layer=cut, prompt_pre_LHD=c.prompt_pre_LHD[:end], decode_pre_THD=c.prompt_pre_LHD[end:stop], turns=()
    )


def placebo_excess(c: Captured, borders: list[Border], o: DriftOptions) -> pd.DataFrame:
    """Excess drift at each border, as `excess.excess_drift` finds it there, as means over heads.

    Columns: `border` (number), `at`, `where`, `kind` (raw, centred), `distance`, `prompt`, `decode`, `pairs`.
    """
    rows = []
    for kind, prompt in (("raw", c.prompt_pre_LHD), ("centred", c.centred(c.prompt_pre_LHD))):
        running = _running_cosines(prompt, o.edges[-1])
        for number, b in enumerate(borders):
            named = {"border": number, "at": b.at, "where": b.where, "kind": kind}
            before, after, pairs = _means_by_distance(running, b, c.window)
            for first, last in pairwise(o.edges):
                n = pairs[first:last]
                if n.sum():
                    sides = {"prompt": before, "decode": after}
                    means = {name: float((x[first:last] * n).sum() / n.sum()) for name, x in sides.items()}
                    rows.append({**named, "distance": first, **means, "pairs": int(n.sum())})
    return pd.DataFrame(rows, columns=["border", "at", "where", "kind", "distance", "prompt", "decode", "pairs"])


def _running_cosines(x_NHD: Tensor, reach: int) -> Tensor:
    """Sums over positions below m, `[reach, N + 1]`, of the cosine of a position to the one Δ before it, as the mean
    over heads."""
    u_NF = unit(x_NHD).flatten(-2)
    n, heads = len(u_NF), x_NHD.shape[-2]
    out = torch.zeros(reach, n + 1, dtype=torch.float64)
    for apart in range(1, min(reach, n)):
        out[apart, 1 + apart :] = (u_NF[apart:] * u_NF[:-apart]).sum(-1) / heads
    return out.cumsum(1)


def _means_by_distance(running: Tensor, b: Border, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cosine at each distance of pairs before the border, and of window and steps; and the pairs of the latter."""
    apart = torch.arange(len(running))
    # Of a pair the earlier query is in the window, and the later one among the steps.
    low = (b.at - window + apart).clamp(min=b.at, max=running.shape[1] - 1)
    high = (b.at + apart).clamp(max=b.at + b.steps)
    pairs = torch.where(apart < b.at, (high - low).clamp(min=0), 0)
    after = (running[apart, high] - running[apart, low]) / pairs.clamp(min=1)
    return running[apart, b.at] / (b.at - apart).clamp(min=1), after, pairs

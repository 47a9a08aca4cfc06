"""Requests of a run as stacked `Layer`s: all layers of all requests of one shape in one object.

Rows of a hook point are read once for the whole run; going through `layer_from_run` request by request reads the ledger
for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sglang_probe.attention.from_run import model_config
from sglang_probe.attention.rope import Rotary
from sglang_probe.attention.weights import AttentionSpec
from sglang_probe.errors import ProbeError, RunDirectoryError
from sglang_probe.eviction.from_run import output_projection
from sglang_probe.eviction.layer import Layer, Queries
from sglang_probe.eviction.protocol import Protocol, under
from sglang_probe.run.hook_points import ROTATED_KEY, ROTATED_QUERY, VALUE
from sglang_probe.run.run import Run
from sglang_probe.run.schema import OVERSHOOT
from sglang_probe.studies.evict.needed import Positions, mask
from sglang_probe.workload.request import asked_rid


@dataclass(frozen=True)
class Batch:
    """Requests that agree in prompt length, context length and decode steps."""

    rids: tuple[str, ...]
    context: int
    """Positions before the question; the prompt's length where there is none."""
    layer: Layer
    """Leading axes: requests B, captured layers Y. In float32, whatever was captured."""
    itemsize: int
    """Bytes per captured element."""
    hidden_needed_L: Tensor | None = None
    """Positions that answers need with the question hidden, `[B, Y, L]`; `layer.needed_L` has those with it visible,
    which leave the first answer out."""

    def under(self, protocol: Protocol) -> Layer:
        """The layer as a method sees it. With the question hidden the first answer is generated from the compressed
        cache like the others, so that what it needs is needed."""
        layer = under(protocol, self.layer, context=self.context)
        if protocol is Protocol.QUERY_VISIBLE or self.hidden_needed_L is None:
            return layer
        return replace(layer, needed_L=self.hidden_needed_L[..., : self.context])


def batches(
    run: Run,
    layers: list[int],
    *,
    model: str | Path,
    most: int = 64,
    needed: Positions | None = None,
) -> Iterator[Batch]:
    """All requests that decoded, grouped by shape.

    Args:
        layers: captured layers, in order.
        model: model folder, for the output projections.
        needed: positions that answers need; by default those that the workload knows, if it does.
        most: requests per batch at most.

    Raises:
        RunDirectoryError: a position has no row, or a hook point was not captured.
    """
    requests = requests_of(run).set_index("rid")
    requests = requests[requests["output_len"] > 1]
    rows = {site: {y: RowsOf(run, f"blocks.{y}.{site}") for y in layers} for site in SITES}
    where = row_indices(run)
    config = model_config(run, model)
    rotary = Rotary.from_model_config(config)
    projections = torch.stack([output_projection(Path(model), y, config) for y in layers]).float()
    for (length, context, steps), rids in _groups(requests).items():
        for start in range(0, len(rids), most):
            chosen = rids[start : start + most]
            at = np.stack([where[rid][: length + steps] for rid in chosen])
            stored = [torch.stack([rows[site][y].at(at) for y in layers], 1) for site in SITES]
            q, k, v = (x.float() for x in stored)
            size = (len(chosen), len(layers))
            index = torch.tensor(layers).expand(size)
            number = torch.tensor([int(requests.at[rid, "index"]) for rid in chosen])[:, None].expand(size)
            layer = Layer(
                q_NHD=q[:, :, :length],
                k_LGD=k[:, :, :length],
                v_LGD=v[:, :, :length],
                spec=AttentionSpec(scaling=q.shape[-1] ** -0.5),
                rotary=rotary,
                w_o_HDM=projections.expand(size[0], *projections.shape),
                index=index,
                num_layers=int(config["num_hidden_layers"]),
                request=number,
                future=Queries(q[:, :, length:], k[:, :, length:], v[:, :, length:]),
            )
            visible, hidden = _needed(requests, chosen, length, needed)
            if visible is not None and hidden is not None:
                shape = (len(chosen), len(layers), length)
                layer = replace(layer, needed_L=visible[:, None].expand(shape))
                hidden = hidden[:, None].expand(shape)
            yield Batch(tuple(chosen), context, layer, stored[0].element_size(), hidden)


SITES = (ROTATED_QUERY, ROTATED_KEY, VALUE)


class RowsOf:
    """All rows of a hook point, `[rows, heads, head_dim]`, in the model's dtype."""

    def __init__(self, run: Run, name: str) -> None:
        shards = list(run.iter_shards(name))
        numbers = np.concatenate([n for n, _ in shards])
        if not np.array_equal(numbers, np.arange(len(numbers))):
            raise ProbeError(f"{run.path} does not hold every row of `{name}`", fix="record it without `rows`")
        values = torch.cat([x for _, x in shards])
        self._values = values.view(len(values), *run.heads(name))

    def at(self, indices: np.ndarray) -> Tensor:
        return self._values[torch.from_numpy(indices)]


def requests_of(run: Run) -> pd.DataFrame:
    """`run.requests()` under the ids by which the study asked: a resumed run adds to those that it asked again."""
    requests = run.requests()
    return requests.assign(rid=requests["rid"].map(asked_rid))


def row_indices(run: Run) -> dict[str, np.ndarray]:
    """Row of every position of every request that has a KV entry, in order; ids as in `requests_of`."""
    tokens = run.tokens()
    tokens["rid"] = tokens["rid"].map(asked_rid)
    tokens = tokens[tokens["phase"] != OVERSHOOT].sort_values(["rid", "position"])
    if (absent := tokens[tokens["source_row"] < 0]).size:
        first = absent.iloc[0]
        raise RunDirectoryError(f"{first['rid']}: position {first['position']} has no row")
    return {str(rid): mine.to_numpy() for rid, mine in tokens.groupby("rid", sort=False)["source_row"]}


def _groups(requests: pd.DataFrame) -> dict[tuple[int, int, int], list[str]]:
    """Requests by prompt length, context length and decode steps."""
    out: dict[tuple[int, int, int], list[str]] = {}
    for r in requests.itertuples():
        context = getattr(r, "context_len", None)
        context = int(r.prompt_len) if context is None or pd.isna(context) else int(context)
        out.setdefault((int(r.prompt_len), context, int(r.output_len) - 1), []).append(str(r.Index))
    return out


def _needed(
    requests: pd.DataFrame, rids: list[str], length: int, found: Positions | None
) -> tuple[Tensor | None, Tensor | None]:
    """Positions that answers need, `[B, L]`, with the question visible (all answers but the first) and hidden (all).

    Found by removal in this study, or by knocking out when the model was made (`needed_causal`).
    """
    if found is not None:
        visible, hidden = (mask(found, rids, p, length) for p in (Protocol.QUERY_VISIBLE, Protocol.QUERY_HIDDEN))
        return torch.from_numpy(visible), torch.from_numpy(hidden)
    if "needed_causal" not in requests.columns or requests.loc[rids, "needed_causal"].isna().any():
        return None, None
    later, every = (torch.zeros(len(rids), length, dtype=torch.bool) for _ in range(2))
    for i, rid in enumerate(rids):
        for j, positions in enumerate(requests.at[rid, "needed_causal"]):
            at = torch.as_tensor(np.asarray(positions, dtype=np.int64))
            every[i, at] = True
            if j:
                later[i, at] = True
    return later, every

"""Requests of a run as stacked `Layer`s: all layers of all requests of one shape in one object.

Only the rows of one group of requests are in memory, whatever the run holds; the ledger is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sglang_probe.attention.from_run import model_config
from sglang_probe.attention.rope import Rotary
from sglang_probe.attention.weights import AttentionSpec
from sglang_probe.errors import RunDirectoryError
from sglang_probe.eviction.from_run import output_projection
from sglang_probe.eviction.layer import Layer, Queries
from sglang_probe.eviction.protocol import Protocol, under
from sglang_probe.run.hook_points import ROTATED_KEY, ROTATED_QUERY, VALUE
from sglang_probe.run.run import Run
from sglang_probe.run.schema import OVERSHOOT
from sglang_probe.studies.evict.needed import Positions, mask
from sglang_probe.verify.frames import ReadOnce
from sglang_probe.workload.request import asked_rid

MOST_BYTES = 512 << 20
"""What the rows and weights of a group may take: a few times as much is in use while it is judged."""


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


@dataclass(frozen=True)
class Group:
    """Requests of one shape that are held in memory together."""

    rids: tuple[str, ...]
    length: int
    context: int
    steps: int


class Reader:
    """Reads groups of requests of a run, all of `layers` of each. What the groups share is read once.

    Args:
        layers: captured layers, in order.
        model: model folder, for the output projections.
        needed: positions that answers need; by default those that the workload knows, if it does.

    Raises:
        RunDirectoryError: a position has no row.
    """

    def __init__(self, run: Run, layers: Sequence[int], *, model: str | Path, needed: Positions | None = None) -> None:
        self._run, self._layers, self._needed = ReadOnce(run), list(layers), needed
        requests = requests_of(self._run).set_index("rid")
        self._requests = requests[requests["output_len"] > 1]
        self._where = row_indices(self._run)
        self._config = model_config(run, model)
        self._model = Path(model)

    @cached_property
    def _projections(self) -> Tensor:
        return torch.stack([output_projection(self._model, y, self._config) for y in self._layers]).float()

    def groups(self, most_bytes: int = MOST_BYTES) -> list[Group]:
        """All requests that decoded, in groups of one shape whose queries, keys, values and weights take `most_bytes`
        or less in float32.

        A group has two requests at least wherever there are two of its shape: one of the controls takes the queries of
        another request.
        """
        out = []
        for (length, context, steps), rids in _shapes(self._requests).items():
            parts = split(rids, max(2, most_bytes // self._bytes(length, steps)))
            out += [Group(tuple(part), length, context, steps) for part in parts]
        return out

    def _bytes(self, length: int, steps: int) -> int:
        """Of one request: what was captured, and the weights of its decode steps, of which metrics hold several."""
        heads, dim = self._run.heads(f"blocks.{self._layers[0]}.{ROTATED_QUERY}")
        kv_heads, _ = self._run.heads(f"blocks.{self._layers[0]}.{ROTATED_KEY}")
        captured = (heads + 2 * kv_heads) * dim
        weights = 4 * heads * steps
        return 4 * len(self._layers) * (length + steps) * (captured + weights)

    def read(self, group: Group) -> Batch:
        """The rows of a group.

        Raises:
            RunDirectoryError: a row or a hook point was not captured.
        """
        chosen, length, layers = list(group.rids), group.length, self._layers
        at = np.stack([self._where[rid][: length + group.steps] for rid in chosen])
        stored = [rows_at(self._run, layers, site, at) for site in SITES]
        q, k, v = (x.float() for x in stored)
        size = (len(chosen), len(layers))
        requests = self._requests
        number = torch.tensor([int(requests.at[rid, "index"]) for rid in chosen])[:, None].expand(size)
        layer = Layer(
            q_NHD=q[:, :, :length],
            k_LGD=k[:, :, :length],
            v_LGD=v[:, :, :length],
            spec=AttentionSpec(scaling=q.shape[-1] ** -0.5),
            rotary=Rotary.from_model_config(self._config),
            w_o_HDM=self._projections.expand(size[0], *self._projections.shape),
            index=torch.tensor(layers).expand(size),
            num_layers=int(self._config["num_hidden_layers"]),
            request=number,
            future=Queries(q[:, :, length:], k[:, :, length:], v[:, :, length:]),
        )
        visible, hidden = _needed(requests, chosen, length, self._needed)
        if visible is not None and hidden is not None:
            shape = (*size, length)
            layer = replace(layer, needed_L=visible[:, None].expand(shape))
            hidden = hidden[:, None].expand(shape)
        return Batch(group.rids, group.context, layer, stored[0].element_size(), hidden)


SITES = (ROTATED_QUERY, ROTATED_KEY, VALUE)


def split(rids: Sequence[str], most: int) -> list[Sequence[str]]:
    """Parts of about equal size: at most `most`, or three where that is less, and at least two where there are two."""
    parts = max(1, min(-(-len(rids) // most), len(rids) // 2))
    return [rids[len(rids) * i // parts : len(rids) * (i + 1) // parts] for i in range(parts)]


def rows_at(run: Run, layers: Sequence[int], site: str, at: np.ndarray) -> Tensor:
    """Rows of a site of some layers, `[*at.shape[:-1], layers, at.shape[-1], heads, head_dim]`, in the model's dtype.

    Raises:
        RunDirectoryError: one does not exist.
    """
    out = []
    for y in layers:
        values = run.rows(f"blocks.{y}.{site}", at.ravel(), split_heads=True)
        out.append(values.view(*at.shape, *values.shape[1:]))
    return torch.stack(out, at.ndim - 1)


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


def _shapes(requests: pd.DataFrame) -> dict[tuple[int, int, int], list[str]]:
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

"""What is monitored of each trajectory: numbers per row, from recorded scores or from rows of a hook point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.monitor.reading import Reading
from sglang_probe.monitor.sampling import Sampling
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.harvested import harvested, refuse_mixed_models
from sglang_probe.sae.sae import SAE

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Trajectories:
    """Numbers of the rows of requests."""

    names: tuple[str, ...]
    """What the columns of `values_NK` are."""
    values_NK: Array
    """float64; a number of a row may be missing (NaN)."""
    of_N: Array
    """Number of the trajectory of each row."""
    frame: pd.DataFrame
    """Of each trajectory, in the order in which their first rows were computed, run by run: `run` (number), `rid`,
    `family`, `rows`."""
    x_ND: torch.Tensor | None = None
    """The rows themselves, where a hook point was read."""
    weight_N: Array | None = None
    """One over the probability with which each row was read; None: all alike."""

    def __len__(self) -> int:
        return len(self.frame)

    def only(self, which: Array) -> Trajectories:
        """Those trajectories that a mask names."""
        rows = np.flatnonzero(which[self.of_N])
        number = np.cumsum(which) - 1
        x = None if self.x_ND is None else self.x_ND[rows.tolist()]
        weight = None if self.weight_N is None else self.weight_N[rows]
        frame = self.frame[which].reset_index(drop=True)
        return Trajectories(self.names, self.values_NK[rows], number[self.of_N[rows]], frame, x, weight)


def read(
    runs: Sequence[Run],
    *,
    hook_point: str | None = None,
    sae: SAE | None = None,
    features: Sequence[int] = (),
    where: str = "phase == 'decode'",
    rows: int | None = None,
    vectors: Mapping[str, torch.Tensor] | None = None,
    sampling: Sampling | None = None,
) -> Trajectories:
    """Read the trajectories of runs.

    Args:
        hook_point: read its rows; None: the scores of probes that were recorded (`Run.scores`), a column each.
        sae: of that hook point: error and active latents of each row too.
        features: latents of it whose activations are columns.
        where: which positions: a pandas query over the columns of `Run.tokens`.
        rows: the first so many of each trajectory; shorter ones are left out. None: all.
        vectors: of that hook point, float32 `[D]` by name: a column `x @ w` each.
        sampling: the decode rows that a server would have read by this rule, of what was recorded. None: all.

    Raises:
        ConfigError: nothing is left, the query cannot be read, or the SAE has no such latent; or a sampling by entropy,
            which was not recorded.
        RunDirectoryError: neither scores nor the hook point were recorded, or the query cannot be used.
    """
    refuse_mixed_models(runs)
    if hook_point is None:
        tokens, names, values, x = _scores(runs, where)
    else:
        # No row is left out for its norm: rows that have grown are what a monitor is for.
        held = harvested(runs, hook_point, where=where, sinks=Sinks(1, None))
        tokens, x = held.tokens, held.x_ND
        if sampling is not None:
            keep = _sampled(runs, tokens, sampling)
            tokens, x = tokens[keep].reset_index(drop=True), x[np.flatnonzero(keep).tolist()]
            if not len(tokens):
                raise ConfigError(f"the runs hold no row of {hook_point} that `every: {sampling.every}` reads")
        reading = Reading(sae=sae, features=features, vectors=vectors)
        names, values = reading.names, reading.columns(x)
    ranked = _order(runs, tokens).reset_index().sort_values(["run", "order", "rid"], kind="stable")
    keys = pd.MultiIndex.from_frame(ranked[["run", "rid"]])
    of = keys.get_indexer(pd.MultiIndex.from_frame(tokens[["run", "rid"]]))
    counts = np.bincount(of, minlength=len(keys))
    families = tokens.groupby(["run", "rid"])["family"].first().reindex(keys)
    frame = pd.DataFrame(
        {"run": ranked["run"].to_numpy(), "rid": ranked["rid"].to_numpy(), "family": families.to_numpy()}
    ).assign(rows=counts)
    return _first_rows(Trajectories(names, values, of, frame, x), rows)


def read_monitored(runs: Sequence[Run], *, rows: int | None = None) -> Trajectories:
    """The trajectories that a live monitor read, from the table `monitored` of its segments: a request that reaches
    into several is one.

    Requests are of one family if one of them reused what another generated, as the turns of a conversation do, or found
    its whole prompt in the cache. That much the ledger says. Turns that found nothing in the cache any more, or that
    another data-parallel rank served, are of several families: then more of what is ranked against is like what was
    fitted to than the split promises, and requests that are like neither alarm too often.

    Raises:
        ConfigError: nothing was read, or by several readings or rules.
    """
    frames, told = [], []
    latest: dict[str, int] = {}
    for number, run in enumerate(runs):
        frame = run.monitored()
        told.append(run.manifest.get("monitor") or {})
        carried = (run.manifest.get("segment") or {}).get("carried_in") or {}
        for rid in frame["rid"].unique():  # a name may be given again once nothing refers to the request before
            if rid not in latest or rid not in carried:
                latest[rid] = number
        if len(frame):
            frames.append(frame.assign(began=frame["rid"].map(latest)))
    if not frames:
        raise ConfigError("no monitor read anything in these runs", fix="give segments of a server with `monitor`")
    alike = [
        {k: t.get(k) for k in ("hook_point", "columns", "sampling", "rows", "vectors", "sae_sha256")} for t in told
    ]
    if len({t.get("model_weight_hash") for t in told}) > 1:
        raise ConfigError("the runs are of servers of several models", fix="make a profile of runs of one model")
    if any(t != alike[0] for t in alike):
        raise ConfigError("the runs were monitored by different rules", fix="make a profile of runs of one rule")
    table = pd.concat(frames, ignore_index=True)
    of, keys = pd.factorize(pd.MultiIndex.from_frame(table[["began", "rid"]]))
    rids = [rid for _, rid in keys]
    family = _families(runs)
    families = [family.get(rid, rid) for rid in rids]
    frame = pd.DataFrame({"run": 0, "rid": rids, "family": families}).assign(rows=np.bincount(of))
    values = np.array(table["values"].tolist(), dtype=np.float64)
    weight = 1 / table["probability"].to_numpy(np.float64)
    names = tuple(alike[0]["columns"] or ())
    alone = bool((weight == weight[0]).all())
    return _first_rows(Trajectories(names, values, of, frame, None, None if alone else weight), rows)


def _families(runs: Sequence[Run]) -> dict[str, str]:
    """Name of the family of each request that is in one with others (`read_monitored`)."""
    lengths: dict[str, int] = {}
    above: dict[str, str] = {}

    def first(rid: str) -> str:
        while rid in above:
            rid = above[rid]
        return rid

    for run in runs:
        lengths.update(run.engine_requests().set_index("rid")["prompt_len"].dropna())
    for run in runs:
        spans = run.spans()
        spans = spans[(spans["status"] == schema.REUSED) & spans["origin_rid"].notna()]
        own, origins = (spans[c].map(lengths).astype(np.float64) for c in ("rid", "origin_rid"))
        generated = spans["end"] > origins
        whole = spans["end"] >= own - 1  # the last position of a prompt is always computed
        for rid, origin in spans.loc[generated | whole, ["rid", "origin_rid"]].itertuples(index=False):
            if (a := first(rid)) != (b := first(origin)):
                above[a] = b
    return {rid: first(rid) for rid in above}


def _first_rows(found: Trajectories, rows: int | None) -> Trajectories:
    if rows is None:
        return found
    place = pd.Series(found.of_N).groupby(found.of_N).cumcount().to_numpy()
    counts = np.bincount(found.of_N, minlength=len(found))
    keep = place < rows
    x, weight = found.x_ND, found.weight_N
    cut = Trajectories(
        found.names,
        found.values_NK[keep],
        found.of_N[keep],
        found.frame.assign(rows=np.minimum(counts, rows)),
        None if x is None else x[keep],
        None if weight is None else weight[keep],
    ).only(counts >= rows)
    if not len(cut):
        raise ConfigError(f"no trajectory has {rows} rows", fix=f"the longest has {counts.max()}")
    return cut


def _sampled(runs: Sequence[Run], tokens: pd.DataFrame, sampling: Sampling) -> Array:
    if sampling.entropy is not None:
        raise ConfigError(
            "which rows have which entropy was not recorded",
            fix="make the profile of segments of a server whose `monitor` sampled by entropy",
        )
    lengths = [run.requests().set_index("rid")["prompt_len"] for run in runs]
    prompt_len = np.empty(len(tokens), dtype=np.int64)
    for number in tokens["run"].unique():
        mine = (tokens["run"] == number).to_numpy()
        prompt_len[mine] = tokens.loc[mine, "rid"].map(lengths[number]).to_numpy()
    step = tokens["position"].to_numpy() - prompt_len
    return np.asarray((step >= 0) & sampling.candidates(step, np.zeros(len(step))))


def _scores(runs: Sequence[Run], where: str) -> tuple[pd.DataFrame, tuple[str, ...], Array, None]:
    frames: list[pd.DataFrame] = []
    columns: list[str] = []
    for number, run in enumerate(runs):
        scores = run.scores()
        mine = [c for c in scores.columns if c not in _NO_SCORES]
        if columns and mine != columns:
            raise ConfigError(f"{run.path} has scores of {mine}, and {runs[0].path} of {columns}")
        columns = mine
        try:
            scores = scores.query(where)
        except Exception as e:  # pandas raises many kinds
            raise ConfigError(f"`{where}` cannot be used to choose positions: {e}") from e
        families = run.requests().set_index("rid")["family"]
        family = scores["rid"].map(families)
        frames.append(scores.assign(run=number, family=family.fillna(scores["rid"])))
    tokens = pd.concat(frames, ignore_index=True)
    if not len(tokens):
        raise ConfigError(f"the runs have no scores of positions with `{where}`")
    return tokens, tuple(columns), tokens[columns].to_numpy(np.float64), None


_NO_SCORES = {"rid", "position", "token_id", "segment", "status", "phase", "forward_id", "intervention"}


def _order(runs: Sequence[Run], tokens: pd.DataFrame) -> pd.Series:
    """The first forward pass of each request, by `run` and `rid`. Not the last one: in order of their ends short
    trajectories would come first."""
    parts = []
    for number in sorted(tokens["run"].unique()):
        spans = runs[number].spans()
        spans = spans[spans["status"] == schema.COMPUTED]
        parts.append(spans.groupby("rid")["forward_id"].min().rename("order").reset_index().assign(run=number))
    found = pd.concat(parts).set_index(["run", "rid"])["order"]
    here = pd.MultiIndex.from_frame(tokens[["run", "rid"]].drop_duplicates())
    return found.reindex(here).fillna(0)

"""Lookahead queries for the methods that ask for them: which requests generate them, and what they captured.

- LAQ and LAQ++: greedy tokens generated under a compressed cache (SnapKV at the same budget); their queries are those
  of that run, at the true future positions.
- SpecKV: the paper drafts with a smaller model. There is none here: the draft is the same model's under StreamingLLM at
  the same budget, and its tokens then run through the full cache, whose queries score.
- DapQ: pseudo tokens after the prompt, the first two and the last of what is compressed; their queries come from
  prefill.

Where the question is hidden, all of it happens after the context alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer, Queries
from sglang_probe.eviction.lookahead import LookaheadScorer
from sglang_probe.eviction.methods.snapkv import SnapKV
from sglang_probe.eviction.methods.streaming_llm import StreamingLLM
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.kept_set import Kept
from sglang_probe.run.hook_points import ROTATED_KEY, ROTATED_QUERY
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.evict.grid import Entry, Protection, budget_name, tokens_of
from sglang_probe.studies.evict.layers import Batch, requests_of, row_indices, rows_at
from sglang_probe.verify.frames import ReadOnce

LAQ, SPECKV, DAPQ = "laq", "speckv", "dapq"
COMPRESSED_BY = {LAQ: "snapkv", SPECKV: "streaming_llm"}
_FIRST = 2
"""Pseudo tokens of DapQ that are the prompt's first; the rest are its last."""

Key = tuple[str, str, str]
"""Protocol, name of the lookahead queries, budget (empty where the budget changes nothing)."""


@dataclass(frozen=True)
class Asked:
    """A request that generates or scores lookahead tokens."""

    rid: str
    at: Key
    source: str
    context: int
    """Positions that are compressed: its prompt, or the part of it before pseudo tokens."""
    steps: int
    kept: Kept | None = None
    pseudo: tuple[int, ...] = ()
    """Tokens after the compressed positions, run as a prompt (DapQ) or as forced output (SpecKV)."""


@dataclass(frozen=True)
class AheadRuns:
    """Where the lookahead queries of a task are: each run with what was asked of it, without the kept sets."""

    recorded: tuple[tuple[Path, tuple[Asked, ...]], ...] = ()

    def read(self, rids: Sequence[str], layers: Sequence[int]) -> Ahead:
        """Those of some sources."""
        out = Ahead()
        for path, asked in self.recorded:
            collect([a for a in asked if a.source in rids], load_run(path), layers, into=out)
        return out


@dataclass
class Ahead:
    """Lookahead queries and keys by `Key` and source: `[Y, n, H, D]` and `[Y, n, G, D]`."""

    found: dict[Key, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def into(self, layer: Layer, policy_queries: str, protocol: Protocol, budget: str, rids: Sequence[str]) -> Layer:
        """The layer with the lookahead queries that a policy asks for.

        Raises:
            ProbeError: there are none.
        """
        mine = self.found.get((protocol.value, policy_queries, budget)) or self.found.get(
            (protocol.value, policy_queries, "")
        )
        if mine is None or any(r not in mine for r in rids):
            raise ProbeError(f"no lookahead queries `{policy_queries}` were generated")
        fewest = min(mine[r][0].shape[1] for r in rids)
        q, k = (torch.stack([mine[r][i][:, :fewest] for r in rids]).float() for i in (0, 1))
        return replace(layer, lookahead={policy_queries: Queries(q, k)})


def steps_needed(entries: Sequence[Entry]) -> dict[str, int]:
    """Lookahead tokens by name, as many as the most demanding policy wants.

    Raises:
        ProbeError: a policy asks for queries that nothing here generates.
    """
    out: dict[str, int] = {}
    for e in entries:
        if (name := e.lookahead) is not None:
            policy = _scorer(e.policy)
            out[name] = max(out.get(name, 0), policy.steps)
            if name not in (LAQ, SPECKV, DAPQ):
                raise ProbeError(f"`{e.label}` asks for lookahead queries `{name}`; known: {LAQ}, {SPECKV}, {DAPQ}")
    return out


def first_pass(
    found: Iterable[Batch],
    needed: Mapping[str, int],
    budgets: Sequence[int | Fraction],
    protocols: Sequence[Protocol],
    protect: Protection,
    prompts: Mapping[str, Sequence[int]],
) -> Iterator[Asked]:
    """Requests under a compressed cache (LAQ, drafts of SpecKV), and those with pseudo tokens (DapQ).

    Args:
        protect: what the compressed cache always keeps; a method that is also run as published has the same tokens.
    """
    number = 0
    for batch in found:
        for protocol in protocols:
            layer = batch.under(protocol)
            for name in sorted(needed):
                if name == DAPQ:
                    for rid in batch.rids:
                        prompt = tuple(prompts[rid][: layer.length])
                        pseudo = (*prompt[:_FIRST], *prompt[_FIRST - needed[name] :])
                        at = (protocol.value, name, "")
                        yield Asked(f"p{number:06d}", at, rid, layer.length, needed[name], pseudo=pseudo)
                        number += 1
                    continue
                for budget in budgets:
                    try:
                        selection = _compressor(name, protect).select(layer, tokens_of(budget, layer.length))
                    except ProbeError:
                        continue
                    at = (protocol.value, name, budget_name(budget))
                    for rid, keep_YGL in zip(batch.rids, selection.keep_GL, strict=True):
                        kept = Kept(keep_YGL[None].clone())
                        yield Asked(f"p{number:06d}", at, rid, layer.length, needed[name], kept=kept)
                        number += 1


def second_pass(asked: Sequence[Asked], first: Run) -> list[Asked]:
    """Drafts of the first pass, to be run through the full cache."""
    outputs = requests_of(first).set_index("rid")["output_ids"]
    drafts = [a for a in asked if a.at[1] == SPECKV]
    return [
        replace(a, rid=f"d{i:06d}", kept=None, pseudo=tuple(int(t) for t in outputs[a.rid]))
        for i, a in enumerate(drafts)
    ]


def collect(asked: Sequence[Asked], run: Run, layers: Sequence[int], *, into: Ahead) -> None:
    """Read the captured queries and keys of the lookahead positions."""
    run = ReadOnce(run)
    where = row_indices(run)
    for a in asked:
        if a.rid not in where:
            continue
        at = where[a.rid][a.context : a.context + a.steps]
        q, k = (rows_at(run, layers, site, at) for site in (ROTATED_QUERY, ROTATED_KEY))
        into.found.setdefault(a.at, {})[a.source] = (q, k)


def _compressor(name: str, protect: Protection) -> Method:
    """What compresses the cache under which lookahead tokens are generated."""
    method = SnapKV(window=max(1, protect.recent)) if COMPRESSED_BY[name] == "snapkv" else StreamingLLM()
    return method.protecting(protect.sinks, protect.recent)


def _scorer(policy: object) -> LookaheadScorer:
    while not isinstance(policy, LookaheadScorer):
        policy = policy.base  # type: ignore[attr-defined]
    return policy

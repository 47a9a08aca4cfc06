"""What the recorded requests would have reused under other settings of the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.harvest.simulate import Tree, simulated_tree
from sglang_probe.run import schema
from sglang_probe.run.causes import page_size
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.base import Measured
from sglang_probe.studies.what_if.replay import Outcome, as_recorded, asked_of, one_by_one, ordered, routed

ORDERS = ("recorded", "family", "sorted", "shuffled")


@dataclass(frozen=True)
class Settings:
    """Of a cache, and of who comes when and where."""

    kv_tokens: int
    page: int
    policy: str
    order: str = "recorded"
    router: str | None = None

    @property
    def told(self) -> str:
        """In words."""
        more = "" if self.order == "recorded" else f", order {self.order}"
        more += "" if self.router is None else f", router {self.router}"
        return f"{self.kv_tokens:,} KV tokens, page {self.page}, {self.policy}{more}"


@dataclass(frozen=True)
class WhatIfResult(Measured):
    """Reuse under settings."""

    run: str
    table: pd.DataFrame
    """settings, schedule, prompt, reused, share, difference (to the same schedule under the recorded settings),
    did_not_fit."""
    requests: pd.DataFrame
    """rid, attempt, recorded, replayed, asked."""
    recorded: int
    replayed: int
    differ: int
    prompt: int
    notes: Sequence[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The summary."""
        return {
            "run": self.run,
            "prompt_tokens": self.prompt,
            "reused_recorded": self.recorded,
            "reused_replayed_as_recorded": self.replayed,
            "matches_that_differ": self.differ,
            "matches": len(self.requests),
            "settings": self.table.to_dict("records"),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table by name."""
        return {"settings": self.table, "requests": self.requests}


def what_if(
    path: Path,
    *,
    kv_tokens: str | None = None,
    policy: str | None = None,
    page: int | None = None,
    order: str = "recorded",
    router: str | None = None,
    make: Callable[[Settings], Tree] | None = None,
) -> WhatIfResult:
    """Replay a run under its own settings, and under others.

    Args:
        kv_tokens: slots of the pool, or a multiple such as `2x`. policy, page: of the tree. order: one of `ORDERS`.
        router: `prefix:N` or `round:N`: N replicas, each with a pool of `kv_tokens`.
        make: the tree of given settings; default: SGLang's own.

    Raises:
        RunDirectoryError: the run does not say what is needed. ConfigError: a setting that is none.
    """
    run = load_run(path)
    if run.tree().empty:
        raise RunDirectoryError(f"{path}: not recorded: what the radix tree took and gave", fix="record it again")
    requests = run.requests(interrupted=True)
    # SGLang serves what it refuses as a prompt of one token, which takes slots and is published like any other.
    requests = requests[requests["prompt_ids"].notna() & (requests["prompt_len"] > 0)]
    if requests.empty:
        raise RunDirectoryError(f"{path} has no token ids, and a tree is driven by them", fix="`live: {privacy: ids}`")
    ours = _recorded_settings(run)
    other = Settings(
        _tokens(kv_tokens, ours.kv_tokens), page or ours.page, policy or ours.policy, _order(order), router
    )
    config = run.manifest.get("server_resolved", {}).get("radix_eviction_policy_config")

    def tree(of: Settings) -> Tree:
        if make is not None:
            return make(of)
        same = config if of.policy == ours.policy else None
        return simulated_tree(of.kv_tokens, of.page, of.policy, same)

    base = as_recorded(run, requests, lambda: tree(ours))
    matched = _matched(run, requests)
    rows = [_row(ours, "as recorded", base, matched, None)]
    asked = list(asked_of(run, requests))
    sequential = other.order != "recorded" or other.router is not None
    if sequential:
        alone = one_by_one(asked, lambda: tree(ours))
        rows.append(_row(ours, "one by one", alone, matched, None))
        families = {str(r.rid): str(r.family) for r in requests.itertuples() if isinstance(r.family, str)}
        arranged = ordered(asked, other.order, families)
        replicas = 1
        if other.router is not None:
            arranged, replicas = _routed(arranged, other.router)
        changed = one_by_one(arranged, lambda: tree(other), replicas)
        rows.append(_row(other, "one by one", changed, matched, sum(alone.given.values())))
    elif other != ours:
        changed = as_recorded(run, requests, lambda: tree(other))
        rows.append(_row(other, "as recorded", changed, matched, sum(base.given.values())))
    replayed = matched.assign(replayed=[base.given.get((r.rid, r.attempt)) for r in matched.itertuples()])
    replayed = replayed[replayed["replayed"].notna()]
    notes = [
        "In the recorded schedule every match, forward and publication keeps its place in time: other reuse would have "
        "made other batches."
    ]
    if sequential:
        notes.append(
            "With another order or a router requests are served one by one, and so is what they are put against."
        )
    differ = int((replayed["recorded"] != replayed["replayed"]).sum())
    if differ:
        notes.append(
            f"Under the recorded settings {differ:,} of {len(replayed):,} matches are not what the engine gave: look "
            "at `tables/requests`. A known reason: a replay does not know how often SGLang asked the tree for "
            "requests that waited."
        )
    return WhatIfResult(
        run=str(path),
        table=pd.DataFrame(rows),
        requests=replayed,
        recorded=int(replayed["recorded"].sum()),
        replayed=int(replayed["replayed"].sum()),
        differ=differ,
        prompt=int(matched["asked"].sum()),
        notes=notes,
    )


def _recorded_settings(run: Run) -> Settings:
    resolved = run.manifest.get("server_resolved") or {}
    tokens = resolved.get("max_total_num_tokens") or resolved.get("max_total_tokens")
    if not isinstance(tokens, int):
        raise RunDirectoryError(f"{run.path}: the manifest does not say the size of the KV pool", fix="record it again")
    return Settings(tokens, page_size(run), str(resolved.get("radix_eviction_policy") or "lru"))


def _tokens(asked: str | None, ours: int) -> int:
    if asked is None:
        return ours
    try:
        n = int(float(asked[:-1]) * ours) if asked.endswith("x") else int(asked)
    except ValueError:
        n = 0
    if n < 1:
        raise ConfigError(f"--kv-tokens {asked}: that is no size", fix="a number, or a multiple such as `2x`")
    return n


def _order(order: str) -> str:
    if order not in ORDERS:
        raise ConfigError(f"--order {order}: there is no such order", fix=f"one of {', '.join(ORDERS)}")
    return order


def _routed(asked: Any, router: str) -> tuple[Any, int]:
    try:
        return routed(asked, router)
    except ValueError:
        raise ConfigError(f"--router {router}: there is no such router", fix="`prefix:N` or `round:N`") from None


def _matched(run: Run, requests: pd.DataFrame) -> pd.DataFrame:
    tree = run.tree()
    matched = tree[(tree["event"] == schema.MATCHED) & tree["rid"].isin(requests["rid"])]
    lengths = dict(zip(requests["rid"], requests["prompt_len"], strict=True))
    return pd.DataFrame(
        {
            "rid": matched["rid"].astype(str).to_numpy(),
            "attempt": matched["attempt"].astype(int).to_numpy(),
            "recorded": matched["end"].astype(int).to_numpy(),
            "asked": matched["rid"].map(lengths).astype(int).to_numpy(),
        }
    )


def _row(of: Settings, schedule: str, outcome: Outcome, matched: pd.DataFrame, base: int | None) -> dict[str, Any]:
    keys = set(zip(matched["rid"], matched["attempt"], strict=True)) & set(outcome.given)
    prompt = int(matched[[k in keys for k in zip(matched["rid"], matched["attempt"], strict=True)]]["asked"].sum())
    reused = sum(outcome.given.values())
    return {
        "settings": of.told,
        "schedule": schedule,
        "prompt": prompt,
        "reused": reused,
        "share": reused / max(prompt, 1),
        "difference": None if base is None else reused - base,
        "did_not_fit": outcome.did_not_fit,
    }

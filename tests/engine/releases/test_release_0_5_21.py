"""What the adapter of 0.5.21 does itself: its functions ask nothing of SGLang, so that any release may be installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_probe.engine.hooks import requests
from sglang_probe.engine.hooks import tree as lineage
from sglang_probe.engine.releases import release_0_5_21 as adapter


def params(req: object | None) -> SimpleNamespace:
    return SimpleNamespace(req=req, key=SimpleNamespace(limit=None))


def test_a_request_reads_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "read_limit", lambda _req: 3)
    asked = params("r")
    assert adapter.match_prefix(lambda _tree, p: p.key.limit, None, asked) == 3
    assert adapter.match_prefix(lambda _tree, p: p.key.limit, None, params(None)) is None


def test_a_publication_looks_up_its_own_entries_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name of a request that may read nothing; SGLang asserts that it finds all that was inserted."""
    monkeypatch.setattr(requests, "read_limit", lambda _req: 0)
    told: list[Any] = []
    monkeypatch.setattr(lineage, "match", lambda *_args, **_kwargs: told.append(1))

    def cache_unfinished_req(_tree: object, req: object) -> Any:
        mine = params(req)
        limit = adapter.match_prefix(lambda _tree, p: p.key.limit, None, mine)
        adapter.matched(None, None, mine)
        return limit

    assert adapter.republication(cache_unfinished_req, None, "r") is None
    assert told == []
    later = params("r")
    assert adapter.match_prefix(lambda _tree, p: p.key.limit, None, later) == 0
    adapter.matched(None, None, later)
    assert told == [1]


def test_a_chunk_that_is_not_published_counts_as_done() -> None:
    pool = SimpleNamespace(req_to_token=torch.arange(20, dtype=torch.int32).view(2, 10))
    req = SimpleNamespace(
        skip_radix_cache_insert=True,
        kv=SimpleNamespace(req_pool_idx=1),
        extend_range=SimpleNamespace(end=4),
        prefix_indices=torch.empty(0, dtype=torch.int64),
    )
    adapter.keep_chunks(None, req, SimpleNamespace(req_to_token_pool=pool))
    assert req.prefix_indices.tolist() == [10, 11, 12, 13]
    req.skip_radix_cache_insert, req.prefix_indices = False, "the tree's"
    adapter.keep_chunks(None, req, SimpleNamespace(req_to_token_pool=pool))
    assert req.prefix_indices == "the tree's"

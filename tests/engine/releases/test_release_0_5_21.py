"""What the adapter of 0.5.21 does itself: its functions ask nothing of SGLang, so that any release may be installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_probe.engine.hooks import instruments, policy, requests, supported
from sglang_probe.engine.hooks import tree as lineage
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.releases import release_0_5_21 as adapter
from sglang_probe.errors import InventoryError, UnsupportedError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.prepare import prepare
from sglang_probe.policy.arm import Arm
from sglang_probe.policy.switches import Switches


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


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this adapter for that of the installed release."""
    for module in (instruments, supported):
        monkeypatch.setattr(module, "release", adapter.Adapter)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hook_points": ["hook_embed", "blocks.0.hook_resid_post"]}, "rows of `blocks.0.hook_resid_post`"),
        ({"hook_points": ["blocks.0.attn.hook_q"]}, "attention rows, rows of `blocks.0.attn.hook_q`"),
        ({"asks": ["cache"]}, "bypass"),
        ({"asks": ["positions"]}, "bypass, positions"),
        ({"telemetry": {}}, "attention rows, telemetry"),
        ({"live": {"traces": True}}, "traces"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_what_was_not_compared_in_an_engine_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    config = EngineProbeConfig.model_validate({"run": Path("r"), **fields})
    with pytest.raises(InventoryError, match=rf"^{named}: not shown to be right in an engine of SGLang 0.5.21"):
        instruments.require(config)


@pytest.mark.usefixtures("installed")
def test_the_ledger_and_rows_of_embeddings_were_shown() -> None:
    instruments.require(EngineProbeConfig(run=Path("r"), hook_points=["hook_embed"], asks=["force"]))


@pytest.mark.usefixtures("installed")
def test_a_cache_that_is_switched_off_is_refused_before_an_engine_starts_and_while_it_runs() -> None:
    said = r"a radix cache that is switched off, as `cache: off` does \(`disable_radix_cache: True`\)"
    workload = {"source": "documents", "count": 2, "chars": 400}
    config = HarvestConfig.model_validate({"workload": workload, "hook_points": []})
    with pytest.raises(UnsupportedError, match=said):
        prepare(config, {"cold": Arm(cache="off")})
    prepare(config, {"warm": Arm(cache="on")})
    start = Switches(radix_cache=True, chunked_prefill_size=64, enable_mixed_chunk=False, schedule_policy="fcfs")
    with pytest.raises(UnsupportedError, match=said):
        policy.apply(None, Switches(radix_cache=False), start)

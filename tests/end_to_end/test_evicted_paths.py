"""Kept sets on the scheduler's other paths: retraction, pages, no overlap, temperature, bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_probe.eviction.likelihood import load_unembedding, output_logits
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.kept_requests import KeptRequest, record_kept
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.kept_set import Kept, write_kept
from sglang_probe.paths import shipped
from sglang_probe.policy.arm import Arm
from sglang_probe.stats.distance import row_distance
from sglang_probe.verify import masked_model
from sglang_probe.verify.verify import verify

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("eviction")]
MODEL = shipped("models/probe-text/checkpoint")
LAYERS, KV_HEADS, NEW = 4, 4, 48
LAST = "blocks.3.hook_resid_post"
BF16_EPS = 2.0**-7


def _prepared(dtype: str, **server: Any) -> Prepared:
    config = {
        "workload": {"source": "shared_prefix", "families": 3, "requests_per_family": 3, "exemplars": 2},
        "dtype": dtype,
        "sampling": {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True},
        "hook_points": ["hook_embed", LAST],
        "server": server,
        "concurrency": 9,
    }
    return prepare(HarvestConfig.model_validate(config), {"only": Arm()})


def _prompts(prepared: Prepared) -> list[list[int]]:
    return [list(r.prompt_ids)[: 60 + 31 * i] for i, r in enumerate(prepared.workload.requests)]


def _random(length: int, seed: int, steps: int = 1) -> Kept:
    g = torch.Generator().manual_seed(seed)
    return Kept(torch.rand(steps, LAYERS, KV_HEADS, length, generator=g) < 0.3)


@pytest.mark.parametrize(
    ("server", "retract"),
    [
        ({"chunked_prefill_size": 96, "enable_mixed_chunk": True}, True),
        ({"page_size": 32, "disable_overlap_schedule": True}, False),
    ],
)
def test_rows_are_those_of_the_masked_model(
    server: dict[str, Any], retract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled at temperature 1, beside full requests, some behind a compressed context, some selecting by step."""
    if retract:
        monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")  # a retraction every third step
    ours = _prepared("float32", **server)
    prompts = _prompts(ours)
    sets = {f"{i}": _random(len(p) - (40 if i % 3 == 0 else 0), i, 5 if i == 4 else 1) for i, p in enumerate(prompts)}
    write_kept(tmp_path / "kept", sets)
    warm = {"temperature": 1.0}
    requests = [
        *[KeptRequest(f"full-{i}", p, sampling=warm) for i, p in enumerate(prompts[::2])],
        *[KeptRequest(f"kept-{i}", p, key=f"{i}", sampling=warm) for i, p in enumerate(prompts)],
    ]
    run = record_kept(ours, tmp_path / "run", requests, kept=tmp_path / "kept")
    assert [str(c) for c in verify(run) if not c.holds] == []
    frame = run.requests()
    if retract:
        assert (frame.loc[frame["evict"].notna(), "retractions"] > 0).any()
    model = masked_model.load(str(MODEL))
    worst = {}
    for r in frame.itertuples():
        rows = run.activations(r.rid, LAST)
        ids = [*r.prompt_ids, *r.output_ids][: len(rows)]
        expected = masked_model.hidden_states(model, ids, sets.get(r.evict))[3]
        worst[r.rid] = float(row_distance(rows, expected)[0].max())
    print("largest relative error:", max(worst.values()))
    assert max(worst.values()) < 1e-4, worst


def test_a_budget_of_everything_in_bfloat16_parts_from_the_full_cache_at_ties_only(tmp_path: Path) -> None:
    """Both round to bfloat16, in other orders: where the two best logits are as near as that, either may be chosen."""
    ours = _prepared("bfloat16")
    prompts = _prompts(ours)
    whole = {f"{i}": Kept(torch.ones(1, LAYERS, KV_HEADS, len(p), dtype=torch.bool)) for i, p in enumerate(prompts)}
    write_kept(tmp_path / "kept", whole)
    with EngineHost() as host:
        full = record_kept(ours, tmp_path / "full", [KeptRequest(f"f{i}", p) for i, p in enumerate(prompts)], host=host)
        every = [KeptRequest(f"a{i}", p, key=f"{i}") for i, p in enumerate(prompts)]
        kept = record_kept(ours, tmp_path / "all", every, kept=tmp_path / "kept", host=host)
    unembedding = load_unembedding(Path(ours.model.path))
    outputs = [run.requests().set_index("rid")["output_ids"] for run in (full, kept)]
    same = 0
    for i, p in enumerate(prompts):
        a, b = list(outputs[0][f"f{i}"]), list(outputs[1][f"a{i}"])
        parts = next((step for step, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        same += parts is None
        shared = len(p) + (NEW - 1 if parts is None else parts)
        rows = [run.activations(rid, LAST)[:shared] for run, rid in ((kept, f"a{i}"), (full, f"f{i}"))]
        # Of the prompt too: what is computed together, and so how it rounds, depends on what came when.
        assert row_distance(*rows)[0].max() < 2e-2
        if parts is not None:
            logits = output_logits(full, f"f{i}", unembedding)[parts]
            assert logits.max() - logits[b[parts]] < BF16_EPS * logits.max()
    assert same >= len(prompts) // 2

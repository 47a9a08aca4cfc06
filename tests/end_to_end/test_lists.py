"""Telemetry and eviction by lists of cache entries, in real engines on the CPU: their path to an accelerator, with a
model of FlashInfer's paged decode in the place of FlashInfer's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.attention.run_telemetry import write_telemetry
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.kept_requests import KeptRequest, record_kept
from sglang_probe.harvest.prepare import prepare
from sglang_probe.kept_set import Kept, KeptFile, write_kept
from sglang_probe.paths import shipped
from sglang_probe.policy.arm import Arm
from sglang_probe.prove import kept_sets
from sglang_probe.run import schema
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.telemetry_options import REGIONS, TelemetryOptions
from sglang_probe.stats.distance import row_distance
from sglang_probe.verify.verify import verify
from tests.end_to_end.test_accelerator import MEASURED, watching

pytestmark = pytest.mark.engine
LAYERS, KV_HEADS, NEW = 4, 4, 8
LAST = "blocks.3.hook_resid_post"
LENGTHS = (120, 40, 90)
CACHES = (120, 40, 75)
"""Of the last request the question is no part of the cache."""
KEY = ["rid", "layer", "head", "step"]


@pytest.mark.reviewed("accelerator rows")
def test_masses_and_entropies_are_those_of_captured_rows(
    cli: Callable, write_yaml: Callable[..., Path], tmp_path: Path
) -> None:
    """No tensor is read by the host meanwhile: a read would end the recording."""
    config = write_yaml(
        "lists",
        dtype="float32",
        simulated_graphs=True,
        workload={"requests_per_family": 3},
        hook_points=MEASURED,
        telemetry={"layers": [0], "every": 2, "by": "lists"},
        sampling={"max_new_tokens": 12, "temperature": 1.0},
        server={"chunked_prefill_size": 128, "enable_mixed_chunk": True},
    )
    done = cli("harvest", config, "--output", tmp_path / "run", **watching(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(next(tmp_path.glob("run/**/manifest.json")).parent)
    assert [str(c) for c in verify(run) if not c.holds] == []
    assert run.manifest["telemetry"]["by"] == "lists"
    write_telemetry(run, tmp_path / "offline.parquet", TelemetryOptions(every=2))
    offline = pd.read_parquet(tmp_path / "offline.parquet").set_index(KEY)
    online, spans = run.telemetry(), run.spans()
    place = ["rid", "attempt", "position"]
    discarded = spans.loc[spans["phase"] == schema.OVERSHOOT, ["rid", "attempt", "start"]]
    thrown = pd.MultiIndex.from_frame(online[place]).isin(pd.MultiIndex.from_frame(discarded))
    online = online[~thrown].set_index(KEY).sort_index()
    offline = offline.sort_index()
    assert online.index.equals(offline.index)
    assert len(online) > 200
    names = ["entropy", "entropy_without_sinks", *(f"mass_{r}" for r in REGIONS)]
    np.testing.assert_allclose(online[names], offline[names], atol=1e-5)
    np.testing.assert_allclose(online["support"], offline["support"], rtol=1e-4)
    assert online["jump"].isna().all()
    assert set(online["top_positions"].map(len)) == {0}


def _kept(share: float, n: int, *, steps: int = 1) -> Kept:
    """Every layer and head keeps its own positions, and its own number of them."""
    keep = torch.rand(steps, LAYERS, KV_HEADS, n, generator=torch.Generator().manual_seed(n)) < share
    keep[..., -1] = True
    return Kept(keep)


def _record(folder: Path, **config: object) -> Run:
    """Requests without a kept set, with everything kept, with about half, and with another half at each step."""
    given = {
        "workload": {"source": "shared_prefix", "families": 3, "requests_per_family": 1, "exemplars": 2},
        "dtype": "float32",
        "sampling": {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True},
        "hook_points": [LAST],
        "concurrency": 6,
        **config,
    }
    prepared = prepare(HarvestConfig.model_validate(given), {"only": Arm()})
    prompts = [list(r.prompt_ids[:n]) for r, n in zip(prepared.workload.requests, LENGTHS, strict=True)]
    kept = {f"all {i}": _kept(2, n) for i, n in enumerate(CACHES)}
    kept |= {f"half {i}": _kept(0.5, n) for i, n in enumerate(CACHES)} | {"steps 2": _kept(0.5, CACHES[2], steps=5)}
    write_kept(folder / "kept", kept)
    plain = [KeptRequest(f"plain {i}", p) for i, p in enumerate(prompts)]
    evicted = [KeptRequest(key, prompts[int(key[-1])], key) for key in kept]
    with EngineHost() as host:
        return record_kept(prepared, folder / "run", [*evicted, *plain], kept=folder / "kept", host=host)


@pytest.mark.slow
@pytest.mark.reviewed("eviction")
def test_kept_sets_by_lists_give_the_tokens_of_the_reference_platform(tmp_path: Path) -> None:
    chunks = {"chunked_prefill_size": 64, "enable_mixed_chunk": True}
    folders = [tmp_path / "lists", tmp_path / "reference"]
    for folder in folders:
        folder.mkdir()
    lists = _record(folders[0], simulated_graphs=True, server={**chunks, "attention_backend": "torch_native"})
    reference = _record(folders[1], server={**chunks, "attention_backend": "probe_torch"})
    tokens, true = (r.requests().set_index("rid")["output_ids"].map(list).to_dict() for r in (lists, reference))
    assert tokens == true
    assert lists.manifest["server_resolved"]["attention_backend"] == "torch_native"
    assert [str(c) for c in verify(lists) if not c.holds] == []
    for rid in tokens:
        rows = lists.activations(rid, LAST)
        assert row_distance(rows, reference.activations(rid, LAST))[0].max() < 1e-4, rid
        n, like = CACHES[int(rid[-1])], f"plain {rid[-1]}"
        if not rid.startswith("all"):
            off = row_distance(rows[: n + 1], lists.activations(like, LAST)[: n + 1])[0]
            assert off[:n].max() < 1e-4
            assert rid == like or off[n] > 1e-2, rid  # the first query past the cache
        else:
            assert tokens[rid] == tokens[like]
    kept = KeptFile(folders[0] / "kept")
    model = str(shipped("models/probe-text/checkpoint"))
    proved = kept_sets.checks(lists, kept, model, LAST)
    assert [c.violation for c in proved] == [None, None]
    assert min(c.covered for c in proved) > sum(LENGTHS)
    shifted = {key: Kept(of.keep_SYGN.roll(1, -1)) for key, of in kept.items()}
    whole, half = kept_sets.checks(lists, shifted, model, LAST)
    assert whole.holds  # everything is everything
    assert "relative error" in str(half.violation)

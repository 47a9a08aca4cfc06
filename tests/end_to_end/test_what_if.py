"""The hardest attack replayed: retractions every few steps, aborts, chunks, mixed batches, LFU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.replay import HARDEST, EvictionsCounted, attacked, looks_of
from sglang_probe.run import schema
from sglang_probe.studies.what_if.replay import as_recorded
from tests.attack.plan import TIGHT

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("accounting")]


def test_given_every_time_that_the_tree_was_asked_a_replay_is_the_engine_to_the_token(tmp_path: Path) -> None:
    """A run lacks those times of requests that wait; with them there is nothing left that it lacks."""
    run = attacked(tmp_path, 2, 100, HARDEST, tmp_path / "looks.txt")
    requests = run.requests(interrupted=True)
    requests = requests[requests["prompt_ids"].notna() & (requests["prompt_len"] > 0)]
    assert requests["retractions"].sum() > 10
    pool = EvictionsCounted(int(str(TIGHT["max_total_tokens"])), "lfu")
    outcome = as_recorded(run, requests, pool.make, looks_of(tmp_path / "looks.txt"))
    events = run.tree()
    matched = events[(events["event"] == schema.MATCHED) & events["rid"].isin(requests["rid"])]
    engine = {(str(m.rid), int(m.attempt)): int(m.end) for m in matched.itertuples()}
    assert outcome.given == engine
    assert pool.evicted == events.loc[events["event"] == schema.EVICTED, "tokens"].sum()

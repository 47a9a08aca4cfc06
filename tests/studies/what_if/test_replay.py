"""A replay gives what a cache gave, and what another would give: SGLang's own tree where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.harvest.simulate import simulated_tree
from sglang_probe.run import schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.studies.what_if.replay import Asked, one_by_one, ordered, routed
from sglang_probe.studies.what_if.study import what_if
from tests.small_cache import SmallCache

A, B, C = (list(range(k, k + 100)) for k in (100, 300, 500))


def asked(rid: str, ids: list[int], replica: int = 0) -> Asked:
    return Asked(rid, tuple(ids), len(ids), None, len(ids) - 1, 0, True, replica)


def given(requests: list[Asked], tokens: int, page: int = 1, policy: str = "lru", replicas: int = 1) -> dict[str, int]:
    outcome = one_by_one(requests, lambda: simulated_tree(tokens, page, policy), replicas)
    assert outcome.did_not_fit == 0
    return {rid: n for (rid, _), n in outcome.given.items()}


@pytest.mark.engine
def test_a_cache_that_holds_everything_gives_all_but_the_last_token() -> None:
    assert given([asked("a", A), asked("b", A)], 1000) == {"a": 0, "b": 99}
    assert given([asked("a", A), asked("b", A)], 1024, page=16) == {"a": 0, "b": 96}


@pytest.mark.engine
def test_a_cache_of_two_prompts_loses_the_oldest_of_three() -> None:
    three = [asked("a", A), asked("b", B), asked("c", C), asked("b2", B), asked("a2", A)]
    assert given(three, 220)["b2"] == 99
    assert given(three, 220)["a2"] < 99
    assert given(three, 400)["a2"] == 99


@pytest.mark.engine
def test_routing_by_prefix_keeps_what_taking_turns_loses() -> None:
    requests = [asked(f"r{i}", [*A, i]) for i in range(4)]
    by_prefix, n = routed(requests, "prefix:2")
    in_turn, _ = routed(requests, "round:2")
    assert sum(given(by_prefix, 1000, replicas=n).values()) == 300
    assert sum(given(in_turn, 1000, replicas=n).values()) == 200


@pytest.mark.engine
def test_the_recorded_settings_give_what_was_recorded(tmp_path: Path) -> None:
    """One request at a time and no eviction: the made-up tree and SGLang's must agree in every match."""
    rng = np.random.default_rng(1)
    cache = SmallCache(tmp_path / "run", page=4)
    pieces = [list(range(1000 * k, 1000 * k + int(rng.integers(3, 40)))) for k in range(1, 6)]
    for i in range(60):
        ids = [t for k in rng.permutation(5)[: int(rng.integers(1, 5))] for t in pieces[k]]
        cache.serve(f"r{i}", ids, space=str(rng.choice(["x", "y"])))
    cache.close()
    result = what_if(
        tmp_path / "run", make=lambda of: simulated_tree(100_000, of.page, of.policy), kv_tokens="2x", router="round:2"
    )
    assert result.differ == 0
    assert result.recorded == result.replayed > 0
    assert result.table["reused"].tolist()[0] == result.table["reused"].tolist()[1] == result.recorded
    assert result.table["difference"].tolist()[2] < 0  # half of the requests meet an empty replica


@pytest.mark.engine
@pytest.mark.parametrize(("recorded", "other"), [(8, 1), (1, 8), (8, 4)])
def test_another_page_size_gives_what_a_cache_of_that_page_size_gave(recorded: int, other: int, tmp_path: Path) -> None:
    given = {}
    for page in (recorded, other):
        cache = SmallCache(tmp_path / str(page), page=page)
        given[page] = sum(cache.serve(f"r{i}", [*range(53), *range(100 * i, 100 * i + 20)]) for i in range(4))
        cache.close()
    result = what_if(tmp_path / str(recorded), make=lambda of: simulated_tree(10_000, of.page, of.policy), page=other)
    assert result.table["reused"].tolist() == [given[recorded], given[other]]


@pytest.mark.engine
def test_a_run_whose_engine_died_with_a_request_in_flight_is_replayed(tmp_path: Path) -> None:
    """Nobody knows how often that request was retracted."""
    cache = SmallCache(tmp_path / "run")
    for i in range(3):
        cache.serve(f"r{i}", [*range(53), i])
    cache.close()
    path = tmp_path / "run" / REQUESTS_FILE
    table = pq.read_table(path)
    for name, value in (("retractions", None), ("finish_reason", schema.INTERRUPTED)):
        column = [*table[name].to_pylist()[:-1], value]
        kind = table.schema.field(name).type
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(column, kind))
    pq.write_table(table, path)
    result = what_if(tmp_path / "run", make=lambda of: simulated_tree(10_000, of.page, of.policy))
    assert result.differ == 0


def test_orders_keep_every_request() -> None:
    requests = [asked("b0", B), asked("a0", A), asked("b1", B)]
    families = {"b0": "b", "b1": "b", "a0": "a"}
    assert [a.rid for a in ordered(requests, "family", families)] == ["b0", "b1", "a0"]
    assert [a.rid for a in ordered(requests, "sorted", families)] == ["a0", "b0", "b1"]
    assert sorted(a.rid for a in ordered(requests, "shuffled", families)) == ["a0", "b0", "b1"]


@pytest.mark.parametrize("setting", [{"kv_tokens": "lots"}, {"order": "best"}, {"router": "hash:2"}])
def test_a_setting_that_is_none_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A)
    cache.close()
    with pytest.raises((ConfigError, RunDirectoryError), match=next(iter(setting.values()))):
        what_if(tmp_path / "run", **setting, make=lambda of: simulated_tree(1000, of.page, of.policy))

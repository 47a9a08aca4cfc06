"""The order of an experiment's runs, and the starts of SGLang that it costs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from sglang_probe.studies.ab.config import AbConfig
from sglang_probe.studies.ab.plan import plan

WORKLOAD = {"source": "shared_prefix", "families": 1, "requests_per_family": 1}


def experiment(**fields: Any) -> AbConfig:
    return AbConfig.model_validate({"workload": WORKLOAD, **fields})


def test_arms_that_share_an_engine_cost_one_start() -> None:
    runs = plan(experiment())
    assert sorted(p.name for p in runs) == ["cache_off", "cache_off.repeat", "cache_on", "cache_on.repeat"]
    assert runs[0].name == "cache_on"
    assert [p.starts_engine for p in runs] == [True, False, False, False]
    assert [p.order_seed for p in runs] == [None, None, 1, 1]


def test_an_engine_is_started_where_the_arguments_ask_for_it_and_kept_as_long_as_possible() -> None:
    arms = {"a": {}, "b": {"server": {"page_size": 16}}, "c": {"cache": "off"}}
    for seed in range(20):
        runs = plan(experiment(arms=arms, order_seed=seed, replicates=3))
        assert runs[0].name == "a"
        assert [p.replicate for p in runs] == sorted(p.replicate for p in runs)
        for k in range(3):
            assert sorted(p.arm for p in runs if p.replicate == k) == ["a", "b", "c"]
        engine = ["b" if p.arm == "b" else "ac" for p in runs]
        changes = [True, *(x != y for x, y in pairwise(engine))]
        assert [p.starts_engine for p in runs] == changes
        assert sum(changes) == 4  # ac b | b ac | ac b


def test_the_order_of_the_arms_is_drawn_anew_for_each_replicate() -> None:
    arms = {name: {"server": {"chunked_prefill_size": 64 * i}} for i, name in enumerate("abcdef", 1)}
    runs = plan(experiment(arms=arms, replicates=3))
    orders = [tuple(p.arm for p in runs if p.replicate == k) for k in range(3)]
    assert len(set(orders)) == 3
    assert plan(experiment(arms=arms, replicates=3)) == runs
    assert plan(experiment(arms=arms, replicates=3, order_seed=1)) != runs

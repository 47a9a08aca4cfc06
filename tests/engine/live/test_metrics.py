"""Series on `/metrics`: evictions are counted, and the dashboard asks for series that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from sglang_probe.engine.live.metrics import Metrics
from sglang_probe.engine.live.stops import Stops
from sglang_probe.engine.live.totals import Totals
from tests.engine.live.conftest import FakeEngine

DOCS = Path(__file__).parents[3] / "docs" / "reference"


def test_what_the_cache_gave_up_is_counted(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.recorder.evicted(30)
    engine.serve("a", [1, 2, 3])
    engine.recorder.evicted(12)
    engine.serve("b", [4, 5, 6])
    assert engine.live.totals.evicted == 42


def test_the_dashboard_asks_for_series_that_there_are() -> None:
    import prometheus_client

    metrics = Metrics("m")
    metrics.publish(Totals(recent=1), waiting=0, write_errors=0, stops=Stops(), causes={"evicted": 1})
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"sglang_probe:\w+", target["expr"])
    }
    served = {sample.name for family in prometheus_client.REGISTRY.collect() for sample in family.samples}
    assert len(asked) == 10
    assert "sglang_probe:prompt_tokens_by_cause_total" in asked
    assert asked <= served, metrics
    described = (DOCS / "metrics-and-endpoints.md").read_text()
    assert all(f"`{name}" in described for name in asked)

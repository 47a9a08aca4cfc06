"""SGLang's own spans, exported by its own exporter to a real collector: their attributes are the ledger's, exactly.

Chunks, overlap scheduling, shared prefixes, retractions and requests that are aborted, in one server.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from tests.end_to_end.live_server import LiveServer

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("traces")]
pytest.importorskip("opentelemetry.exporter.otlp", reason="the extra `otel` is not installed")

from tests.end_to_end.collector import Collector  # noqa: E402 - skips without the extra

TRACED = ("--enable-trace", "--chunked-prefill-size", "64", "--max-total-tokens", "2048")
EAGER = {
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_OTLP_EXPORTER_SCHEDULE_DELAY_MILLIS": "100",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "2",
}
"""SGLang's exporter waits so many seconds for a collector, at its end too."""


def _serve(folder: Path, endpoint: str) -> LiveServer:
    arguments = (*TRACED, "--otlp-traces-endpoint", endpoint)
    return LiveServer(folder, *arguments, environment=EAGER, traces=True, segments={"min_seconds": 0.0})


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[dict[str, Any]], pd.DataFrame, str]]:
    collector = Collector()
    server = _serve(tmp_path_factory.mktemp("traces"), collector.endpoint)
    try:
        server.wait_until_ready()
        server.flush()
        _send(server)
        segment = server.flush()
        run = load_run(segment)
        assert [str(c) for c in verify(run) if not c.holds] == []
        ran = run.spans()["status"] != "unrequested"  # one that never ran has no attributes
        ended = set(run.spans()["rid"][ran])
        spans = collector.wait(lambda got: ended <= {s.get("sglang_probe.request") for s in got})
        yield spans, run.spans(), segment.name
    finally:
        server.kill()
        collector.stop()


def _send(server: LiveServer) -> None:
    rng = random.Random(3)
    family = [[rng.randrange(10, 3000) for _ in range(150)] for _ in range(3)]

    def one(i: int) -> None:
        prompt = [*family[i % 3][: rng.randrange(20, 150)], *(rng.randrange(10, 3000) for _ in range(i % 40))]
        server.generate(prompt, n=1 + i % 24, rid=f"r{i}")

    def aborted(i: int) -> None:
        with server.running([*family[i % 3], i], 400, rid=f"a{i}"):
            server.http.post("/abort_request", json={"rid": f"a{i}"})

    def cut(i: int) -> None:  # while it waits, in the middle of its prompt, or later: whichever it comes to
        threading.Timer(0.05, lambda: server.http.post("/abort_request", json={"rid": f"c{i}"})).start()
        server.http.post("/generate", json={"input_ids": [*range(10, 900), i], "rid": f"c{i}"})

    with ThreadPoolExecutor(12) as pool:
        work = [pool.submit(one, i) for i in range(60)]
        work += [pool.submit(aborted, i) for i in range(4)] + [pool.submit(cut, i) for i in range(3)]
        for w in work:
            w.result()
    while server.status()["requests_in_flight"]:
        time.sleep(0.05)


def _of_the_ledger(spans: pd.DataFrame) -> dict[str, Any]:
    """The attributes of one request, from its spans on disk."""
    spans = spans[spans["status"].isin(["computed", "reused"]) & (spans["phase"] != "overshoot")]
    length = spans["end"] - spans["start"]
    tokens = {
        "reused": spans["status"] == "reused",
        "computed": spans["phase"] == "prefill",
        "recomputed": spans["phase"] == "recompute",
        "decoded": spans["phase"] == "decode",
    }
    reused = spans[tokens["reused"]].sort_values(["attempt", "start"], kind="stable")
    origins = reused["origin_rid"].dropna().tolist()
    last = spans["forward_id"] + (length - 1).where(tokens["decoded"], 0)
    told = {
        "attempt": int(spans["attempt"].max()),
        **{f"tokens.{name}": int(length[which].sum()) for name, which in tokens.items()},
        "tokens.reused_from_before": int(length[tokens["reused"] & spans["origin_rid"].isna()].sum()),
        "origins.count": len(set(origins)),
        "forwards.first": int(spans["forward_id"].min()),
        "forwards.last": int(last.max()),
        **({"origins.first": origins[0]} if origins else {}),
    }
    return {f"sglang_probe.{name}": value for name, value in told.items()}


def test_the_attributes_of_every_request_are_those_of_its_spans_in_the_ledger(traffic: Any) -> None:
    spans, ledger, segment = traffic
    given = {s["sglang_probe.request"]: s for s in spans if "sglang_probe.request" in s}
    wanted = {str(rid): _of_the_ledger(of) for rid, of in ledger.groupby("rid") if rid in given}
    assert len(wanted) >= 60
    for rid, of in wanted.items():
        told = {k: v for k, v in given[rid].items() if k.startswith("sglang_probe.")}
        assert told == {"sglang_probe.request": rid, "sglang_probe.segment": segment, **of}, rid


def test_what_the_traffic_was_to_provoke_has_happened(traffic: Any) -> None:
    """Or else the test above compares less than it says."""
    spans, ledger, _ = traffic
    told = pd.DataFrame([s for s in spans if "sglang_probe.request" in s])
    assert (told["sglang_probe.attempt"] > 0).sum() > 2
    assert (told["sglang_probe.origins.count"] > 1).any()
    assert (told["sglang_probe.tokens.recomputed"] > 0).any()
    assert (ledger["phase"] == "overshoot").any()
    assert ledger.groupby(["rid", "attempt"])["chunk"].max().max() >= 1


def test_they_are_on_the_scheduler_span_under_the_request_of_the_same_id(traffic: Any) -> None:
    spans, _, _ = traffic
    by_id = {s["id"]: s for s in spans}
    for s in spans:
        if "sglang_probe.request" in s:
            assert s["span"].startswith("Scheduler")
            root = by_id.get(s["parent"])
            assert root is None or root["rid"] == s["sglang_probe.request"].rpartition("_")[2]  # SGLang cuts it


def test_without_a_collector_requests_are_served_and_recorded(tmp_path: Path) -> None:
    server = _serve(tmp_path, "127.0.0.1:9")  # nobody listens there
    try:
        server.wait_until_ready()
        for i in range(3):
            assert server.generate([*range(20, 60), i], n=4)["meta_info"]["completion_tokens"] == 4
        assert server.status()["recording"] is True
        run = load_run(server.flush())
        assert [str(c) for c in verify(run) if not c.holds] == []
        assert server.terminate() == 0
    finally:
        server.kill()

"""Two real servers, one after the other: the first collects; a profile and a gate are made of that; the second judges
its traffic by them, and clamps requests that are in scope, by a feature and by a direction.

Usual requests go on with prose: beginnings of docstrings. The drift that is planted is what happens when users begin
to paste something else: hexadecimal numbers. The monitor reads four features; of usual decode rows 33 is active in
most, the others in few. By simulation with 40 draws of reference and stream (what is served here, by `transformers`):
among 60 usual requests the highest detector is at 0.07 of what alarms; after them the hexadecimal ones alarm within 16,
and 60 of them reach 1e4 times what alarms or more. All outputs are greedy, so that no draw of a server decides it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from sglang_probe.harvest.host import EngineHost
from sglang_probe.paths import shipped
from sglang_probe.run.run import Run, load_run
from sglang_probe.steering.features import FeatureManifest, read_features
from sglang_probe.steering.library import Library
from sglang_probe.studies.replay import runs as replaying
from sglang_probe.studies.replay.command import Replay
from sglang_probe.studies.replay.study import study_replay
from sglang_probe.verify.verify import verify
from sglang_probe.workload.corpus import Corpus, load_corpus
from tests.declared import run_commands
from tests.end_to_end.live_server import MODEL, LiveServer
from tests.end_to_end.steering import make_library
from tests.steering.clamped import make_clamp, make_direction, write_gate

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("rows", "steering")]

POINT, NEW, LENGTH = "blocks.2.hook_resid_post", 12, 20
RANDOM, IN_SCOPE = (100, 3000), 3001
"""Token ids of random prompts, and the last ones of those that are in scope of the clamp."""
SAE, FEATURES, RATE = str(shipped("models/sae-probe-text/seed-0")), [33, 768, 367, 837], 0.001
REFERENCE, JUDGED = 160, 60
"""Usual requests that a profile is made of, and requests of the streams that are judged."""


def _prompts(n: int, seed: int, *, in_scope: bool = False) -> list[list[int]]:
    rng = random.Random(seed)
    drawn = [[rng.randrange(*RANDOM) for _ in range(LENGTH)] for _ in range(n)]
    return [[*p[:-6], *[IN_SCOPE] * 6] for p in drawn] if in_scope else drawn


def _prose(n: int) -> list[list[int]]:
    """Beginnings of docstrings of the standard library, no two alike."""
    corpus = load_corpus()
    return _texts((f.doc for f in Corpus("some", corpus.documents[::3]).functions), n)


def _hexadecimal(n: int) -> list[list[int]]:
    rng = random.Random(8)
    return _texts((" ".join(f"{rng.randrange(16**6):x}" for _ in range(LENGTH)) for _ in range(2 * n)), n)


def _texts(texts: Iterable[str], n: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    cut = (tuple(tokenizer.encode(t, add_special_tokens=False).ids[:LENGTH]) for t in texts)
    found = [list(ids) for ids in dict.fromkeys(ids for ids in cut if len(ids) == LENGTH)][:n]
    assert len(found) == n
    return found


def _serve(server: LiveServer, prompts: list[list[int]], **params: object) -> list[str]:
    """Request ids, in the order of the prompts."""
    told = {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True, **params}
    answer = server.http.post("/generate", json={"input_ids": prompts, "sampling_params": told}, timeout=300)
    assert answer.status_code == 200, answer.text
    return [x["meta_info"]["id"] for x in answer.json()]


def _alone(server: LiveServer, prompts: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Each by itself, so that nothing but the server tells two of them apart."""
    asked = {"return_logprob": True, "logprob_start_len": 0}
    return {rid: server.generate(prompt, NEW, rid=rid, **asked) for rid, prompt in prompts.items()}


def _server(folder: Path, **probe: Any) -> LiveServer:
    told = {"asks": ["steer"], "hook_points": ["hook_embed", POINT], **probe}
    server = LiveServer(folder, "--dtype", "float32", probe=told, privacy="ids")
    server.wait_until_ready()
    server.flush()  # without SGLang's own warm-up
    return server


def _checked(path: Path) -> Run:
    run = load_run(path)
    assert [c.violation for c in verify(run) if not c.holds] == []
    return run


@dataclass
class Served:
    """What the first server gave, and the second."""

    plain: Run
    answers: dict[str, dict[str, Any]]
    prompts: dict[str, list[int]]
    usual: list[list[int]]
    """Prompts as those of the profile."""
    server: LiveServer
    folder: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("monitored")
    make_library(folder / "library")
    kinds = {"in": True, "out": False}
    prompts = {f"{k} {i}": p for k, inside in kinds.items() for i, p in enumerate(_prompts(3, 5, in_scope=inside))}
    prose = _prose(REFERENCE + JUDGED)
    reads = {"hook_point": POINT, "sae": SAE, "features": FEATURES, "sampling": {"every": 4}, "rows": 3}
    library = {"library": str(folder / "library")}
    (folder / "collects").mkdir()
    first = _server(folder / "collects", monitor=reads, steer=library)
    try:
        assert first.http.get("/probe/alerts").json()["judging"] is False
        _serve(first, prose[:REFERENCE])
        collected = first.flush()
        answers = _alone(first, prompts)
        plain = first.flush()
        _serve(first, _prompts(40, 6, in_scope=True))
        scope = first.flush()
        _serve(first, _prompts(40, 1))
        others = first.flush()
    finally:
        first.kill()
    assert len(_checked(collected).monitored()) == REFERENCE * 3
    profile = folder / "profile"
    assert list(run_commands([["profile", str(collected), "--monitored", "--output", str(profile)]]).values()) == [0]
    inside = _last_rows(load_run(scope))
    outside = torch.cat([_last_rows(load_run(p)) for p in (collected, others)])
    write_gate(folder / "library", inside, outside, POINT)
    listed = [make_direction(Library.open(folder / "library")["late"])]
    feature = {**make_clamp(folder, directions=listed), "probe": "scope"}
    clamps = [feature, {"manifest": feature["manifest"], "direction": "late", "probe": "scope"}]
    (folder / "judges").mkdir()
    monitor = {"profile": str(profile), "sae": SAE, "share": 0.2, "rate": RATE}
    second = _server(folder / "judges", monitor=monitor, steer={**library, "clamps": clamps})
    try:
        yield Served(_checked(plain), answers, prompts, prose[REFERENCE:], second, folder)
    finally:
        second.kill()


def _last_rows(run: Run) -> torch.Tensor:
    """`[n, d]`: of the last prompt position of each request."""
    tokens = run.tokens()
    last = tokens[(tokens["position"] == LENGTH - 1) & (tokens["status"] == "computed")]
    return run.rows(POINT, last["row"].to_numpy()).float()


def test_a_clamp_touches_nobody_out_of_scope_in_any_bit(served: Served) -> None:
    before_it = served.server.status()["clamps"]["opened"]
    answers = _alone(served.server, served.prompts)
    again = served.server.generate(served.prompts["out 0"], NEW)
    run = _checked(served.server.flush())
    assert again["meta_info"]["cached_tokens"] == LENGTH - 1  # it shares the prefix cache as ever
    gates = run.gates().set_index("rid")["opened"]
    for rid, before in served.answers.items():
        after = answers[rid]
        x, y = (r.activations(rid, POINT, intervened=True) for r in (served.plain, run))
        assert torch.equal(x[:LENGTH], y[:LENGTH])  # the prompt is plain in any case
        if rid.startswith("out"):
            assert not gates[rid]
            assert after["output_ids"] == before["output_ids"]
            assert after["meta_info"]["output_token_logprobs"] == before["meta_info"]["output_token_logprobs"]
            assert torch.equal(x, y)
        else:
            assert gates[rid]
            assert not torch.equal(x[LENGTH], y[LENGTH])
    marked = run.tokens().dropna(subset=["intervention"])
    assert set(marked["rid"]) == {"in 0", "in 1", "in 2"}
    assert marked["position"].min() == LENGTH
    told = served.server.status()["clamps"]
    labels = [x["label"] for x in told["of"]]
    assert (told["opened"] - before_it, told["off"], labels) == (3, None, ["planted", "planted too"])
    assert {x["status"] for x in run.manifest["steer"]["clamps"]} == {"validated"}
    # The direction's layer is that of the rows: none of what was generated in scope is past its cap.
    late = Library.open(served.folder / "library")["late"].vector
    for rid in ("in 0", "in 1", "in 2"):
        x = run.activations(rid, POINT, intervened=True)[LENGTH:]
        assert float((x @ (late / late.norm())).max()) <= -0.5 + 1e-4


def test_what_the_server_clamped_passes_the_audit_and_under_another_value_it_does_not(
    served: Served, tmp_path: Path
) -> None:
    _alone(served.server, served.prompts)
    stored = _checked(served.server.flush())
    manifest = read_features(served.folder / "features.json")
    feature, direction = (manifest.model_dump(mode="json") for _ in range(2))
    for entry, value in ((feature["features"][0], 0.01), (direction["directions"][0], -0.505)):
        assert entry["clamp"]["value"] != value
        entry["clamp"]["value"] = entry["evidence"][0]["of"]["value"] = value
    library, sae = served.folder / "library", served.folder / "sae"
    results = []
    with EngineHost() as host:
        for i, stated in enumerate((manifest, *map(FeatureManifest.model_validate, (feature, direction)))):
            place = tmp_path / str(i)
            replay = replaying.prepare(stated, stored, library, place, sae=sae)
            results.append(study_replay(replay, replaying.run(replay, place, host=host)))
            Replay().write(results[-1], place)
    assert "The run is what the manifest states" in (tmp_path / "0" / "report.html").read_text()
    honest, *others = results
    assert honest.ok, honest.checks["replay"]
    assert (honest.requests, honest.under) == (6, 3)
    gates = next(c for c in honest.checks["replay"] if c.name == "gates")
    assert gates.covered == 6  # closed ones too
    assert set(honest.activations["entry"]) == {"direction `late`"}  # the feature's layer is not recorded
    for other in others:
        wrong = {c.name for c in other.checks["replay"] if not c.holds}
        assert wrong == {"as the manifest states", "rows"}


def test_neither_a_usual_stream_nor_one_client_alarms_and_every_endpoint_says_so(served: Served) -> None:
    server = served.server
    before, opened = server.http.get("/probe/alerts").json()["requests"], server.status()["clamps"]["opened"]
    _serve(server, served.usual)
    usual = server.flush()
    told = server.http.get("/probe/alerts").json()
    judged = before + JUDGED
    assert server.status()["clamps"]["opened"] == opened  # who is clamped is not judged
    assert (told["requests"], told["drift"], told["off"], told["cannot_alarm"]) == (judged, {}, None, None)
    assert told["alarms"] <= 0.2 * judged
    # What one client asks of the probe, and what it cannot have: nobody is judged by it.
    steer = [{"vector": "up", "strength": 400}]
    _serve(server, _prompts(40, 3), custom_params={"probe": {"steer": steer}})
    for bad in ({"custom_params": {"probe": {"monitor": 1}}}, {"max_new_tokens": -3}, {"temperature": -1}):
        body = {"input_ids": [5, 6], "sampling_params": bad}
        assert server.http.post("/generate", json=body).status_code == 400
    _checked(server.flush())
    told = server.http.get("/probe/alerts").json()
    assert (told["requests"], told["drift"], told["off"]) == (judged, {}, None)
    line = _checked(usual).manifest["monitor"]["drift_log"]
    assert (line["drift"], line["events"], line["requests"]) == (False, [], JUDGED)
    metrics = server.anybody.get("/metrics").text
    assert "sglang_probe:monitored_requests_total{model_name=" in metrics
    assert _series(server, "sglang_probe:monitor_drift") == [0]
    assert (server.run / "drift.jsonl").read_text().count("segment") >= 2


def test_a_drift_of_what_users_send_alarms_and_every_place_has_the_evidence(served: Served) -> None:
    server = served.server
    before = server.http.get("/probe/alerts").json()
    assert before["drift"] == {}
    rids = _serve(server, _hexadecimal(JUDGED))
    segment = server.flush()
    told = server.http.get("/probe/alerts?n=100").json()
    assert (told["requests"], told["off"]) == (before["requests"] + JUDGED, None)
    assert {f"feature {i} mean" for i in FEATURES[1:]} <= set(told["drift"])
    assert min(told["drift"].values()) >= before["requests"]
    # Single requests that are farther out than the whole reference, too.
    unusual = [x for x in told["alerts"] if x["rid"] in rids]
    assert len(unusual) == told["alarms"] - before["alarms"] > JUDGED / 2
    assert all(x["alert"] == "request" and x["p"] <= 0.2 for x in unusual)
    # The event that asks for another training, by statistic: here, in the drift log and under the seal of the segment.
    events = [e for e in told["events"] if e["event"] == "retrain"]
    assert {e["statistic"]: e["place"] for e in events} == told["drift"]
    for event in events:
        evidence = event["evidence"]
        assert evidence["detector"] >= 1
        assert (evidence["rate"], evidence["requests"]) == (RATE, event["place"] + 1)
        assert evidence["profile_sha256"] == load_run(segment).manifest["monitor"]["profile_sha256"]
        assert evidence["last"][-1]["rid"] in rids
        assert evidence["last"][-1]["p"] < 0.2
    line = _checked(segment).manifest["monitor"]["drift_log"]
    assert (line["drift"], line["requests"], line["alarms"]) == (True, JUDGED, len(unusual))
    assert line["events"] == events
    assert line["detector"] == max(told["highest"].values()) > 1000
    logged = [json.loads(x) for x in (server.run / "drift.jsonl").read_text().splitlines()]
    assert [x for x in logged if x.get("event") == "retrain"] == events
    assert [x["segment"] for x in logged if x.get("drift")] == [line["segment"]]
    # The series are brought up to date by the clock.
    deadline = time.time() + 60
    while _series(server, "sglang_probe:monitor_drift") != [len(told["drift"])] and time.time() < deadline:
        time.sleep(0.2)
    assert _series(server, "sglang_probe:monitor_drift") == [len(told["drift"])]
    assert max(_series(server, "sglang_probe:monitor_detector")) > 1000
    assert _series(server, "sglang_probe:monitor_alarms_total") == [told["alarms"]]


def _series(server: LiveServer, name: str) -> list[float]:
    lines = server.anybody.get("/metrics").text.splitlines()
    return [float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(name + "{")]

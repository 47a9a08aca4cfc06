"""The gate and the witnesses on one real server: as it always is, and while it reuses wrongly on purpose."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.hooks.inventory import installed_version
from sglang_probe.gate import audit
from sglang_probe.gate.client import Client
from sglang_probe.run import seal
from sglang_probe.run.run import load_run
from sglang_probe.verify.listen import AFTER, BEFORE, EVENTS, listen
from sglang_probe.verify.witness import ask, read_witnesses
from tests.declared import run_commands
from tests.end_to_end.live_server import KEY, LiveServer, _free_port

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(installed_version() != "0.5.23", reason="what is planted patches the cache of that release"),
]
PLUGIN = Path(__file__).parent.parent / "gate" / "plugin"
FIRST = "blocks.0.hook_resid_post"
"""Of the recorded hook points the first in which another position's entry can show."""
SHORT = ["--cases", "7", "--new-tokens", "8", "--path", "branch"]


@pytest.fixture(scope="module")
def wrong_slots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server looks whether it should reuse wrongly."""
    return tmp_path_factory.mktemp("planted") / "slots"


@pytest.fixture(scope="module")
def events_port() -> int:
    return _free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, wrong_slots: Path, events_port: int) -> Iterator[LiveServer]:
    publisher = {"publisher": "zmq", "endpoint": f"tcp://*:{events_port}", "topic": "kv"}
    search = os.pathsep.join([str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = LiveServer(
        tmp_path_factory.mktemp("gate"),
        *["--dtype", "float32", "--kv-events-config", json.dumps(publisher)],
        environment={"PLANTED_WRONG_SLOTS": str(wrong_slots), "PYTHONPATH": search},
        probe={"hook_points": ["hook_embed", FIRST, "blocks.3.hook_resid_post"], "asks": ["rows"]},
        privacy="ids",
        segments={"min_seconds": 0.2},
        causes=True,
    )
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.kill()


def gate(server: LiveServer, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, dict]:
    """Exit code and summary, of a process that can import neither SGLang nor torch."""
    monkeypatch.setenv("SGLANG_PROBE_GATE_KEY", KEY)
    words = ["gate", server.url, *SHORT, "--output", str(folder), *more]
    code = run_commands([words], extras=())[" ".join(words)]
    return code, json.loads((folder / "summary.json").read_text())


def test_a_server_as_it_is_reuses_no_worse_than_its_floor(
    server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, told = gate(server, tmp_path, monkeypatch)
    assert told["verdict"] in ("EQUAL", "WITHIN FLOOR"), told["sentence"]
    assert code == told["exit_code"] in (0, 10)
    assert told["cold"]["by"] in ("cache_salt", "extra_key")
    assert told["wrong"] == []
    assert told["failures"] == []
    assert told["wrong_tokens_seen"]["16"] == 1.0
    assert "Is reuse right on this server?" in (tmp_path / "report.html").read_text()


def test_wrong_slots_are_wrong_reuse_and_the_request_that_they_came_from_is_named(
    server: LiveServer, wrong_slots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_slots.write_text("8 1.0")
    try:
        code, told = gate(server, tmp_path, monkeypatch)
    finally:
        wrong_slots.unlink()
    assert (code, told["verdict"]) == (12, "WRONG REUSE"), told["sentence"]
    assert len(told["wrong"]) >= 12  # of 14 warm answers
    origins = {o.split(" [")[0] for w in told["wrong"] for o in w["origin"]}
    server.flush()
    segments = [path.parent for path in server.run.glob("*/manifest.json")]
    closed = [run for run in map(load_run, segments) if seal.closed(run.manifest)]
    known = {rid for run in closed for rid in run.requests()["rid"]}
    assert origins
    assert origins <= known


@pytest.mark.slow
def test_an_audit_finds_nothing_in_a_server_as_it_is_and_the_origin_of_what_is_planted(
    server: LiveServer, wrong_slots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PROBE_GATE_KEY", KEY)
    server.admin.post("/probe/flush")
    prefix = [*range(300, 420)]
    for n in range(audit.WARM_UP + 4):
        server.generate([*prefix, *range(50 + 20 * n, 70 + 20 * n)], n=1, rid=f"asked-{n}")
    runs = tmp_path / "runs"  # of these requests alone
    runs.mkdir()
    (runs / "segment").symlink_to(server.flush())
    found = {}
    for what in ("as it is", "planted"):
        file = tmp_path / f"{what}.jsonl"
        words = ["audit", server.url, str(runs), "--output", str(file), "--share", "1", "--once"]
        if what == "planted":
            wrong_slots.write_text("8 1.0")
        try:
            code = run_commands([words])[" ".join(words)]
        finally:
            wrong_slots.unlink(missing_ok=True)
        found[what] = code, [json.loads(line) for line in file.read_text().splitlines()]
    code, lines = found["as it is"]
    assert (code, {line["found"] for line in lines}) == (0, {"right", "too early"}), lines
    code, lines = found["planted"]
    wrong = [line for line in lines if line["found"] == "wrong"]
    assert (code, len(wrong)) == (12, len(lines) - audit.WARM_UP + 1), lines
    assert {o for line in wrong for o in line["origins"]} == {f"asked-0 [0, {len(prefix)})"}
    assert {line["rows"]["hook_point"] for line in wrong} == {FIRST}


def test_rows_tell_that_a_request_was_answered_over_one_wrong_slot_though_what_is_cached_is_right(
    server: LiveServer, wrong_slots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PROBE_GATE_KEY", KEY)
    server.admin.post("/probe/flush")
    prefix = [*range(1300, 1420)]
    flipped = {f"by-rows-{audit.WARM_UP + 1}", f"by-rows-{audit.WARM_UP + 3}"}
    for n in range(audit.WARM_UP + 5):
        if (rid := f"by-rows-{n}") in flipped:
            wrong_slots.write_text("1 1.0")
        try:
            server.generate([*prefix, *range(50 + 20 * n, 70 + 20 * n)], n=1, rid=rid)
        finally:
            wrong_slots.unlink(missing_ok=True)
    client = Client(server.url)
    facts = client.facts()
    auditor = audit.Auditor(
        client,
        facts,
        "cache_salt",
        room=lambda: True,
        tokens_per_minute=1e12,
        fetch=client.rows if facts.rows else None,
    )
    told = [auditor.audit(c) for c in audit.candidates(load_run(server.flush()))]
    wrong = {a.rid: a for a in told if a.found in audit.ALARMS}
    assert set(wrong) == flipped, told
    assert {a.found for a in told if a.rid not in flipped} == {"right", "too early"}
    for one in wrong.values():
        assert one.found == "was wrong"
        assert one.moved <= one.threshold  # log-probabilities of what is cached say nothing of it
        assert one.rows is not None
        assert one.rows.hook_point == FIRST
        assert set(one.rows.positions) <= set(range(len(prefix), len(prefix) + 20))
        assert len(one.rows.positions) >= 10  # the distance of a hook point is the median of 20
        assert one.origins == (f"by-rows-0 [0, {len(prefix)})",)


def test_kv_events_and_metrics_testify_to_the_ledger_and_false_testimony_is_named(
    server: LiveServer, events_port: int, tmp_path: Path
) -> None:
    server.admin.post("/probe/flush")  # what was recorded before is in other segments
    over, ready = threading.Event(), threading.Event()
    # /metrics asks for no key where the server has no admin key for it.
    thread = threading.Thread(
        target=listen,
        args=(f"tcp://127.0.0.1:{events_port}", tmp_path),
        kwargs={"until": over.is_set, "ready": ready.set},
    )
    thread.start()
    assert ready.wait(60)
    (tmp_path / BEFORE).write_text(server.anybody.get("/metrics").text)
    answers = []
    for n in range(6):
        prompt = [*range(40 + n % 2, 140), *range(200 + n, 230)]
        answers.append(server.generate(prompt, n=4))
    (tmp_path / AFTER).write_text(server.anybody.get("/metrics").text)
    over.set()
    thread.join(60)
    run = load_run(server.flush())
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(a) + "\n" for a in answers))
    scrapes = [f"before={tmp_path / BEFORE}", f"after={tmp_path / AFTER}"]
    true = ask(run, read_witnesses([str(tmp_path / EVENTS), str(file), *scrapes]))
    assert [c.violation for c in true] == [None, None, None]
    assert min(c.covered for c in true) >= 4

    lines = (tmp_path / EVENTS).read_text().splitlines()
    (tmp_path / EVENTS).write_text("\n".join(lines[len(lines) // 2 :]))
    file.write_text(file.read_text().replace('"cached_tokens": ', '"cached_tokens": 1'))
    (tmp_path / AFTER).write_text((tmp_path / BEFORE).read_text())
    false = ask(run, read_witnesses([str(tmp_path / EVENTS), str(file), *scrapes]))
    assert all(not c.holds for c in false), [c.violation for c in false]


def test_a_server_tells_why_prompts_were_computed_while_it_serves_and_counts_it_by_cause(server: LiveServer) -> None:
    server.admin.post("/probe/flush?cache=true&timeout=30")
    before = _by_cause(server)
    prompt = [*range(700, 760)]
    for n, own in enumerate(([], [7], [7])):  # alone, after another token, and that again
        labels = {"custom_params": {"probe": {"labels": {"session": f"why-{n}"}}}}
        server.generate([*own, *prompt], n=1, rid=f"why-{n}", sampling_params=labels)

    def told(**asked: str) -> dict[str, Any]:
        return dict(server.admin.get("/probe/why", params=asked).json())

    deadline = time.monotonic() + 120
    while "causes" not in (found := told(rid="why-2")):  # what a checkpoint has not written is not known yet
        assert time.monotonic() < deadline, found
    assert [(p["start"], p["end"], p["cause"]) for p in found["positions"]] == [(60, 61, "last token")]
    groups = {g["group"]: g["causes"] for g in told(by="session")["groups"]}
    assert groups["why-1"].pop("diverged") == 60
    assert list(groups["why-1"].items()) in ([("never seen", 1)], [("not seen in this segment", 1)])
    assert server.anybody.get("/probe/why").status_code == 401
    asked = {"model": "default", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    answer = server.http.post("/v1/completions", json=asked, headers={"x-smg-routing-key": "by-header"})
    assert answer.status_code == 200, answer.text
    while "by-header" not in {g["group"] for g in told(by="session")["groups"]}:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    server.flush()
    while (after := _by_cause(server)).get("diverged", 0) < before.get("diverged", 0) + 60:
        assert time.monotonic() < deadline + 120, (before, after)
        time.sleep(0.2)


def _by_cause(server: LiveServer) -> dict[str, float]:
    found = {}
    for line in server.anybody.get("/metrics").text.splitlines():
        if line.startswith("sglang_probe:prompt_tokens_by_cause_total{"):
            found[line.split('cause="')[1].split('"')[0]] = float(line.rsplit(" ", 1)[1])
    return found

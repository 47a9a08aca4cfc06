"""Attached to a real server: clients notice nothing, and everything they cause is in the ledger.

One server for the whole file; the tests run in order, and the last one ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from openai import BadRequestError, OpenAI

from sglang_probe.engine.releases import release
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify
from tests.end_to_end.live_server import ADMIN_KEY, KEY, MODEL, LiveServer

pytestmark = pytest.mark.engine
PROVENANCE = {"custom_params": {"probe": {"provenance": True}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("live")
    started = LiveServer(
        folder,
        "--admin-api-key",
        ADMIN_KEY,
        privacy="hashes",
        segments={"min_seconds": 0.2},
        probe={"telemetry": {}, "asks": ["force"]},
    )
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.kill()


@pytest.fixture(scope="module")
def openai(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY)


def test_the_endpoints_ask_for_the_servers_keys(server: LiveServer) -> None:
    for client, path, expected in (
        (server.anybody, "/probe/status", 401),
        (server.anybody, "/probe/coverage", 401),
        (server.http, "/probe/status", 200),
        (server.http, "/probe/coverage", 200),
    ):
        assert client.get(path).status_code == expected, path
    server.generate([*range(30, 60)], rid="somebodys-own-words")
    _settled(server)
    named = server.admin.get("/probe/coverage/ids?n=1").json()["recent"]
    assert [r["rid"] for r in named] == ["somebodys-own-words"]
    assert server.http.get("/probe/coverage/ids").status_code == 401
    assert "rid" not in server.http.get("/probe/coverage?n=1").json()["recent"][0]
    assert server.anybody.post("/probe/flush").status_code == 401
    assert server.http.post("/probe/flush").status_code == 401  # there is an admin key, so it is the admin's
    assert server.admin.post("/probe/flush").status_code == 200


def test_the_openai_client_is_served_as_ever(server: LiveServer, openai: OpenAI) -> None:
    before = server.status()["requests"]
    messages: list[Any] = [{"role": "user", "content": "Write a queue in Python, please. " * 10}]
    asked: dict[str, Any] = {"model": "m", "max_tokens": 12, "temperature": 0.0}
    chat = openai.chat.completions.create(messages=messages, **asked)
    streamed = openai.chat.completions.create(messages=messages, stream=True, **asked)
    text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
    assert text == chat.choices[0].message.content
    done = openai.completions.create(prompt="def is_empty(self):", **asked)
    pieces = openai.completions.create(prompt="def is_empty(self):", stream=True, **asked)
    assert "".join(c.choices[0].text for c in pieces if c.choices) == done.choices[0].text
    assert _settled(server)["requests"] == before + 4
    rows = server.http.get("/probe/coverage?n=4").json()["recent"]
    assert len(rows) == 4
    assert [r.get("reused", 0) for r in rows] == [rows[0]["prompt"] - 1, 0, rows[2]["prompt"] - 1, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_asks_learns_where_its_positions_came_from(server: LiveServer, stream: bool) -> None:
    prompt = [100 + stream, *range(500, 560)]
    first = server.generate(prompt, rid=f"first-{stream}")
    assert "probe" not in first["meta_info"]
    if stream:
        meta = _last_chunk(server, [*prompt, 7], rid="second-True", sampling_params={"max_new_tokens": 5, **PROVENANCE})
    else:
        meta = server.generate([*prompt, 7], 5, rid="second-False", sampling_params=PROVENANCE)["meta_info"]
    spans = meta["probe"]
    assert [(s["start"], s["end"], s["status"], s["phase"]) for s in spans] == [
        (0, 61, "reused", None),
        (61, 62, "computed", "prefill"),
        (62, 66, "computed", "decode"),
    ]
    assert spans[0]["origin"] == f"first-{stream}"
    assert meta["cached_tokens"] == 61


@pytest.mark.parametrize(
    ("probe", "told"),
    [
        ({"forse": [1]}, "unknown key `forse`; did you mean `force`"),
        ({"force": [10**9]}, "token 1000000000 is not within the vocabulary"),
        ({"force": [-1]}, "force.0"),
        ({"cache": "of"}, "cache"),
        ({"cache": "off"}, "not started for `cache`"),
        ({"provenance": "yes"}, "provenance"),
        ([1], "is a mapping, not list"),
    ],
)
def test_what_a_client_cannot_have_is_a_400_with_the_reason_and_nobody_elses_matter(
    server: LiveServer, openai: OpenAI, probe: Any, told: str
) -> None:
    asked = {"max_new_tokens": 4, "custom_params": {"probe": probe}}
    answer = server.http.post("/generate", json={"input_ids": [*range(40, 60)], "sampling_params": asked})
    assert answer.status_code == 400
    assert told in answer.text
    with pytest.raises(BadRequestError, match="sglang-probe"):
        openai.completions.create(
            model="m", prompt="x = ", max_tokens=4, extra_body={"custom_params": {"probe": probe}}
        )
    assert server.status()["recording"]
    force = {"custom_params": {"probe": {"force": [7, 8, 9]}}}
    assert server.generate([*range(40, 60)], 3, sampling_params=force)["output_ids"] == [7, 8, 9]


def test_totals_agree_with_sglangs_own_counts(server: LiveServer) -> None:
    before = server.http.get("/probe/coverage").json()
    cached = sum(server.generate([9, *range(600, 700)], 10)["meta_info"]["cached_tokens"] for _ in range(3))
    after = server.http.get("/probe/coverage").json()
    gained = {k: after["positions"][k] - before["positions"][k] for k in after["positions"]}
    assert gained["reused"] == cached == 200
    assert gained["computed"] == 3 * 101 - 200
    assert gained["decode"] == 27  # the last of ten sampled tokens has no KV entry
    assert gained["dropped"] == gained["recompute"] == 0


def test_the_series_are_on_sglangs_metrics(server: LiveServer) -> None:
    server.generate([5, *range(50)])
    p = server.status()["positions"]
    computed = p["computed"] + p["decode"] + p["overshoot"] + p["recompute"]
    deadline = time.monotonic() + 60  # published once a second, by a thread that waits for its turn on a busy machine
    while time.monotonic() < deadline:
        series = _series(server)
        if series["computed_tokens_total"] == computed and not series["writer_queue_depth"]:
            break
        time.sleep(0.2)
    assert series["computed_tokens_total"] == computed
    assert series["reused_tokens_total"] == p["reused"] > 0
    assert series["recomputed_tokens_total"] == series["dropped_tokens_total"] == series["write_errors_total"] == 0
    assert series["writer_queue_depth"] == 0
    assert series["recording"] == 1
    assert series["recording_stops_total"] == 0


def _series(server: LiveServer) -> dict[str, float]:
    return {
        line.split("{")[0].removeprefix("sglang_probe:"): float(line.rsplit(" ", 1)[1])
        for line in server.anybody.get("/metrics").text.splitlines()
        if line.startswith("sglang_probe:")
    }


def test_a_flushed_segment_is_an_ordinary_run(server: LiveServer, cli: Callable) -> None:
    path = server.flush()
    done = cli("verify", path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(path)
    assert run.complete
    tokens = run.tokens()
    assert {"computed", "reused"} <= set(tokens["status"])
    assert server.status()["segment"]["path"] != str(path)
    requests = run.requests().set_index("rid")
    assert (requests["cached_tokens"] >= 0).all()


def test_equal_prompts_have_equal_hashes_and_no_token_id_is_on_disk(server: LiveServer) -> None:
    for rid in ("twin-a", "twin-b"):
        server.generate([77, 78, 79, 80], rid=rid)
    server.generate([77, 78, 79, 81], rid="other")
    path = server.flush()
    hashes = load_run(path).requests().set_index("rid")["prompt_hash"]
    assert hashes["twin-a"] == hashes["twin-b"] != hashes["other"]
    for file in server.run.rglob("*.parquet"):
        table = pq.read_table(file)
        for column in ("prompt_ids", "output_ids"):
            assert column not in table.column_names or table[column].null_count == len(table), file


def test_a_request_cut_by_a_flush_is_continued_and_both_halves_verify(server: LiveServer) -> None:
    shared = [33, *range(900, 960)]
    server.generate(shared, rid="owner")
    with server.running([*shared, 1], 400, rid="long", sampling_params=PROVENANCE) as answer:
        first = server.flush()
        server.generate([*shared, 2], rid="later")
    _settled(server)
    second = server.flush()
    halves = [load_run(first), load_run(second)]
    reasons = [h.requests().set_index("rid")["finish_reason"].get("long") for h in halves]
    assert reasons == ["continues", "length"]
    position = halves[1].manifest["segment"]["carried_in"]["long"][1]
    assert 61 < position < 461
    notes = []
    for half in halves:
        checks = verify(half)
        assert [c.violation for c in checks] == [None] * len(checks)
        notes.append(" ".join(c.note or "" for c in checks))
    assert "1 requests continue in another segment" in notes[0]
    assert "1 requests began in the segment before" in notes[1]
    assert "computed in another segment" in notes[1]
    assert answer["meta_info"]["probe"][-1]["end"] == 461


def test_a_client_that_uses_an_id_again_breaks_nothing(server: LiveServer) -> None:
    for n in (3, 5):
        server.generate([66, 67, 68, n], n, rid="same")
    run = load_run(server.flush())
    assert {"same": 3, "same~1": 5}.items() <= run.requests().set_index("rid")["output_len"].to_dict().items()
    assert all(c.holds for c in verify(run))


def test_ids_that_spell_names_of_the_probes_own_take_nobodys_place(server: LiveServer) -> None:
    """`k~1` is running while `k` comes again; ids may be empty, odd, huge, or in use (SGLang refuses those)."""
    server.generate([70, 71, 72], 3, rid="k")
    with server.running([70, 71, 73], 200, rid="k~1"):
        server.generate([70, 71, 72], 10, rid="k")
    odd = ["", "~1", "a/../b\n", "é", "x" * 100_000, "same", "same", "same"]
    codes: list[int] = []
    clients = [threading.Thread(target=_ask, args=(server, rid, i, codes)) for i, rid in enumerate(odd)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    status = _settled(server)
    assert (status["recording"], status["requests_unaccounted"]) == (True, 0)
    run = load_run(server.flush())
    assert [c.violation for c in verify(run) if not c.holds] == []
    lengths = run.requests().set_index("rid")["output_len"]
    assert {"k": 3, "k~~1": 200, "k~1": 10}.items() <= lengths.to_dict().items()
    assert len(codes) == len(odd)
    assert len(lengths) == 3 + codes.count(200)


def _ask(server: LiveServer, rid: str, i: int, codes: list[int]) -> None:
    body = {"input_ids": [80, i], "rid": rid, "sampling_params": {"max_new_tokens": 30, "ignore_eos": True}}
    codes.append(server.http.post("/generate", json=body).status_code)


def test_beams_are_refused_by_name_and_the_others_are_recorded(server: LiveServer, openai: OpenAI) -> None:
    with server.running([90, 91, 92], 100, rid="beside"):
        refused = server.http.post(
            "/generate", json={"input_ids": [*range(40, 60)], "sampling_params": {"max_new_tokens": 4, "beam_width": 2}}
        )
        assert refused.status_code == 400
        assert "beam_width" in refused.text
        several = openai.completions.create(model="m", prompt="x = ", max_tokens=4, n=3)
        assert len(several.choices) == 3
    status = _settled(server)
    assert (status["recording"], status["requests_unaccounted"]) == (True, 0)
    run = load_run(server.flush())
    assert [c.violation for c in verify(run) if not c.holds] == []
    assert run.requests().set_index("rid").at["beside", "output_len"] == 100


def test_a_prompt_without_tokens_ends_nobodys_serving(server: LiveServer) -> None:
    """SGLang queues it, and its forward of no rows ends the engine."""
    for prompt in ({"text": ""}, {"input_ids": []}):
        body = {**prompt, "sampling_params": {"max_new_tokens": 4}}
        assert server.http.post("/generate", json=body).status_code == 400
    server.generate([5, 6, 7], 4, rid="after an empty one")
    status = _settled(server)
    assert (status["recording"], status["requests_unaccounted"]) == (True, 0)
    run = load_run(server.flush())
    assert [c.violation for c in verify(run) if not c.holds] == []
    assert run.requests().set_index("rid").at["after an empty one", "output_len"] == 4


def test_the_manifest_has_what_is_in_force_and_no_key(server: LiveServer) -> None:
    server.generate([4, 4, 4])
    manifest = load_run(server.flush()).manifest
    resolved = manifest["server_resolved"]
    assert [name for name, value in resolved.items() if value is None] == []
    assert resolved["attention_backend"] in release().cpu_attention
    decided = ("page_size", "disable_radix_cache", "max_total_tokens", "schedule_policy", "kv_cache_dtype")
    assert [resolved[name] for name in decided] == [1, False, 65536, "fcfs", resolved["dtype"]]
    assert resolved["chunked_prefill_size"] > 0
    assert resolved["random_seed"] >= 0
    assert KEY not in json.dumps(manifest)
    assert ADMIN_KEY not in json.dumps(manifest)


def test_an_update_of_the_weights_begins_a_segment_and_every_forward_says_which_it_had(server: LiveServer) -> None:
    shared = [88, *range(300, 340)]
    server.generate(shared, rid="old weights")
    before = _settled(server)
    update = {"model_path": str(MODEL), "flush_cache": False, "weight_version": "v2"}
    assert server.admin.post("/update_weights_from_disk", json=update).json()["success"]
    for _ in range(100):  # a segment is closed on demand once it has its `min_seconds`
        if server.status()["segment"]["path"] != before["segment"]["path"]:
            break
        time.sleep(0.05)
    server.generate([*shared, 1], rid="new weights")  # reuses what the old weights computed
    assert _settled(server)["weights"] == {"number": 1, "how": "disk", "version": "v2", "path": str(MODEL)}
    path = server.flush()
    assert path != Path(before["segment"]["path"])
    runs = [load_run(p) for p in sorted(server.run.glob("segment-*")) if p <= path]
    weights: dict[str, set[int]] = {"old weights": set(), "new weights": set()}
    for run in runs:
        of_forward = run.forwards().set_index("forward_id")["weights"]
        for rid, found in weights.items():
            found |= set(of_forward[_forwards(run, rid)])
    assert weights == {"old weights": {0}, "new weights": {1}}
    assert runs[-1].manifest["weights"][-1]["version"] == "v2"
    for run in runs[-2:]:
        assert [c.violation for c in verify(run) if not c.holds] == []
    spans = pd.concat([run.spans() for run in runs])
    assert set(spans.loc[spans["rid"] == "new weights", "origin_rid"].dropna()) == {"old weights"}


def _forwards(run: Run, rid: str) -> list[int]:
    """Forwards that computed something of a request, the first one of each span."""
    spans = run.spans()
    return list(spans.loc[(spans["rid"] == rid) & (spans["status"] == "computed"), "forward_id"])


def test_an_aborted_request_is_accounted_for(server: LiveServer) -> None:
    with server.http.stream(
        "POST",
        "/generate",
        json={
            "input_ids": [44] * 20,
            "rid": "gone",
            "stream": True,
            "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True},
        },
    ) as response:
        next(response.iter_lines())
    status = _settled(server)
    assert status["recording"]
    run = load_run(server.flush())
    assert run.requests().set_index("rid").at["gone", "finish_reason"] == "abort"
    assert all(c.holds for c in verify(run))


@pytest.mark.slow
def test_sglangs_own_benchmark_runs_against_it_and_reconciles(server: LiveServer, tmp_path: Path) -> None:
    before, cached_before = _settled(server)["positions"], _sglangs_cached_tokens(server)
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", server.url]
    command += ["--model", str(MODEL), "--tokenizer", str(MODEL), "--dataset-name", "generated-shared-prefix"]
    command += ["--gsp-num-groups", "4", "--gsp-prompts-per-group", "6", "--gsp-system-prompt-len", "200"]
    command += ["--gsp-question-len", "20", "--gsp-output-len", "16", "--max-concurrency", "4"]
    command += ["--output-file", str(tmp_path / "bench.jsonl")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120, env=_with_key()
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Successful requests:                     24" in done.stdout, done.stdout
    after = _settled(server)["positions"]
    reused = after["reused"] - before["reused"]
    computed = after["computed"] - before["computed"]
    assert reused / (reused + computed) > 0.4
    assert reused == _sglangs_cached_tokens(server) - cached_before
    run = load_run(server.flush())
    checks = verify(run)
    assert [c.violation for c in checks] == [None] * len(checks)
    assert len(run.requests()) >= 24


def test_sigterm_closes_the_last_segment(server: LiveServer) -> None:
    server.generate([3, *range(40)], rid="last")
    server.terminate()
    last = sorted(server.run.glob("segment-*"))[-1]
    run = load_run(last)
    assert run.complete, server.log.read_text()[-3000:]
    assert "last" in set(run.requests()["rid"])
    assert all(c.holds for c in verify(run))


def _sglangs_cached_tokens(server: LiveServer) -> int:
    time.sleep(1.5)
    lines = server.anybody.get("/metrics").text.splitlines()
    return int(sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("sglang:cached_tokens_total")))


def _with_key() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "SGLANG_PROBE"} | {"OPENAI_API_KEY": KEY}


def _settled(server: LiveServer) -> dict[str, Any]:
    """Status once nothing is in flight: a client has its answer a moment before the scheduler has committed it."""
    for _ in range(100):
        status = server.status()
        if not status["requests_in_flight"]:
            return status
        time.sleep(0.05)
    return status


def _last_chunk(server: LiveServer, prompt: list[int], **fields: Any) -> dict[str, Any]:
    params = {"temperature": 0.0, "ignore_eos": True, **fields.pop("sampling_params")}
    body = {"input_ids": prompt, "sampling_params": params, "stream": True, **fields}
    with server.http.stream("POST", "/generate", json=body) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    return dict(json.loads(lines[-1])["meta_info"])

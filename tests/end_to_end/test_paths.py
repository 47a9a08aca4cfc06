"""Every scheduler path, one by one, on a real server: the exact spans, and every invariant (docs/evidence/paths.md).

One server with small chunks, few running requests and priorities, so that queueing, chunking and preemption happen
with few tokens. Each test uses prompts of its own and closes a segment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx
import pytest

from sglang_probe.engine.releases import release
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify
from tests.end_to_end.live_server import LiveServer
from tests.end_to_end.paths import EXTRA, as_without_overshoot_at_length

pytestmark = pytest.mark.engine
CHUNK = 64
_fresh = count(1)

Span = tuple[int, int, str, str | None, str | None]
"""start, end, status, phase, origin"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    options = ["--chunked-prefill-size", str(CHUNK), "--max-running-requests", "2", "--enable-priority-scheduling"]
    options += ["--priority-scheduling-preemption-threshold", "5"]
    # `verify` asks of telemetry too that it follows every path.
    started = LiveServer(tmp_path_factory.mktemp("paths"), *options, privacy="ids", probe={"telemetry": {"every": 2}})
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.kill()


def prompt(n: int) -> list[int]:
    """Tokens that no other test has used as a beginning."""
    return [10 + next(_fresh), *range(500, 500 + n - 1)]


def closed(server: LiveServer) -> Run:
    """The segment of what was asked since the last one, with every invariant checked."""
    deadline = time.time() + 20
    while server.status()["requests_in_flight"] and time.time() < deadline:
        time.sleep(0.05)
    answer = server.http.post("/probe/flush")
    run = load_run(answer.json()["segment"])
    assert [str(c) for c in verify(run) if not c.holds] == []
    return run


def spans_of(run: Run, rid: str, attempt: int = 0) -> list[Span]:
    spans = as_without_overshoot_at_length(run)
    mine = spans[(spans["rid"] == rid) & (spans["attempt"] == attempt)].sort_values("start")
    columns = ["start", "end", "status", "phase", "origin_rid"]
    return [tuple(r) for r in mine[columns].astype(object).where(mine[columns].notna(), None).to_numpy()]


def merged(spans: list[Span]) -> list[Span]:
    """Chunks of a prompt joined."""
    out: list[Span] = []
    for s in spans:
        if out and out[-1][1] == s[0] and out[-1][2:] == s[2:]:
            out[-1] = (out[-1][0], s[1], *s[2:])
        else:
            out.append(s)
    return out


def computed(start: int, end: int, phase: str = "prefill") -> Span:
    return (start, end, "computed", phase, None)


def reused(start: int, end: int, origin: str) -> Span:
    return (start, end, "reused", None, origin)


def test_chunks_of_a_prompt(server: LiveServer) -> None:
    server.generate(prompt(150), 3, rid="chunked")
    assert spans_of(closed(server), "chunked") == [
        computed(0, 64),
        computed(64, 128),
        computed(128, 150),
        computed(150, 152, "decode"),
    ]


def test_one_token_is_sampled_by_the_prefill_itself(server: LiveServer) -> None:
    server.generate(prompt(40), 1, rid="one")
    assert spans_of(closed(server), "one") == [computed(0, 40)]


def test_a_prompt_that_is_cached_whole_computes_its_last_token(server: LiveServer) -> None:
    ids = prompt(50)
    server.generate(ids, 2, rid="whole-1")
    server.generate(ids, 2, rid="whole-2")
    run = closed(server)
    assert spans_of(run, "whole-2") == [reused(0, 49, "whole-1"), computed(49, 50), computed(50, 51, "decode")]


def test_a_prompt_that_extends_an_output_reuses_decoded_positions(server: LiveServer) -> None:
    ids = prompt(50)
    out = server.generate(ids, 10, rid="turn-1")["output_ids"]
    server.generate([*ids, *out, 700, 701], 2, rid="turn-2")
    run = closed(server)
    # The last sampled token of the first turn is not run through the model by every release: 50 + 9 positions have an
    # entry, or one more.
    assert merged(spans_of(run, "turn-1")) == [computed(0, 50), computed(50, 59, "decode")]
    assert merged(spans_of(run, "turn-2")) == [
        reused(0, 59 + EXTRA, "turn-1"),
        computed(59 + EXTRA, 62),
        computed(62, 63, "decode"),
    ]


def test_a_stop_token_leaves_one_step_too_many(server: LiveServer) -> None:
    ids = prompt(30)
    first = server.generate(ids, 6, rid="stop-0")["output_ids"]
    params = {"max_new_tokens": 6, "temperature": 0.0, "stop_token_ids": [first[2]], "ignore_eos": False}
    stops = first.index(first[2]) + 1
    server.generate([*ids], 6, rid="stop-1", sampling_params=params)
    run = closed(server)
    spans = merged(spans_of(run, "stop-1"))
    assert run.engine_requests().set_index("rid")["output_len"]["stop-1"] == stops  # the last step is not reported
    assert spans[-1] == computed(30 + stops - 1, 30 + stops, "overshoot")
    assert "overshoot" not in {s[3] for s in spans_of(run, "stop-0")}


@pytest.mark.parametrize("field", release().namespace_fields)
def test_salts_and_keys_separate_prefixes(server: LiveServer, field: str) -> None:
    ids = prompt(50)
    for i, value in enumerate(["a", "b", "a"]):
        server.generate(ids, 1, rid=f"{field}-{i}", **{field: value})
    run = closed(server)
    assert spans_of(run, f"{field}-1") == [computed(0, 50)]
    assert spans_of(run, f"{field}-2") == [reused(0, 49, f"{field}-0"), computed(49, 50)]


def test_log_probabilities_of_the_prompt_shorten_the_match(server: LiveServer) -> None:
    ids = prompt(50)
    server.generate(ids, 1, rid="logprob-0")
    answer = server.generate(ids, 1, rid="logprob-1", return_logprob=True, logprob_start_len=20)
    assert answer["meta_info"]["cached_tokens"] == 20
    assert spans_of(closed(server), "logprob-1") == [reused(0, 20, "logprob-0"), computed(20, 50)]


def test_a_flush_makes_the_next_request_compute_everything(server: LiveServer) -> None:
    ids = prompt(50)
    server.generate(ids, 1, rid="flush-0")
    assert server.http.post("/flush_cache").status_code == 200
    server.generate(ids, 1, rid="flush-1")
    assert spans_of(closed(server), "flush-1") == [computed(0, 50)]


def test_several_samples_are_a_warm_up_and_requests_of_their_own(server: LiveServer) -> None:
    ids = prompt(50)
    params = {"n": 3, "max_new_tokens": 4, "temperature": 1.0, "ignore_eos": True}
    answers = server.http.post("/generate", json={"input_ids": ids, "sampling_params": params}).json()
    run = closed(server)
    requests = run.requests()
    assert len(requests) == 4  # SGLang computes the prompt once, in a request that nobody is told of
    warm = requests.loc[requests["output_len"].idxmin(), "rid"]
    assert spans_of(run, warm) == [computed(0, 50)]
    for answer in answers:
        rid = answer["meta_info"]["id"]
        assert answer["meta_info"]["cached_tokens"] == 49
        assert merged(spans_of(run, rid)) == [reused(0, 49, warm), computed(49, 50), computed(50, 53, "decode")]


def test_streaming_changes_nothing(server: LiveServer) -> None:
    ids = prompt(50)
    body = {"input_ids": ids, "rid": "stream", "stream": True, "sampling_params": {"max_new_tokens": 5}}
    body["sampling_params"]["ignore_eos"] = True  # type: ignore[index]
    with server.http.stream("POST", "/generate", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    assert len(json.loads(lines[-1].removeprefix("data: "))["output_ids"]) == 5
    assert spans_of(closed(server), "stream") == [computed(0, 50), computed(50, 54, "decode")]


def _ask(server: LiveServer, ids: list[int], n: int, **fields: Any) -> Any:
    params = {"max_new_tokens": n, "temperature": 0.0, "ignore_eos": True}
    with httpx.Client(base_url=server.url, headers=server.http.headers, timeout=60) as client:
        return client.post("/generate", json={"input_ids": ids, "sampling_params": params, **fields})


def _abort(server: LiveServer, rid: str) -> None:
    assert server.http.post("/abort_request", json={"rid": rid}).status_code == 200


def test_an_abort_in_decode_ends_the_spans_where_it_happened(server: LiveServer) -> None:
    with server.running(prompt(40), 3000, rid="abort-decode"):
        _abort(server, "abort-decode")
    run = closed(server)
    spans = merged(spans_of(run, "abort-decode"))
    (end,) = run.requests().loc[lambda r: r["rid"] == "abort-decode", "finish_reason"]
    assert end == "abort"
    assert spans[0] == computed(0, 40)
    assert [s[3] for s in spans] in (["prefill", "decode"], ["prefill", "decode", "overshoot"])
    assert 40 < spans[-1][1] < 3000


def test_an_abort_in_a_prompt_leaves_the_rest_unrequested(server: LiveServer) -> None:
    wait = 0.25
    for attempt in range(12):  # until the abort falls among the forty chunks, however fast they are computed
        rid = f"abort-prefill-{attempt}"
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(_ask, server, prompt(2500), 4, rid=rid)
            time.sleep(wait)
            _abort(server, rid)
            asked.result()
        spans = merged(spans_of(closed(server), rid))
        if spans[-1][2] == "unrequested" and len(spans) == 2:
            break
        wait *= 1.5 if spans == [(0, 2500, "unrequested", None, None)] else 0.5
    done = spans[0][1]
    assert spans == [computed(0, done), (done, 2500, "unrequested", None, None)]
    assert 0 < done < 2500
    assert done % CHUNK == 0


def test_an_abort_in_the_queue_leaves_everything_unrequested(server: LiveServer) -> None:
    with (
        ThreadPoolExecutor() as pool,
        server.running(prompt(30), 3000, rid="busy-0"),
        server.running(prompt(30), 3000, rid="busy-1"),
    ):
        asked = pool.submit(_ask, server, prompt(60), 4, rid="abort-queue")
        while not asked.done():  # an abort of a request that has not arrived does nothing
            _abort(server, "abort-queue")
        for rid in ("busy-0", "busy-1"):
            _abort(server, rid)
    assert spans_of(closed(server), "abort-queue") == [(0, 60, "unrequested", None, None)]


def test_duplicates_in_one_batch_are_both_computed_and_one_is_rebound(server: LiveServer) -> None:
    for attempt in range(8):  # both must arrive before the next batch is formed
        ids, rids = prompt(24), [f"twin-{attempt}-{i}" for i in range(2)]
        params = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}
        body = {"input_ids": [ids, ids], "rid": rids, "sampling_params": params}
        assert server.http.post("/generate", json=body).status_code == 200
    run = closed(server)
    spans, rebinds = run.spans(), run.rebinds()
    prefills = spans[spans["phase"] == "prefill"].groupby("rid")["forward_id"].first()
    together = [k for k in range(8) if prefills[f"twin-{k}-0"] == prefills[f"twin-{k}-1"]]
    assert together, "no twins arrived together"
    for k in together:
        first, second = f"twin-{k}-0", f"twin-{k}-1"
        for rid in (first, second):
            assert spans_of(run, rid) == [computed(0, 24), computed(24, 27, "decode")]
        # The prompt right behind its forward; at the end perhaps the decoded positions too, which are the same.
        bound = rebinds[rebinds["rid"].isin([first, second])].sort_values("start")
        assert bound["rid"].nunique() == 1
        assert {bound["rid"].iloc[0], bound["origin_rid"].iloc[0]} == {first, second}
        at = bound.iloc[0]
        assert (at["start"], at["end"]) == (0, 24)
        # Overlap scheduling has launched the next forward by the time the prompt is published, if there was one.
        assert at["at_forward"] - prefills[first] in (1, 2)
        assert (bound["start"].iloc[1:] >= 24).all()
        # SGLang reports no reuse for either, though one of them decodes on the other's entries.
        assert run.engine_requests().set_index("rid").loc[[first, second], "cached_tokens"].tolist() == [0, 0]


def test_a_preempted_request_is_retracted_and_computed_again(server: LiveServer) -> None:
    with (
        server.running(prompt(40), 300, rid="low-0", priority=0),
        server.running(prompt(40), 300, rid="low-1", priority=0),
    ):
        assert _ask(server, prompt(40), 4, rid="high", priority=100).status_code == 200
    run = closed(server)
    assert spans_of(run, "high") == [computed(0, 40), computed(40, 43, "decode")]
    ended = run.engine_requests().set_index("rid")["retractions"]
    (victim,) = [rid for rid in ("low-0", "low-1") if ended[rid]]
    assert ended[victim] == 1
    # SGLang counts the first attempt only, which reused nothing.
    assert run.engine_requests().set_index("rid")["cached_tokens"][victim] == 0
    # What the first attempt had published is matched again; the rest is computed a second time.
    again = merged(spans_of(run, victim, attempt=1))
    assert again[0][0] == 0
    assert {s[2] for s in again} <= {"reused", "computed"}
    assert "recompute" in {s[3] for s in again}
    assert again[-1][1] == 339
    print("preempted:", merged(spans_of(run, victim)), again)


def test_a_request_of_an_engine_session_is_refused_or_exact(server: LiveServer) -> None:
    opened = server.http.post("/open_session", json={"capacity_of_str_len": 4096})
    assert opened.status_code == 200, opened.text
    session = {"id": opened.json(), "rid": None, "offset": None, "replace": False}
    ids = prompt(50)
    first = _ask(server, ids, 5, rid="session-1", session_params=session)
    second = _ask(server, [800, 801], 3, rid="session-2", session_params={**session, "rid": "session-1"})
    assert (first.status_code, second.status_code) == (200, 200), second.text
    run = closed(server)
    lengths = run.engine_requests().set_index("rid")["prompt_len"]
    assert lengths["session-2"] == 50 + 5 + 2  # SGLang puts the session's text in front
    assert merged(spans_of(run, "session-2")) == [
        reused(0, 54 + EXTRA, "session-1"),
        computed(54 + EXTRA, 57),
        computed(57, 59, "decode"),
    ]

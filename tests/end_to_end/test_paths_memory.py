"""Scheduler paths when KV memory is short: pages, eviction, retraction, mixed batches. See docs/evidence/paths.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from sglang_probe.run.run import Run
from tests.end_to_end.live_server import LiveServer
from tests.end_to_end.paths import CHUNK, ask, cached_tokens, chunks, meanwhile, prompt, rebinds, recorded, spans

pytestmark = pytest.mark.engine
POOL = ["--max-total-tokens", "2048", "--chunked-prefill-size", str(CHUNK)]


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Pages of 32 tokens, no overlap scheduling, eviction of what was used least often."""
    options = ["--page-size", "32", "--disable-overlap-schedule", "--radix-eviction-policy", "lfu"]
    yield from _served(tmp_path_factory, *POOL, *options)


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Pages of one token, eviction of what was used longest ago, a retraction every third step."""
    yield from _served(tmp_path_factory, *POOL, environment={"SGLANG_TEST_RETRACT": "1"})


def test_only_whole_pages_are_reused(paged: LiveServer) -> None:
    ids = prompt(100)
    output = ask(paged, input_ids=ids, rid="page", n=60)["output_ids"]
    ask(paged, input_ids=ids, rid="same", n=1)
    ask(paged, input_ids=[*ids[:70], *[3] * 10], rid="fork", n=1)
    ask(paged, input_ids=[*ids, *output, 5], rid="grown", n=1)
    run = recorded(paged)
    assert spans(run, "page") == ["0-64 prefill", "64-100 prefill", "100-159 decode"]
    assert spans(run, "same") == ["0-96 reused from page", "96-100 prefill"]
    assert spans(run, "fork") == ["0-64 reused from page", "64-80 prefill"]
    assert spans(run, "grown") == ["0-128 reused from page", "128-161 prefill"]  # 159 positions: four whole pages


def test_a_page_that_two_requests_computed_is_rebound_whole(paged: LiveServer) -> None:
    ids = prompt(30)
    ask(paged, input_ids=[ids, ids], rid=["g", "h"], n=40)
    run = recorded(paged)
    assert [spans(run, r) for r in "gh"] == [["0-30 prefill", "30-69 decode"]] * 2
    assert rebinds(run) == {"h 0-64 to g"}


def test_without_overlap_a_stop_computes_nothing_more(paged: LiveServer) -> None:
    ids = prompt(20)
    output = ask(paged, input_ids=ids, rid="free", n=6)["output_ids"]
    stop = {"ignore_eos": False, "stop_token_ids": output[:1]}
    ask(paged, input_ids=ids, rid="stop", n=6, params=stop)
    assert spans(recorded(paged), "stop") == ["0-20 prefill"]


def test_an_abort_behind_which_nothing_runs_is_ended_at_once(paged: LiveServer) -> None:
    for attempt in range(12):  # until the abort arrives before the last of the chunks, however fast they are computed
        rid = f"gone-{attempt}"
        with meanwhile(paged, forwards=1, input_ids=prompt(1500), rid=rid):
            paged.http.post("/abort_request", json={"rid": rid})
        run = recorded(paged)
        if (done := CHUNK * sum(s.endswith("prefill") for s in spans(run, rid))) < 1500:
            break
    assert spans(run, rid) == [*chunks(done), f"{done}-1500 unrequested"]
    assert run.requests().set_index("rid").at[rid, "finish_reason"] == "abort"


def test_lfu_evicts_what_was_used_once(paged: LiveServer) -> None:
    often, once = _fill(paged, "a")
    ask(paged, input_ids=once, rid="once-again", n=1)
    assert spans(recorded(paged), "once-again") == ["0-640 reused from once-a", "640-700 prefill"]
    often, once = _fill(paged, "b")
    ask(paged, input_ids=often, rid="often-again", n=1)
    assert spans(recorded(paged), "often-again") == ["0-672 reused from often-b", "672-700 prefill"]


@pytest.mark.slow
def test_lru_evicts_what_was_used_first(tight: LiveServer) -> None:
    often, once = _fill(tight, "c")
    ask(tight, input_ids=once, rid="once-again", n=1)
    assert spans(recorded(tight), "once-again") == ["0-699 reused from once-c", "699-700 prefill"]
    often, once = _fill(tight, "d")
    ask(tight, input_ids=often, rid="often-again", n=1)
    assert spans(recorded(tight), "often-again") == ["0-640 reused from often-d", "640-700 prefill"]


@pytest.mark.slow
def test_an_evicted_prefix_that_is_computed_again_has_its_new_owner(tight: LiveServer) -> None:
    often, _ = _fill(tight, "e")
    for rid in ("second", "third"):
        ask(tight, input_ids=often, rid=rid, n=1)
    run = recorded(tight)
    assert spans(run, "second") == ["0-640 reused from often-e", "640-700 prefill"]
    assert spans(run, "third") == ["0-640 reused from often-e", "640-699 reused from second", "699-700 prefill"]


@pytest.mark.slow
def test_every_retraction_is_an_attempt_that_reuses_what_was_published(tight: LiveServer) -> None:
    ask(tight, input_ids=[prompt(30), prompt(30)], rid=["kept", "victim"], n=20)
    run = recorded(tight)
    assert spans(run, "kept") == ["0-30 prefill", "30-49 decode"]
    attempts = _attempts(run, "victim")
    assert len(attempts) > 3
    assert attempts[0][0] == (0, 30, "prefill")
    for before, spans_here in itertools.pairwise(attempts):
        (zero, kept, reused), (again, end, phase) = spans_here[:2]
        assert (zero, again, reused, phase) == (0, kept, "reused from victim", "recompute")
        assert 30 <= kept < end
        assert end == before[-1][1]  # whatever was computed before, the step in flight included, is there again
    assert attempts[-1][-1][1:] == (49, "decode")
    assert cached_tokens(run, "victim") == 0  # of the first attempt


def _served(factory: pytest.TempPathFactory, *options: str, **more: dict[str, str]) -> Iterator[LiveServer]:
    server = LiveServer(factory.mktemp("memory"), *options, privacy="ids", probe={"telemetry": {"every": 3}}, **more)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def _fill(server: LiveServer, which: str) -> tuple[list[int], list[int]]:
    """An empty cache of 2,048 tokens, then 700 tokens used three times, 700 used once, and 700 more, for which some of
    one of them must go. Returns the first two prompts. `which` keeps the ids apart: one that comes again while the
    recording may refer to the earlier request gets another name."""
    recorded(server)
    assert server.http.post("/flush_cache").status_code == 200
    often, once = prompt(700), prompt(700)
    for rid, ids in (("often", often), ("u1", often), ("u2", often), ("once", once), ("last", prompt(700))):
        ask(server, input_ids=ids, rid=f"{rid}-{which}", n=1)
    return often, once


def _attempts(run: Run, rid: str) -> list[list[tuple[int, int, str]]]:
    """Spans of each attempt, neighbours with the same fate joined."""
    out: list[list[tuple[int, int, str]]] = []
    for text in spans(run, rid):
        attempt, words = text.count("again: "), text.replace("again: ", "")
        where, fate = words.split(" ", 1)
        start, end = map(int, where.split("-"))
        if attempt == len(out):
            out.append([])
        if out[-1] and out[-1][-1][2] == fate and out[-1][-1][1] == start:
            out[-1][-1] = (out[-1][-1][0], end, fate)
        else:
            out[-1].append((start, end, fate))
    return out

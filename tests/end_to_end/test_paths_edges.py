"""Scheduler paths at their edges: what is in flight when something ends, and requests that SGLang rewrites.

See docs/evidence/paths.md. Small chunks and few running requests make the edges cheap to reach.
"""

from __future__ import annotations

import pytest

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.run import load_run
from tests.end_to_end.live_server import LiveServer
from tests.end_to_end.paths import CHUNK, EXTRA, ask, chunks, finish, meanwhile, prompt, rebinds, recorded, spans

pytestmark = pytest.mark.engine


def test_twins_in_one_batch_are_computed_both_and_one_is_rebound(chunked_server: LiveServer) -> None:
    ids = prompt(20)
    ask(chunked_server, input_ids=[ids, ids, ids], rid=["a", "b", "c"])
    run = recorded(chunked_server)
    assert [spans(run, r) for r in "abc"] == [["0-20 prefill", "20-23 decode"]] * 3
    # SGLang keeps the entries of the one it publishes first, of the prompt after prefill and of the rest at the end.
    end = 23 + EXTRA
    assert rebinds(run) == {"b 0-20 to a", "c 0-20 to a", f"b 20-{end} to a", f"c 20-{end} to a"}


def test_a_twin_that_is_cut_by_the_chunk_publishes_before_those_that_are_not(chunked_server: LiveServer) -> None:
    ids = prompt(50)
    ask(chunked_server, input_ids=[ids, ids, ids], rid=["d", "e", "f"])
    run = recorded(chunked_server)
    assert spans(run, "d") == ["0-50 prefill", "50-53 decode"]
    assert spans(run, "e") == ["0-14 prefill", "14-50 prefill", "50-53 decode"]
    assert spans(run, "f") == ["0-14 reused from e", "14-42 prefill", "42-50 prefill", "50-53 decode"]
    assert {"d 0-14 to e", "e 14-50 to d", "f 14-42 to d", "f 42-50 to d"} <= rebinds(run)


@pytest.mark.parametrize("rid", ["regex", "logprob", "session"])
def test_a_refused_request_is_recorded_as_the_token_that_ran_in_its_place(chunked_server: LiveServer, rid: str) -> None:
    fields = {
        "regex": {"params": {"regex": "(("}},
        "logprob": {"return_logprob": True, "logprob_start_len": 60},
        "session": {"session_params": {"id": "no such session"}},
    }[rid]
    assert "error" in ask(chunked_server, input_ids=prompt(50), rid=rid, **fields)
    run = recorded(chunked_server)
    request = run.requests().set_index("rid").loc[rid]
    assert (request["finish_reason"], request["prompt_len"], list(request["prompt_ids"])) == ("refused", 1, [0])
    assert spans(run, rid) == ["0-1 prefill", "1-2 overshoot"]


def test_the_chunk_in_flight_at_an_abort_was_computed_and_is_not_reused(chunked_server: LiveServer) -> None:
    ids = prompt(3000)
    with meanwhile(chunked_server, input_ids=ids, rid="gone"):
        chunked_server.http.post("/abort_request", json={"rid": "gone"})
    ask(chunked_server, input_ids=ids, rid="next", n=1)
    run = recorded(chunked_server)
    done = 64 * sum(s.endswith("prefill") for s in spans(run, "gone"))
    assert CHUNK < done < 3000
    assert finish(run, "gone") == "abort"
    assert spans(run, "gone") == [*chunks(done), f"{done}-3000 unrequested"]
    # Its forward pass ran, so it counts as computed; its entries were freed and not published.
    kept = done - CHUNK
    assert spans(run, "next") == [f"0-{kept} reused from gone", *chunks(3000, start=kept)]


def test_what_was_decoded_before_an_abort_can_be_reused(chunked_server: LiveServer) -> None:
    ids = prompt(30)
    with meanwhile(chunked_server, input_ids=ids, rid="half", n=3000) as answer:
        chunked_server.http.post("/abort_request", json={"rid": "half"})
        output = answer.result()["output_ids"]
    ask(chunked_server, input_ids=[*ids, *output, 7], rid="more", n=1)
    run = recorded(chunked_server)
    end = 30 + len(output)
    assert spans(run, "half") == ["0-30 prefill", f"30-{end - 1} decode", f"{end - 1}-{end} overshoot"]
    assert spans(run, "more") == [f"0-{end} reused from half", f"{end}-{end + 1} prefill"]


def test_a_client_that_goes_away_in_the_prompt_leaves_the_rest_unrequested(chunked_server: LiveServer) -> None:
    ids = prompt(3500)
    body = {"input_ids": ids, "rid": "left", "stream": True, "sampling_params": {"max_new_tokens": 9}}
    with pytest.raises(Exception, match="timed out"):
        chunked_server.http.post("/generate", json=body, timeout=0.1)
    run = recorded(chunked_server)
    done = CHUNK * sum(s.endswith("prefill") for s in spans(run, "left"))
    assert done < 3500
    assert spans(run, "left") == [*chunks(done), f"{done}-3500 unrequested"]


def test_a_pause_that_retracts_in_decode_starts_a_new_attempt(chunked_server: LiveServer) -> None:
    with meanwhile(chunked_server, input_ids=prompt(30), rid="paused", n=200):
        _pause_and_continue(chunked_server)
    run = recorded(chunked_server)
    end = int(spans(run, "paused")[1].split("-")[1].split()[0])
    assert spans(run, "paused") == [
        "0-30 prefill",
        f"30-{end} decode",
        "again: 0-30 reused from paused",
        *chunks(end + 1, "recompute", start=30, prefix="again: "),  # a long one is cut like a prompt
        f"again: {end + 1}-229 decode",
    ]


def test_a_pause_that_retracts_in_the_prompt_keeps_what_was_published(chunked_server: LiveServer) -> None:
    with meanwhile(chunked_server, input_ids=prompt(3000), rid="cut", n=3):
        _pause_and_continue(chunked_server)
    run = recorded(chunked_server)
    done = CHUNK * sum(s.endswith("prefill") for s in spans(run, "cut"))
    kept = done - CHUNK
    assert spans(run, "cut") == [
        *chunks(done),
        f"again: 0-{kept} reused from cut",
        *chunks(3000, "recompute", start=kept, prefix="again: "),
        "again: 3000-3002 decode",
    ]


def test_a_stop_at_the_first_token_and_by_text_overshoot_by_one(chunked_server: LiveServer) -> None:
    ids = prompt(30)
    free = ask(chunked_server, input_ids=ids, rid="free", n=9)
    first = {"ignore_eos": False, "stop_token_ids": free["output_ids"][:1]}
    assert len(ask(chunked_server, input_ids=ids, rid="token", n=9, params=first)["output_ids"]) == 1
    text = ask(chunked_server, input_ids=ids, rid="text", n=9, params={"stop": [free["text"][4:6]]})
    run = recorded(chunked_server)
    reused = ["0-29 reused from free", "29-30 prefill"]
    assert spans(run, "token") == [*reused, "30-31 overshoot"]
    end = 30 + len(text["output_ids"])
    assert spans(run, "text") == [*reused, f"30-{end - 1} decode", f"{end - 1}-{end} overshoot"]


def test_no_new_token_is_a_prefill(chunked_server: LiveServer) -> None:
    assert ask(chunked_server, input_ids=prompt(30), rid="none", n=0)["output_ids"] == []
    assert spans(recorded(chunked_server), "none") == ["0-30 prefill"]


def test_a_session_may_branch_within_an_earlier_turn(chunked_server: LiveServer) -> None:
    session = chunked_server.http.post("/open_session", json={"capacity_of_str_len": 1000}).json()
    ask(chunked_server, input_ids=prompt(40), rid="turn", session_params={"id": session})
    branch = {"id": session, "rid": "turn", "offset": 20}
    ask(chunked_server, input_ids=[7, 8, 9], rid="branch", session_params=branch, n=2)
    assert chunked_server.http.post("/close_session", json={"session_id": session}).status_code == 200
    run = recorded(chunked_server)
    assert spans(run, "turn") == ["0-40 prefill", "40-43 decode"]
    assert spans(run, "branch") == ["0-20 reused from turn", "20-23 prefill", "23-24 decode"]


def test_a_segment_behind_a_flush_of_the_cache_reuses_nothing_older(chunked_server: LiveServer) -> None:
    ids = prompt(30)
    ask(chunked_server, input_ids=ids, rid="old", n=1)
    recorded(chunked_server)
    ask(chunked_server, input_ids=ids, rid="new", n=1)
    busy = chunked_server.admin.post("/probe/flush?cache=true")
    assert busy.status_code == 200
    ask(chunked_server, input_ids=ids, rid="newest", n=1)
    before, behind = load_run(busy.json()["segment"]), recorded(chunked_server)
    assert spans(before, "new") == ["0-29 reused from old", "29-30 prefill"]
    covered = before.tokens().set_index(["rid", "position"])["covered"]
    assert covered["new"].tolist() == [False] * 29 + [True] * (1 + EXTRA)
    with pytest.raises(RunDirectoryError, match="29 reused from entries whose forward pass is not in this run"):
        before.activations("new", "hook_embed")
    assert spans(behind, "newest") == ["0-30 prefill"]
    assert behind.tokens()["covered"].all()


def test_the_cache_is_not_flushed_below_a_running_request(chunked_server: LiveServer) -> None:
    with meanwhile(chunked_server, input_ids=prompt(30), rid="busy", n=300):
        answer = chunked_server.admin.post("/probe/flush?cache=true")
    assert (answer.status_code, answer.json()["flushed"]) == (409, False)
    assert spans(recorded(chunked_server), "busy") == ["0-30 prefill", "30-329 decode"]


def _pause_and_continue(server: LiveServer) -> None:
    assert server.http.post("/pause_generation", json={"mode": "retract"}).status_code == 200
    assert server.http.post("/continue_generation", json={}).status_code == 200

"""What others saw, against the ledger: true testimony holds, and each kind of false testimony is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.verify.check import Check
from sglang_probe.verify.witness import ask, read_witnesses
from tests.made_run import OUTPUTS, PROMPTS

DETAILS = {"device": 4, "host": 0}


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run()


def asked(run: Run, tmp_path: Path, *lines: Any) -> Check:
    file = tmp_path / "witness.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (check,) = ask(run, read_witnesses([str(file)]))
    return check


def stored(tokens: list[int], first: int, parent: int | None, block: int) -> list[dict[str, Any]]:
    """Pages of one token, hashes counted from `first`."""
    return [
        {
            "type": "BlockStored",
            "block_hashes": [block + i],
            "parent_block_hash": parent if i == 0 else block + i - 1,
            "token_ids": [t],
            "block_size": 1,
        }
        for i, t in enumerate(tokens[first:])
    ]


def batch(run: Run, events: list[dict[str, Any]], after: int = 0) -> list[Any]:
    """At the end of that forward."""
    forward = run.forwards().set_index("forward_id").loc[after]
    return [float(forward["launched"]), events]


def answer(rid: str, cached: int, **more: Any) -> dict[str, Any]:
    return {"text": "", "meta_info": {"id": rid, "cached_tokens": cached, **more}}


def test_answers_that_say_the_same_hold(run: Run, tmp_path: Path) -> None:
    check = asked(run, tmp_path, answer("a", 0), answer("b", 4, cached_tokens_details=DETAILS), answer("z", 9))
    assert (check.violation, check.covered) == (None, 2)
    assert check.note == "1 answers are of requests that this run does not have"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (answer("b", 3), "b: its answer says 3 cached tokens, and the ledger has 4 as reused"),
        (answer("a", 1), "a: its answer says 1 cached tokens, and the ledger has 0 as reused"),
        (
            answer("b", 4, cached_tokens_details={"device": 2, "host": 2}),
            "b: its answer says 2 cached tokens from the device, and the ledger has 4",
        ),
    ],
)
def test_an_answer_that_says_otherwise_is_named(run: Run, tmp_path: Path, line: Any, says: str) -> None:
    assert asked(run, tmp_path, line).violation == says


def test_events_of_what_was_reused_hold_and_so_do_those_in_pages_of_two(run: Run, tmp_path: Path) -> None:
    check = asked(run, tmp_path, batch(run, stored(PROMPTS["a"], 0, None, 100)))
    assert (check.violation, check.covered) == (None, 4)
    pages = [
        {
            "type": "BlockStored",
            "block_hashes": [1, 2],
            "parent_block_hash": None,
            "token_ids": PROMPTS["a"][:4],
            "block_size": 2,
        }
    ]
    check = asked(run, tmp_path, {"ts": batch(run, [])[0], "events": pages})
    assert (check.violation, check.covered) == (None, 2)


def test_a_page_that_no_event_stored_is_named(run: Run, tmp_path: Path) -> None:
    check = asked(run, tmp_path, batch(run, stored(PROMPTS["a"][:3], 0, None, 100)))
    says = "b: the ledger has positions up to 4 as reused by forward 1, and no event says that they were stored"
    assert check.violation == says
    other = [*PROMPTS["a"][:2], 49, *PROMPTS["a"][3:]]
    assert "positions up to 3" in (asked(run, tmp_path, batch(run, stored(other, 0, None, 100))).violation or "")


@pytest.mark.parametrize("event", [{"type": "BlockRemoved", "block_hashes": [102]}, {"type": "AllBlocksCleared"}])
def test_a_page_that_had_been_removed_long_before_is_named(run: Run, tmp_path: Path, event: dict[str, Any]) -> None:
    there = batch(run, stored(PROMPTS["a"], 0, None, 100))
    there[0] -= 10
    check = asked(run, tmp_path, there, [there[0] + 1, [event]])
    assert "the events say they were removed" in (check.violation or "")
    again = [there[0] + 2, stored(PROMPTS["a"], 0, None, 200)]
    assert asked(run, tmp_path, there, [there[0] + 1, [event]], again).holds


def test_a_page_that_two_namespaces_hold_is_there_until_both_have_gone(run: Run, tmp_path: Path) -> None:
    there = batch(run, stored(PROMPTS["a"], 0, None, 100) + stored(PROMPTS["a"], 0, None, 200))
    there[0] -= 10
    gone = [there[0] + 1, [{"type": "BlockRemoved", "block_hashes": [100, 101, 102, 103]}]]
    assert asked(run, tmp_path, there, gone).holds
    both = [there[0] + 2, [{"type": "BlockRemoved", "block_hashes": [203]}]]
    assert "positions up to 4" in (asked(run, tmp_path, there, gone, both).violation or "")


def test_host_memory_is_not_the_device(run: Run, tmp_path: Path) -> None:
    events = [{**e, "medium": "CPU_PINNED"} for e in stored(PROMPTS["a"], 0, None, 100)]
    assert not asked(run, tmp_path, batch(run, events)).holds


def scrape(prompt: int, generated: int, cached: int, requests: int) -> str:
    return (
        "# HELP sglang:prompt_tokens_total x\n"
        f'sglang:prompt_tokens_total{{model_name="m",is_streaming="true"}} {prompt - 2}.0\n'
        f'sglang:prompt_tokens_total{{model_name="m",is_streaming="false"}} 2.0\n'
        f'sglang:generation_tokens_total{{model_name="m"}} {generated}.0\n'
        f'sglang:cached_tokens_total{{cache_source="device"}} {cached}.0\n'
        f'sglang:num_requests_total{{model_name="m"}} {requests}.0\n'
    )


def metrics(run: Run, tmp_path: Path, *after: int) -> Check:
    (tmp_path / "one").write_text(scrape(100, 50, 7, 3))
    (tmp_path / "two").write_text(scrape(100 + after[0], 50 + after[1], 7 + after[2], 3 + after[3]))
    (check,) = ask(run, read_witnesses([f"before={tmp_path / 'one'}", f"after={tmp_path / 'two'}"]))
    return check


def test_counters_that_grew_by_the_ledger_hold_and_each_that_did_not_is_named(run: Run, tmp_path: Path) -> None:
    true = [12, sum(map(len, OUTPUTS.values())), 4, 2]
    assert metrics(run, tmp_path, *true).holds
    words = ["prompt_tokens", "generation_tokens", "cached_tokens", "num_requests"]
    for i, word in enumerate(words):
        wrong = [n + (i == j) for j, n in enumerate(true)]
        assert f"`sglang:{word}_total` grew by {wrong[i]}, and the ledger has {true[i]}" in (
            metrics(run, tmp_path, *wrong).violation or ""
        )


def test_what_the_canary_saw_is_said(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    line = "INFO [canary] step=%d protected_tokens=9 sweep_passes=1 violations=%d launch_tags_active=1/4\n"
    log.write_text("[2026-11-27 00:00:00] starting\n" + line % (10, 0) + line % (20, 0))
    (check,) = ask(run, read_witnesses([str(log)]))
    assert (check.holds, check.covered) == (True, 2)
    log.write_text(line % (10, 0) + line % (20, 3))
    (check,) = ask(run, read_witnesses([str(log)]))
    assert check.violation == "at step 20 the canary had seen 3 violations"


@pytest.mark.parametrize(
    ("text", "says"), [("hello\n", "no testimony"), ("{}\n", "line 1"), ("[1]\n", "line 1"), ("[x\n", "line 1")]
)
def test_what_is_no_witness_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "w").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_witnesses([str(tmp_path / "w")])


def test_one_scrape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_text(scrape(3, 2, 1, 1))
    with pytest.raises(ConfigError, match="one scrape"):
        read_witnesses([f"before={tmp_path / 'w'}"])


def test_a_witness_that_speaks_of_nothing_of_the_run_does_not_hold(run: Run, tmp_path: Path) -> None:
    check = asked(run, tmp_path, answer("z", 9))
    assert (check.violation, check.covered) == ("no answer is of a request of this run: nothing was compared", 0)
    (tmp_path / "one").write_text(scrape(1, 1, 1, 1))
    (tmp_path / "two").write_text("sglang:num_running_reqs 1\n")
    (check,) = ask(run, read_witnesses([f"before={tmp_path / 'one'}", f"after={tmp_path / 'two'}"]))
    assert check.violation == "the second scrape has none of SGLang's counters: nothing was compared"
    log = tmp_path / "server.log"
    log.write_text("server_args=ServerArgs(kv_canary='sweep')\n")
    with pytest.raises(ConfigError, match=r"server\.log names the canary and has no report"):
        read_witnesses([str(log)])


def test_events_of_a_run_that_reused_nothing_must_be_of_its_pages(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(cache=False)
    theirs = batch(run, stored([47, 48, 49], 0, None, 100))
    theirs[0] -= 1000
    check = asked(run, tmp_path, theirs)
    assert (check.violation, check.covered) == ("no event is of a page of this run: nothing was compared", 0)
    check = asked(run, tmp_path, batch(run, stored(PROMPTS["a"], 0, None, 100)))
    assert (check.violation, check.covered) == (None, len(PROMPTS["a"]))
    assert "the run reused none" in (check.note or "")


def test_events_of_a_run_without_token_ids_compare_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = run.requests().assign(prompt_ids=None)
    monkeypatch.setattr(Run, "requests", lambda self, **_: hashed)
    check = asked(run, tmp_path, batch(run, stored(PROMPTS["a"], 0, None, 100)))
    assert "the run has no token ids" in (check.violation or "")

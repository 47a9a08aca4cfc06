"""What is read from a server's answers, and what is asked of it, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_probe.errors import ConfigError, WorkloadError
from sglang_probe.gate.client import Client, RefusedError, read_answer
from sglang_probe.gate.prompts import LEAST_TAIL, built_in, from_file

TOLD: dict[str, Any] = {
    "text": "x",
    "meta_info": {
        "id": "r",
        "cached_tokens": 3,
        "finish_reason": {"type": "length"},
        "input_token_logprobs": [[None, 12, None], [-0.5, 13, None], [-0.25, 14, None]],
        "output_token_logprobs": [[-0.1, 7, None]],
        "output_top_logprobs": [[[-0.1, 7, None], [-3.0, 8, None]]],
        "probe": [{"status": "reused", "start": 0, "end": 3, "origin": "a"}],
    },
}


def told(**meta: Any) -> dict[str, Any]:
    return {"meta_info": {**TOLD["meta_info"], **meta}}


def test_an_answer_has_the_tail_the_tokens_and_what_was_reused() -> None:
    a = read_answer(TOLD, (10, 11, 12, 13, 14), 3)
    np.testing.assert_array_equal(a.prompt, [-0.5, -0.25])
    assert (a.cached, a.output, a.top[0][8], a.origin[0]["origin"]) == (3, (7,), -3.0, "a")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (told(input_token_logprobs=[[None, 12, None], [-0.5, 99, None], [-0.25, 14, None]]), "other tokens"),
        (told(input_token_logprobs=None), "0 of 2"),
        (told(output_token_logprobs=None), "no log-probabilities"),
        (told(finish_reason={"type": "abort", "message": "full"}), "full"),
        ({"text": "x"}, "no log-probabilities"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_refused(answer: dict[str, Any], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        read_answer(answer, (10, 11, 12, 13, 14), 3)


def test_log_probabilities_that_are_null_are_no_numbers_and_no_refusal() -> None:
    nulls = [[None, 12, None], [None, 13, None], [-0.25, 14, None]]
    a = read_answer(told(input_token_logprobs=nulls, output_token_logprobs=[[None, 7, None]]), (10, 11, 12, 13, 14), 3)
    np.testing.assert_array_equal(a.prompt, [np.nan, -0.25])
    whole = [[-0.5, 13, None], [-0.25, 14, None]]
    null = [[None, 13, None], [-0.25, 14, None]]  # an answer without the entry at the border
    for given, first in ((whole, -0.5), (null, np.nan)):
        b = read_answer(told(input_token_logprobs=given), (10, 11, 12, 13, 14), 3)
        np.testing.assert_array_equal(b.prompt, [first, -0.25])
    assert np.isnan(a.chosen).tolist() == [True]
    assert not a.finite
    assert read_answer(TOLD, (10, 11, 12, 13, 14), 3).finite


@pytest.mark.parametrize("new", [1, 2])
def test_fewer_tokens_than_asked_for_are_no_answer(new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "call", lambda *_args, **_more: told(finish_reason={"type": "stop"}))
    client = Client("http://127.0.0.1:1")
    if new == 1:
        assert client.ask((10, 11, 12, 13, 14), new=new, start=2).output == (7,)
        return
    with pytest.raises(RefusedError, match=r"1 of 2 tokens came back \(`finish_reason: stop`\)"):
        client.ask((10, 11, 12, 13, 14), new=new, start=2)


@pytest.mark.parametrize("url", ["localhost:30000", "ftp://a", "http://u:p@a", "http://a:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        Client(url)


def test_an_address_may_be_written_as_openai_clients_write_it() -> None:
    assert Client("http://a:1/v1/").url == "http://a:1"


def letters(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_built_in_cases_share_a_prefix_and_nothing_after_it() -> None:
    cases = built_in(4, 192, letters)
    for c in cases:
        assert "".join(map(chr, c.prompt)).startswith("Deliveries of depot")
        assert min(map(len, (c.tail, c.seed, c.further))) >= LEAST_TAIL
        assert c.tail[0] != c.seed[0]
    assert len({c.prefix[:40] for c in cases}) == 4  # no case reuses another's
    assert built_in(4, 192, letters) == cases


def test_a_file_gives_prompts_as_text_or_ids(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        "\n".join(json.dumps(p) for p in ({"prompt": "a" * 80}, {"prompt_ids": [1] * 100}, {"text": "b" * 90}))
    )
    cases = from_file(file, letters, most=9)
    assert [len(c.prefix) for c in cases] == [60, 75, 67]
    assert cases[0].seed == cases[1].tail


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1: no JSON"),
        ('{"messages": []}', "chat template"),
        ('{"prompt_ids": [1, -2]}', "no list of token ids"),
        ('{"prompt": "short"}', "5 tokens"),
        ("{}", "neither"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(WorkloadError, match=says):
        from_file(tmp_path / "p.jsonl", letters, most=9)

"""Records in the forms that people have them: public chat logs, batch files, token ids, and what is refused of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sglang_probe.errors import WorkloadError
from sglang_probe.workload.build import build_requests
from sglang_probe.workload.jsonl import Jsonl
from sglang_probe.workload.request import Conversation, LabelSpan, SegmentSpan
from sglang_probe.workload.sharegpt import ShareGpt
from sglang_probe.workload.sources import SourceReport

WriteLines = Callable[[Sequence[Any]], Path]
QA = [("user", "q"), ("assistant", "a")]


@pytest.fixture
def read(write_lines: WriteLines) -> Callable[..., list[Conversation]]:
    def one(record: Any, kind: Any = Jsonl, **options: Any) -> list[Conversation]:
        return list(kind(path=write_lines([record]), **options).conversations(SourceReport()))

    return one


@pytest.mark.parametrize("turns", ["conversations", "conversation", "items", "messages"])
@pytest.mark.parametrize(("who", "what"), [("from", "value"), ("role", "content")])
@pytest.mark.parametrize(
    ("user", "assistant"),
    [("human", "gpt"), ("user", "assistant"), ("Human", "GPT"), ("human", "chatgpt"), ("USER", "bard")],
)
def test_public_files_name_speakers_turns_and_keys_differently(
    read: Callable[..., list[Conversation]], turns: str, who: str, what: str, user: str, assistant: str
) -> None:
    record = {turns: [{who: user, what: "q"}, {who: assistant, what: "a"}], "id": 1, "model": "m", "source": "s"}
    (found,) = read(record, ShareGpt)
    assert [(s.name, s.role, s.text) for s in found.segments] == [("user", "user", "q")]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_turns_is_the_system_message(
    read: Callable[..., list[Conversation]], key: str
) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (found,) = read({"conversations": turns, key: "You are a pirate.", "tools": "[]"}, ShareGpt)
    assert [(s.role, s.text) for s in found.segments] == [("system", "You are a pirate."), ("user", "q")]
    (found,) = read({"conversations": turns, key: ""}, ShareGpt)
    assert [s.role for s in found.segments] == ["user"]


def test_tools_and_their_turns_are_refused_by_name(read: Callable[..., list[Conversation]]) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(WorkloadError, match="a turn is from `function_call`: tools are not supported"):
        read({"conversations": turns}, ShareGpt)
    with pytest.raises(WorkloadError, match="unknown key `tools`: tools are not supported"):
        read({"conversations": turns, "tools": [{"name": "f"}]}, ShareGpt)
    with pytest.raises(WorkloadError, match=r"`messages\.0\.tool_calls`: tool calls are not supported"):
        read({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]})


def test_other_keys_are_refused_until_they_are_said_to_reach_no_prompt(
    read: Callable[..., list[Conversation]],
) -> None:
    record = {"messages": [{"role": "user", "content": "q", "toxic": False}], "redacted": True}
    with pytest.raises(WorkloadError, match=r"unknown key `messages\.0\.toxic`"):
        read(record)
    (found,) = read(record, ignore_keys=["toxic", "redacted"])
    assert found.segments[0].text == "q"


@pytest.mark.parametrize("key", ["prompt", "messages", "input_ids"])
def test_a_key_that_is_read_cannot_be_ignored(read: Callable[..., list[Conversation]], key: str) -> None:
    with pytest.raises(WorkloadError, match=f"`ignore_keys: {key}`: this source reads it"):
        read({"prompt": "a"}, ignore_keys=[key])


def test_a_key_with_null_says_nothing(read: Callable[..., list[Conversation]]) -> None:
    message = {"role": "user", "content": "q", "name": None, "tool_calls": None}
    (found,) = read({"messages": [message], "prompt": None, "sampling_params": None, "whatever": None})
    assert found.segments[0].text == "q"


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"text": "a"}, "unknown key `text`: did you mean `prompt`?"),
        ({"tokens": [1]}, "unknown key `tokens`: did you mean `prompt_ids`?"),
        ({"prompt": "a", "completion": "b"}, "unknown key `completion`: it is no part of the prompt"),
        ({"conversations": [{"from": "human"}]}, "that is ShareGPT's form: `source: sharegpt`"),
        ({"messages": [{"role": "user", "content": "a"}], "temperature": 1}, "go into `sampling_params`"),
        ({"prompt": "a", "sampling_parms": {"n": 1}}, "did you mean `sampling_params`?"),
        ({"messages": [{"role": "user", "contents": "a"}]}, "`messages.0.contents`; did you mean `content`?"),
        ({"prompt": "a", "contents": "a"}, "`contents`; known keys: add_generation_prompt"),
    ],
)
def test_hints_name_keys_of_the_same_level(
    read: Callable[..., list[Conversation]], record: dict[str, Any], hint: str
) -> None:
    with pytest.raises(WorkloadError) as e:
        read(record)
    assert hint in e.value.message


BATCH = {"custom_id": "q1", "method": "POST", "url": "/v1/chat/completions"}


def test_a_line_of_a_batch_file_is_its_body_with_sglangs_names(read: Callable[..., list[Conversation]]) -> None:
    body = {
        "model": "gpt-x",
        "messages": [{"role": "user", "content": "q"}],
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["x"],
        "response_format": {"type": "json_object"},
        "tools": [],
        "stream": False,
    }
    (found,) = read({**BATCH, "body": body})
    assert [(s.role, s.text) for s in found.segments] == [("user", "q")]
    assert found.sampling_params == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "sampling_seed": 3,
        "stop": ["x"],
        "json_schema": '{"type": "object"}',
    }
    (found,) = read({**BATCH, "url": "/v1/completions", "body": {"prompt": [4, 5]}})
    assert found.rendered is not None
    assert found.rendered.prompt_ids == (4, 5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": [], "tools": [{"type": "function"}]}, "`body.tools` is not supported"),
        ({"messages": [], "logprobs": True}, "`body.logprobs` is not supported"),
        ("x", "`body` is a JSON object"),
    ],
)
def test_what_a_body_asks_and_cannot_have_is_named(
    read: Callable[..., list[Conversation]], body: Any, said: str
) -> None:
    with pytest.raises(WorkloadError, match=said):
        read({**BATCH, "body": body})


def test_a_prompt_may_be_a_chat_or_token_ids(read: Callable[..., list[Conversation]]) -> None:
    (chat,) = read({"prompt": [{"role": "user", "content": "q"}]})
    assert (chat.segments[0].role, chat.segments[0].text) == ("user", "q")
    (ids,) = read({"prompt": [7, 8]})
    assert ids.rendered is not None
    assert ids.rendered.prompt_ids == (7, 8)


@pytest.mark.parametrize("key", ["prompt_ids", "input_ids"])
def test_token_ids_are_served_verbatim_with_the_segments_that_are_given(
    tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines, key: str
) -> None:
    ids = [1, 1, 300, 301, 2, 302]
    lines = [
        {key: ids},
        {key: ids, "segments": [[0, 2, "special"], [2, 4, "document"]], "labels": {"e": [[2, 3, "x"]]}},
        {key: ids, "segments": [{"name": "document", "start": 1, "end": 6}]},
    ]
    source = Jsonl(path=write_lines(lines))
    bare, named, listed = build_requests(source, tokenizer, context_length=None, default_sampling={}).requests
    assert {r.prompt_ids for r in (bare, named, listed)} == {tuple(ids)}
    assert bare.spans == (SegmentSpan("prompt", 0, 6),)
    assert named.spans == (SegmentSpan("special", 0, 2), SegmentSpan("document", 2, 4), SegmentSpan("prompt", 4, 6))
    assert named.labels == (LabelSpan("e", "x", 2, 3),)
    assert listed.spans == (SegmentSpan("prompt", 0, 1), SegmentSpan("document", 1, 6))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt_ids": [1], "input_ids": [1]}, "either `prompt_ids` or `input_ids`"),
        ({"prompt_ids": [1], "prompt": "a"}, "give one of `messages`, `prompt` and `prompt_ids`"),
        ({"prompt_ids": [1.5]}, "`prompt_ids.0`"),
        ({"prompt_ids": [True]}, "`prompt_ids.0`"),
        ({"prompt_ids": ["1"]}, "`prompt_ids.0`"),
        ({"prompt_ids": [1, 2], "segments": [[0, 2, "a"], [1, 2, "b"]]}, r"\[1, 2\) is not within \[2, 2\)"),
        ({"prompt_ids": [1, 2], "segments": [[1, 1, "a"]]}, "or is empty"),
        ({"prompt": "a", "segments": [[0, 1, "a"]]}, "`segments` are spans of `prompt_ids`"),
        ({"prompt_ids": [1], "add_special_tokens": True}, "no meaning beside `prompt_ids`"),
        ({"prompt_ids": [1, 2], "labels": {"e": [[0, 2, "x"], [1, 2, "y"]]}}, "overlap at token 1"),
    ],
)
def test_token_ids_that_make_no_sense_are_refused(
    read: Callable[..., list[Conversation]], record: dict[str, Any], said: str
) -> None:
    with pytest.raises(WorkloadError, match=said):
        read(record)

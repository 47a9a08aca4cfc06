"""A record that cannot be used is named by file and line, or passed over and counted by its reason; whatever it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sglang_probe.errors import WorkloadError
from sglang_probe.workload.build import Workload, build_requests
from sglang_probe.workload.jsonl import Jsonl
from sglang_probe.workload.sharegpt import ShareGpt

WriteLines = Callable[[Sequence[Any]], Path]
GOOD = {"messages": [{"role": "user", "content": "hi"}]}
SHARED = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content if m.content != 'CHANGED' else 'other' }}<|end|>{% endfor %}"
)


def chat(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.fixture
def build(with_template: Callable[[str | None], PreTrainedTokenizerFast]) -> Callable[..., Workload]:
    def make(source: Jsonl | ShareGpt) -> Workload:
        return build_requests(
            source, with_template(NO_SYSTEM), context_length=64, default_sampling={"max_new_tokens": 4}
        )

    return make


JSONL = [
    ("{", "not JSON"),
    ('{"prompt": "a", "prompt": "b"}', "not JSON"),
    ([1], "not a JSON object"),
    ({"promt": "a"}, "unknown key"),
    ({}, "bad value"),
    ({"prompt": 7}, "bad value"),
    ({"prompt": ""}, "empty prompt"),
    (chat(("user", None)), "bad value"),
    ({"prompt": "a", "labels": {"x": [[0, 9, "y"]]}}, "bad value"),
    ({"prompt_ids": []}, "bad value"),
    ({"prompt_ids": [1, 2], "segments": [[0, 3, "a"]]}, "bad value"),
    ({"prompt_ids": [1] * 80}, "too long"),
    ({"prompt": "\x00" * 80}, "too long"),
    ({"prompt": "a", "sampling_params": {"max_new_tokens": 200}}, "too long"),
    ({"prompt": "a", "sampling_params": {"max_new_tokens": "8"}}, "sampling value"),
    (chat(("system", "s"), ("user", "hi")), "template"),
    (chat(("user", "CHANGED")), "template"),
    ({**GOOD, "chat_template_kwargs": {"enable_thinking": False}}, "template"),
    ({**GOOD, "chat_template_kwargs": {"tools": []}}, "bad value"),
    ({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "a"}}, "bad value"),
]
SHAREGPT = [
    ({"conversations": [{"from": "human", "value": "q"}]}, "no answer"),
    ({"conversations": [{"from": "observation", "value": "q"}]}, "tools"),
    ({"conversations": [{"from": "bart", "value": "q"}]}, "unknown speaker"),
    ({**SHARED, "tools": '[{"name": "f"}]'}, "unknown key"),
    (
        {"conversations": [{"from": "system", "value": "a"}, *SHARED["conversations"]], "system": "b"},
        "two system prompts",
    ),
    ({"conversations": [{"from": "human", "value": "\x00" * 80}, {"from": "gpt", "value": "a"}]}, "too long"),
    ({"conversations": [{"from": "human", "value": "CHANGED"}, {"from": "gpt", "value": "a"}]}, "template"),
]


@pytest.mark.parametrize(
    ("kind", "good", "record", "reason"),
    [(Jsonl, GOOD, *case) for case in JSONL] + [(ShareGpt, SHARED, *case) for case in SHAREGPT],
)
def test_whatever_is_wrong_with_a_record(
    build: Callable[..., Workload], write_lines: WriteLines, kind: Any, good: Any, record: Any, reason: str
) -> None:
    path = write_lines([good, "", record, good])
    with pytest.raises(WorkloadError) as e:
        build(kind(path=path))
    assert e.value.message.startswith(f"{path}:3: ")
    assert "skip_bad: true" in (e.value.fix or "")

    found = build(kind(path=path, skip_bad=True))
    assert found.reasons == {reason: 1}
    assert found.skipped == 1
    assert found.examples[reason].startswith(f"{path}:3: ")
    assert [r.rid for r in found.requests] == ["r000000", "r000001"]


def test_a_file_of_which_nothing_can_be_used_is_an_error_with_the_first_of_each_reason(
    build: Callable[..., Workload], write_lines: WriteLines
) -> None:
    path = write_lines([{"prompt": "\x00" * 80}, {"prompt": "\x00" * 90}, {"promt": "a"}])
    with pytest.raises(WorkloadError) as e:
        build(Jsonl(path=path, skip_bad=True))
    assert f"of {path} no record can be used (2 too long, 1 unknown key)" in e.value.message
    assert f"too long: {path}:1: 80 prompt tokens" in e.value.message
    assert f"unknown key: {path}:3: unknown key `promt`" in e.value.message
    assert f"{path}:2" not in e.value.message


def test_the_reasons_are_told_in_words(build: Callable[..., Workload], write_lines: WriteLines) -> None:
    found = build(Jsonl(path=write_lines([GOOD, "{", "{", {"promt": 1}]), skip_bad=True))
    assert found.skipped_in_words == "3 records were skipped: 2 not JSON, 1 unknown key"
    assert build(Jsonl(path=write_lines([GOOD]))).skipped_in_words == ""


def test_a_limit_counts_requests_and_not_what_is_passed_over(
    build: Callable[..., Workload], write_lines: WriteLines
) -> None:
    long = {"prompt": "\x00" * 80}
    found = build(Jsonl(path=write_lines([long, GOOD, long, GOOD, long, GOOD]), skip_bad=True, limit=2))
    assert (len(found.requests), found.reasons) == (2, {"too long": 2})


def test_one_turn_that_does_not_fit_leaves_those_before_it(build: Callable[..., Workload], tmp_path: Path) -> None:
    turns = [("human", "q"), ("gpt", "a"), ("human", "\x00" * 80), ("gpt", "b")]
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"conversations": [{"from": who, "value": text} for who, text in turns]}]))
    found = build(ShareGpt(path=path, skip_bad=True, turns="all"))
    assert (len(found.requests), found.reasons) == (1, {"too long": 1})
    assert found.examples["too long"].startswith(f"{path}: record 1: ")

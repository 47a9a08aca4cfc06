"""`jsonl` and `sharegpt` read what they understand, and name the place of what they do not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.errors import WorkloadError
from sglang_probe.workload.jsonl import Jsonl
from sglang_probe.workload.request import Conversation, Label, Segment
from sglang_probe.workload.sharegpt import ShareGpt
from sglang_probe.workload.sources import SourceReport

WriteLines = Callable[[Sequence[Any]], Path]

GOOD = {"prompt": "import json"}


def read(source: Jsonl | ShareGpt) -> list[Conversation]:
    return list(source.conversations(SourceReport()))


def share(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


DIALOGUE = share(("system", "S"), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2"))


def test_a_plain_prompt_is_one_segment_without_a_role(write_lines: WriteLines) -> None:
    line = {"prompt": "x", "family": "f", "sampling_params": {"max_new_tokens": 3}, "id": 7}
    assert read(Jsonl(path=write_lines([line]))) == [
        Conversation((Segment("prompt", "x"),), "f", {"max_new_tokens": 3}),
    ]


def test_a_message_is_named_by_its_segment_key_or_else_its_role(write_lines: WriteLines) -> None:
    messages = [{"role": "user", "content": "a", "segment": "document"}, {"role": "assistant", "content": "b"}]
    (found,) = read(Jsonl(path=write_lines([{"messages": messages}])))
    assert found.segments == (Segment("document", "a", "user", 0), Segment("assistant", "b", "assistant", 1))


def test_text_parts_are_joined(write_lines: WriteLines) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (found,) = read(Jsonl(path=write_lines([{"messages": [{"role": "user", "content": parts}]}])))
    assert found.segments[0].text == "ab"


def test_labels_are_character_spans_of_a_content_or_a_prompt(write_lines: WriteLines) -> None:
    labels = {"entity": [[0, 3, "person"]]}
    lines = [
        {"messages": [{"role": "user", "content": "Ada wrote.", "labels": labels}]},
        {"prompt": "Ada", "labels": labels},
    ]
    chat, plain = read(Jsonl(path=write_lines(lines)))
    assert chat.segments[0].labels == plain.segments[0].labels == (Label("entity", "person", 0, 3),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "Ada", "labels": {"entity": [[0, 4, "person"]]}}, "no characters 0 to 4 in a text of 3"),
        ({"prompt": "Ada", "labels": {"entity": [[1, 1, "person"]]}}, "no characters 1 to 1"),
        ({"prompt": "Ada", "labels": {"position": [[0, 1, "x"]]}}, "`position` is an axis that every run has"),
        ({"messages": [{"role": "user", "content": "a"}], "labels": {"e": []}}, "belong to its messages"),
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ({}, "give one of `messages`, `prompt` and `prompt_ids`"),
        (
            {"messages": [{"role": "user", "content": "a"}], "prompt": "b"},
            "give one of `messages`, `prompt` and `prompt_ids`",
        ),
        ({"messages": []}, "`messages`: List should have at least 1 item"),
        ({"promt": "x"}, "unknown key `promt`; did you mean `prompt`?"),
        ({"prompt": "x", "tools": [{"name": "f"}]}, "unknown key `tools`: tools are not supported"),
        ({"messages": [{"role": "user", "content": None}]}, "`messages.0.content`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text parts are supported"),
        ({"messages": [{"role": "user", "content": "a", "segment": "special"}]}, "`special` names tokens that"),
        ('{"prompt": "\\ud800"}', "lone surrogate at character 0"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_number(write_lines: WriteLines, line: Any, message: str) -> None:
    path = write_lines([GOOD, "", line])
    with pytest.raises(WorkloadError) as e:
        read(Jsonl(path=path))
    assert f"{path}:3:" in str(e.value)
    assert message in str(e.value)


def test_a_line_that_is_not_utf8_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(WorkloadError, match=r"latin1\.jsonl:2: not valid JSON"):
        read(Jsonl(path=path))


def test_a_message_quoting_a_long_value_stays_short(write_lines: WriteLines) -> None:
    with pytest.raises(WorkloadError) as e:
        read(Jsonl(path=write_lines([{"prompt": ["x" * 10_000]}])))
    assert len(str(e.value)) < 1000


def test_skip_bad_counts_what_it_passes_over(write_lines: WriteLines) -> None:
    report = SourceReport()
    source = Jsonl(path=write_lines([GOOD, "{", {"promt": "x"}, GOOD]), skip_bad=True)
    assert len(list(source.conversations(report))) == 2
    assert report.skipped == 2


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert [c.segments[0].text for c in read(Jsonl(path=path))] == ["a", "b"]


def test_limit_stops_before_later_lines_are_judged(write_lines: WriteLines) -> None:
    assert len(read(Jsonl(path=write_lines([GOOD, GOOD, "{"]), limit=2))) == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"cannot read .*none\.jsonl: No such file"):
        read(Jsonl(path=tmp_path / "none.jsonl"))


def test_a_sharegpt_request_ends_before_the_last_answer(write_lines: WriteLines) -> None:
    (found,) = read(ShareGpt(path=write_lines([DIALOGUE])))
    assert [(s.role, s.text) for s in found.segments] == [
        ("system", "S"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
    ]


def test_all_turns_give_one_request_per_answer_and_are_a_family(write_lines: WriteLines) -> None:
    found = read(ShareGpt(path=write_lines([DIALOGUE, DIALOGUE]), turns="all"))
    assert [len(c.segments) for c in found] == [2, 4, 2, 4]
    assert [c.family for c in found] == ["record-1", "record-1", "record-2", "record-2"]


def test_sharegpt_reads_a_json_list_as_it_reads_lines(write_lines: WriteLines, tmp_path: Path) -> None:
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([DIALOGUE, DIALOGUE], indent=1))
    assert read(ShareGpt(path=listed)) == read(ShareGpt(path=write_lines([DIALOGUE, DIALOGUE])))


def test_turns_after_the_last_answer_and_answers_to_nobody_are_left_out(write_lines: WriteLines) -> None:
    record = share(("gpt", "hello"), ("human", "q"), ("gpt", "a"), ("gpt", "more"), ("human", "bye"))
    found = read(ShareGpt(path=write_lines([record]), turns="all"))
    assert [c.segments[-1].text for c in found] == ["q"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (share(("human", "q")), "no turn of the assistant (`gpt`) answers one of the user"),
        (share(), "no turn of the assistant (`gpt`) answers one of the user"),
        (share(("human", "q"), ("bart", "a")), "a turn is from `bart`, which is none of system, human"),
        ({"dialogue": []}, "`conversations` is required"),
    ],
)
def test_a_bad_sharegpt_record_is_refused_or_counted(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([DIALOGUE, record]))
    with pytest.raises(WorkloadError) as e:
        read(ShareGpt(path=path))
    assert f"{path}: record 2:" in str(e.value)
    assert message in str(e.value)

    report = SourceReport()
    assert len(list(ShareGpt(path=path, skip_bad=True).conversations(report))) == 1
    assert report.skipped == 1


def test_shuffling_depends_on_the_seed_alone_and_comes_before_the_limit(write_lines: WriteLines) -> None:
    path = write_lines([share(("human", str(i)), ("gpt", "a")) for i in range(50)])

    def first_five(**options: Any) -> list[str]:
        return [c.segments[0].text for c in read(ShareGpt(path=path, limit=5, **options))]

    assert first_five() == ["0", "1", "2", "3", "4"]
    assert first_five(shuffle=True, seed=3) == first_five(shuffle=True, seed=3)
    assert first_five(shuffle=True, seed=3) != first_five(shuffle=True, seed=4)
    assert max(map(int, first_five(shuffle=True, seed=3))) > 4

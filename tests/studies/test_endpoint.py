"""Every answer of an endpoint is kept and asked once; what goes wrong is said with what to do; a key stays a secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.studies.endpoint import KEY_VARIABLE, TRIES, Endpoint
from tests.studies.features.stub_judge import StubJudge

QUESTIONS = [[{"role": "user", "content": f"question {i}"}] for i in range(6)]


def echo(body: dict) -> str:
    return f"to {body['messages'][-1]['content']}\u2028 and more"


def test_answers_are_kept_and_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with StubJudge(echo) as judge:
        first = Endpoint(judge.url, None, file)
        assert first.ask(QUESTIONS[:3], most_tokens=9) == [f"to question {i}\u2028 and more" for i in range(3)]
        file.write_text(file.read_text() + '{"key": "cut sho')  # a kill in the middle of a line
        second = Endpoint(judge.url, "stub", file)
        assert second.ask([*QUESTIONS, QUESTIONS[0]], most_tokens=9)[5:] == [
            "to question 5\u2028 and more",
            "to question 0\u2028 and more",
        ]
        assert (second.asked, len(judge.asked)) == (3, 6)
        # Another setting is another question, and so is another model.
        second.ask(QUESTIONS[:1], most_tokens=10)
        assert second.asked == 4
        assert Endpoint(judge.url, "stub", file).ask(QUESTIONS, most_tokens=9) == second.ask(QUESTIONS, most_tokens=9)
        assert len(judge.asked) == 7
    kept = [json.loads(line) for line in file.read_text().split("\n") if line.endswith("}")]
    assert {k["messages"][0]["content"] for k in kept} == {f"question {i}" for i in range(6)}
    assert {(k["model"], k["temperature"], k["weights_sha256"]) for k in kept} == {("stub", 0, None)}


def test_a_question_that_fails_costs_none_of_those_before(tmp_path: Path) -> None:
    with StubJudge(echo) as judge:
        judge.before = lambda path: (400, {}, '{"error": {"message": "too long"}}') if len(judge.asked) > 3 else None
        endpoint = Endpoint(judge.url, None, tmp_path / "a.jsonl", concurrency=1)
        with pytest.raises(ConfigError, match="answers 400: too long") as refused:
            endpoint.ask(QUESTIONS, most_tokens=9)
        assert "--label-examples" in str(refused.value.fix)
        judge.before = lambda path: None
        again = Endpoint(judge.url, None, tmp_path / "a.jsonl")
        assert len(again.ask(QUESTIONS, most_tokens=9)) == 6
        assert again.asked == 3


def test_a_busy_endpoint_is_asked_again_after_as_long_as_it_says(tmp_path: Path) -> None:
    waited: list[float] = []
    with StubJudge(echo) as judge:
        judge.before = lambda path: (429, {"Retry-After": "7"}, "busy") if len(judge.asked) == 1 else None
        endpoint = Endpoint(judge.url, None, tmp_path / "a.jsonl", sleep=waited.append)
        endpoint.ask(QUESTIONS[:1], most_tokens=9)
        assert waited == [7.0]
        judge.before = lambda path: (503, {}, "no")
        with pytest.raises(ConfigError, match="answers 503: no"):
            endpoint.ask(QUESTIONS[1:2], most_tokens=9)
        assert waited[1:] == [1.0, 2.0, 4.0, 8.0]
        assert len(judge.asked) == 2 + TRIES


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StubJudge(echo) as judge:
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        Endpoint(judge.url, None, tmp_path / "a.jsonl").ask(QUESTIONS[:1], most_tokens=9)
        judge.before = lambda path: (401, {}, '{"error": "who are you"}')
        with pytest.raises(ConfigError) as refused:
            Endpoint(judge.url, None, tmp_path / "a.jsonl").ask(QUESTIONS[1:2], most_tokens=9)
        assert f"is missing: set the environment variable {KEY_VARIABLE}" in str(refused.value.fix)
        judge.before = lambda path: None
        monkeypatch.setenv("MINE", "sesame")
        Endpoint(judge.url, None, tmp_path / "a.jsonl", key_variable="MINE").ask(QUESTIONS[1:2], most_tokens=9)
        assert judge.keys == [None, None, "Bearer sesame"]
        assert "sesame" not in (tmp_path / "a.jsonl").read_text()


def test_a_key_is_not_carried_to_where_a_redirection_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    with StubJudge(echo) as judge, StubJudge(echo) as elsewhere:
        endpoint = Endpoint(judge.url, None, tmp_path / "a.jsonl")
        for status in (302, 307):
            judge.before = lambda path, status=status: (status, {"Location": f"{elsewhere.url}/models"}, "")
            with pytest.raises(ConfigError) as refused:
                endpoint.ask(QUESTIONS[:1], most_tokens=9)
            assert elsewhere.url in str(refused.value.fix)
        assert elsewhere.looked == elsewhere.keys == []


def test_what_is_no_endpoint_is_said_to_be_none(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with StubJudge(models=("a", "b")) as judge:
        with pytest.raises(ConfigError, match="2 models: `a`, `b`"):
            Endpoint(judge.url, None, file)
        with pytest.raises(ConfigError, match="no model `c`") as refused:
            Endpoint(judge.url, "c", file)
        assert "`a`, `b`" in str(refused.value.fix)
        judge.before = lambda path: (200, {}, '{"answer": 42}')
        with pytest.raises(ConfigError, match="does not answer as a chat endpoint"):
            Endpoint(judge.url, "a", file).ask(QUESTIONS[:1], most_tokens=9)
    with pytest.raises(ConfigError, match="no answer from") as refused:
        Endpoint(judge.url, "a", file)
    assert "/v1" in str(refused.value.fix)
    for url in ("127.0.0.1:30000", "ftp://x/v1"):
        with pytest.raises(ConfigError, match="no address"):
            Endpoint(url, None, file)
    with pytest.raises(ConfigError) as refused:
        Endpoint("http://me:sesame@127.0.0.1/v1", None, file)
    assert "sesame" not in str(refused.value)


def test_a_gateway_that_lists_no_models_is_asked_for_the_one_that_is_named(tmp_path: Path) -> None:
    with StubJudge(echo) as judge:
        nowhere = judge.url + "/chat"  # has no `models` below it, and answers whatever is asked
        judge.lists = "/v1/models"
        with pytest.raises(ConfigError, match="answers 404"):
            Endpoint(nowhere, None, tmp_path / "a.jsonl")
        assert Endpoint(nowhere, "x", tmp_path / "a.jsonl").ask(QUESTIONS[:1], most_tokens=9)
        assert judge.asked[0]["model"] == "x"


def test_a_body_can_be_made_to_fit_what_the_endpoint_takes(tmp_path: Path) -> None:
    with StubJudge(echo) as judge:
        body = {"max_tokens": None, "max_completion_tokens": 5}
        Endpoint(judge.url, None, tmp_path / "a.jsonl", body=body).ask(QUESTIONS[:1], most_tokens=9)
        assert "max_tokens" not in judge.asked[0]
        assert judge.asked[0]["max_completion_tokens"] == 5


def test_another_server_with_a_model_of_the_same_name_is_asked_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with StubJudge(lambda body: "one") as one, StubJudge(lambda body: "other") as other:
        assert Endpoint(one.url, None, file).ask(QUESTIONS[:1], most_tokens=9) == ["one"]
        assert Endpoint(other.url, None, file).ask(QUESTIONS[:1], most_tokens=9) == ["other"]
        assert Endpoint(one.url, None, file).ask(QUESTIONS[:1], most_tokens=9) == ["one"]
        assert (len(one.asked), len(other.asked)) == (1, 1)
        hosts = [json.loads(line)["host"] for line in file.read_text().splitlines()]
        assert hosts == [u.removeprefix("http://").removesuffix("/v1") for u in (one.url, other.url)]


@pytest.mark.parametrize("nothing", ["", " \n", None])
def test_an_empty_answer_is_asked_for_again_by_the_next_run(nothing: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with StubJudge(lambda body: nothing) as judge:  # type: ignore[arg-type, return-value]
        first = Endpoint(judge.url, None, file)
        assert first.ask(QUESTIONS[:1], most_tokens=9) == first.ask(QUESTIONS[:1], most_tokens=9) == [nothing or ""]
        assert len(judge.asked) == 1
        judge.answer = echo
        assert "question 0" in Endpoint(judge.url, None, file).ask(QUESTIONS[:1], most_tokens=9)[0]


def test_a_key_that_ends_with_its_line_is_sent_and_one_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StubJudge(echo) as judge:
        monkeypatch.setenv(KEY_VARIABLE, "sesame\r\n")
        Endpoint(judge.url, None, tmp_path / "a.jsonl").ask(QUESTIONS[:1], most_tokens=9)
        assert judge.keys == ["Bearer sesame"]
        for key in ("ключ", "open\nsesame", "sésame"):
            monkeypatch.setenv(KEY_VARIABLE, key)
            with pytest.raises(ConfigError, match=f"{KEY_VARIABLE} holds characters") as refused:
                Endpoint(judge.url, None, tmp_path / "a.jsonl")
            assert key not in str(refused.value)
        assert len(judge.looked) == 1


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://127.0.0.1:x/v1", "http://127.0.0.1:99999/v1", "http://ü/v1"])
def test_an_address_that_cannot_be_read_is_said_to_be_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no address of an endpoint"):
        Endpoint(url, None, tmp_path / "a.jsonl")


def test_what_is_no_json_is_said_to_be_none(tmp_path: Path) -> None:
    with StubJudge(echo) as judge:
        endpoint = Endpoint(judge.url, None, tmp_path / "a.jsonl")
        judge.before = lambda path: (200, {}, "<html>")
        with pytest.raises(ConfigError, match="does not answer in JSON"):
            endpoint.ask(QUESTIONS[:1], most_tokens=9)

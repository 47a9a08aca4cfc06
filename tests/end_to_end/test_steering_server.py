"""Interventions on a server: `/generate`, the OpenAI endpoints, refusals, and a deployment on everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.live_server import LiveServer
from tests.end_to_end.paths import recorded
from tests.end_to_end.steering import make_library

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("steering")]

PROMPT = [100 + 7 * i % 2900 for i in range(60)]
UP: dict[str, Any] = {"vector": "up", "strength": 60}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("steered server")
    make_library(folder / "library")
    probe = {
        "asks": ["steer"],
        "steer": {"library": str(folder / "library")},
        "hook_points": ["hook_embed", "blocks.1.hook_resid_post"],
    }
    server = LiveServer(folder, "--dtype", "float32", probe=probe, privacy="ids")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def _params(steer: Any) -> dict[str, Any]:
    return {"custom_params": {"probe": {"steer": steer}}}


def test_a_client_is_steered_who_asks_and_nobody_else(server: LiveServer) -> None:
    plain = server.generate(PROMPT)["output_ids"]
    steered = server.generate(PROMPT, sampling_params=_params([UP]))["output_ids"]
    assert server.generate(PROMPT)["output_ids"] == plain != steered
    assert server.generate(PROMPT, sampling_params=_params([UP]))["output_ids"] == steered
    run = recorded(server)  # every invariant holds
    assert len(run.interventions()) == 2
    assert run.manifest["steer"]["vectors"].keys() == {"up", "late", "feature", "fires"}
    assert run.tokens()["intervention"].notna().sum() == 2 * (60 + 7)


def test_the_openai_endpoints_take_the_same(server: LiveServer) -> None:
    def ask(path: str, **fields: Any) -> str:
        body = {"model": "x", "temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields}
        answer = server.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return str(choice.get("text", choice.get("message", {}).get("content")))

    chat = {"messages": [{"role": "user", "content": "import json, os, sys\n\ndef main():"}]}
    completion = {"prompt": "import json, os, sys\n\ndef main():"}
    for path, said in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        plain, steered = ask(path, **said), ask(path, **said, **_params([UP]))
        assert plain != steered
        assert ask(path, **said) == plain
    assert len(recorded(server).interventions()) == 2


@pytest.mark.parametrize(
    ("steer", "said"),
    [
        ([{**UP, "vector": "down"}], "custom_params.probe.steer[0].vector: `down` is not in the library"),
        ([{**UP, "strenght": 1}], "unknown key `steer.0.strenght`"),
        ([{**UP, "op": "ablate_feature", "strength": 1}], "`ablate_feature` needs a feature"),
        ([{"vector": "up"}], "`add` needs a `strength`"),
        ("up", "steer"),
    ],
)
def test_what_cannot_be_had_is_answered_with_400_and_the_key(server: LiveServer, steer: Any, said: str) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 4, **_params(steer)}}
    answer = server.http.post("/generate", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert server.generate(PROMPT)["meta_info"]["finish_reason"]["type"] == "length"


def test_a_deployment_is_on_every_request(tmp_path: Path) -> None:
    make_library(tmp_path / "library")
    deployment = [{"vector": "up", "op": "clamp", "strength": 40, "exclude": [0]}]
    probe = {"steer": {"library": str(tmp_path / "library"), "deployment": deployment}}
    server = LiveServer(tmp_path, "--dtype", "float32", probe=probe, privacy="ids")
    try:
        server.wait_until_ready()
        server.flush()  # without SGLang's own warm-up
        first = server.generate(PROMPT)
        again = server.generate(PROMPT)
        assert again["output_ids"] == first["output_ids"]
        assert again["meta_info"]["cached_tokens"] == 59
        body = {"input_ids": PROMPT, "sampling_params": _params([UP])}
        refused = server.http.post("/generate", json=body)
        assert refused.status_code == 400
        assert "was not started for `steer`" in refused.json()["error"]["message"]
        run = recorded(server)
        assert set(run.interventions()["onset"]) == {1}
        tokens = run.tokens()
        tokens = tokens[tokens["rid"].isin(run.interventions()["rid"])]
        assert tokens.loc[tokens["intervention"].isna(), "position"].tolist() == [0, 0]
    finally:
        server.kill()


def test_over_budget_every_endpoint_answers_400_and_plain_requests_are_served(tmp_path: Path) -> None:
    """A picosecond a forward, which any operation exceeds; and gates on the way there."""
    make_library(tmp_path / "library")
    steer = {"library": str(tmp_path / "library"), "budget_ms": 1e-9, "budget_rest": 1e6}
    probe = {"asks": ["steer"], "steer": steer, "hook_points": ["hook_embed", "blocks.2.hook_resid_post"]}
    server = LiveServer(tmp_path, "--dtype", "float32", probe=probe, privacy="ids")
    gated = {**UP, "phases": ["decode"], "gate": {"by": "probe", "probe": "fires"}}
    try:
        server.wait_until_ready()
        plain = server.generate(PROMPT)["output_ids"]
        for i in range(2):  # a decision each, and the window of 15 forwards is full with the last of the second
            server.generate(PROMPT[i:], sampling_params=_params([gated, {**UP, "prompt_window": [-1, None]}]))
        assert server.status()["steering"]["exceeded"] is True
        asked = [
            ("/generate", {"input_ids": PROMPT, "sampling_params": _params([UP])}),
            ("/v1/completions", {"model": "x", "prompt": "import json", "max_tokens": 4, **_params([UP])}),
            (
                "/v1/chat/completions",
                {"model": "x", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4, **_params([UP])},
            ),
        ]
        for path, body in asked:
            answer = server.http.post(path, json=body)
            assert answer.status_code == 400, path
            assert "interventions cost more than 1e-09 ms a forward" in answer.text
        assert server.status()["steering"]["turned_away"] == 3
        assert server.generate(PROMPT)["output_ids"] == plain
        run = recorded(server)  # every invariant holds
        assert list(run.budget()["event"]) == ["exceeded"]
        assert len(run.gates()) == 2
    finally:
        server.kill()

"""A client asks a real server for rows of its own positions: they are those of the run directory, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError, OpenAI

from sglang_probe.client import FetchedRows, RowsError, ask_rows, fetch_rows
from sglang_probe.run.run import Run
from tests.end_to_end.live_server import KEY, LiveServer
from tests.end_to_end.paths import recorded
from tests.end_to_end.steering import make_library

pytestmark = [pytest.mark.engine, pytest.mark.reviewed("steering", "live")]

POINTS = ["hook_embed", "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
PROMPT = [100 + 7 * i % 2900 for i in range(60)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("rows")
    make_library(folder / "library")
    probe = {
        "asks": ["rows", "steer"],
        "steer": {"library": str(folder / "library")},
        "hook_points": POINTS,
        "rows": {"at": {POINTS[2]: {"window": 4, "decode": "all"}}},
    }
    rows = {"most_megabytes": 0.3, "megabytes": 0.5}
    server = LiveServer(folder, probe=probe, privacy="ids", rows=rows, segments={"min_seconds": 0.2})
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def _fetch(server: LiveServer, asked: dict[str, Any]) -> FetchedRows:
    return fetch_rows(server.url, asked, api_key=KEY)


def _agree(run: Run, found: FetchedRows) -> None:
    """Every row that was handed out is that of the run directory, and every other is one that it has not."""
    for point, rows in found.items():
        held = run.activations(found.rid, point, missing="nan", intervened=True).float().numpy()
        np.testing.assert_array_equal(rows, held[found.position])
        assert (found.has_row[point] == ~np.isnan(rows).any(1)).all()


def test_rows_are_those_of_the_run_whoever_computed_them(server: LiveServer) -> None:
    fetched = []
    for rid, prompt, ask in (
        ("first", PROMPT, {}),
        ("again", [*PROMPT[:40], 7, 8, 9], {"hook_points": POINTS[1:]}),
        ("windows", [*PROMPT[:40], 5], {"windows": [(3, 6), (38, 45)], "last": 1}),
    ):
        asked = ask_rows(**ask)
        server.generate(prompt, 6, rid=rid, sampling_params={"custom_params": {"probe": asked}})
        fetched.append(_fetch(server, asked))
    first, again, windows = fetched
    assert first.has_row[POINTS[0]].all()
    assert first.position.tolist() == [*range(65)]
    assert first.has_row[POINTS[2]].tolist() == [False] * 56 + [True] * 9
    assert first.missing == {POINTS[2]: {"its row is not recorded at this hook point": 56}}
    assert set(again) == set(POINTS[1:])
    assert [(s["start"], s["end"], s["status"]) for s in again.spans[:1]] == [(0, 40, "reused")]
    assert "first" not in str(again.spans)  # SGLang would abort another's request by its id
    assert again.has_row[POINTS[1]].all()
    np.testing.assert_array_equal(again[POINTS[1]][:40], first[POINTS[1]][:40])
    assert windows.position.tolist() == [3, 4, 5, *range(38, 46)]
    run = recorded(server)  # every invariant holds
    for found in fetched:
        _agree(run, found)


def test_rows_under_an_intervention_say_so(server: LiveServer) -> None:
    asked = {**ask_rows(hook_points=POINTS[1:2]), "steer": [{"vector": "up", "strength": 60}]}
    server.generate(PROMPT, 4, rid="steered", sampling_params={"custom_params": {"probe": asked}})
    found = _fetch(server, asked)
    run = recorded(server)
    marks = {s["intervention"] for s in found.spans}
    assert marks - {None} == set(run.interventions()["intervention"])
    _agree(run, found)


def test_the_servers_key_and_the_handle_are_both_needed(server: LiveServer) -> None:
    asked = ask_rows(last=1)
    openai = OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    probe = {"custom_params": {"probe": asked}}
    openai.completions.create(model="m", prompt="def is_empty(self):", max_tokens=4, extra_body=probe)
    with pytest.raises(RowsError, match="401"):
        fetch_rows(server.url, asked)
    with pytest.raises(RowsError, match=r"404.*no rows under this handle"):
        fetch_rows(server.url, ask_rows(), api_key=KEY, timeout=0)
    with pytest.raises(RowsError, match=r"400.*a handle is"):
        fetch_rows(server.url, "short", api_key=KEY)
    assert server.http.get("/probe/rows/..%2Fdp0").status_code in (400, 404)
    assert len(_fetch(server, asked).position) == 1


def test_what_is_too_much_or_not_there_is_a_400_and_fetched_rows_make_room(server: LiveServer) -> None:
    for ask, told in (
        ({"hook_points": ["blocks.2.hook_resid_post"]}, "is not recorded here"),
        ({}, "this server gives 0.3 MB to a request"),
    ):
        params = {"max_new_tokens": 3000, "custom_params": {"probe": ask_rows(**ask)}}
        answer = server.http.post("/generate", json={"input_ids": PROMPT, "sampling_params": params})
        assert answer.status_code == 400
        assert told in answer.text
    old, *others = ({**ask_rows(hook_points=POINTS[:2])} for _ in range(8))
    for i, asked in enumerate((old, *others)):
        params = {"custom_params": {"probe": asked}}
        server.generate([9, i, *range(300, 398)], 2, sampling_params=params)
        _fetch(server, asked)
    with pytest.raises(RowsError, match=r"410.*have expired"):
        _fetch(server, old)
    assert server.status()["rows_asked"]["waiting"] == 0
    with pytest.raises(BadRequestError, match="handle"):
        OpenAI(base_url=f"{server.url}/v1", api_key=KEY).completions.create(
            model="m", prompt="x = ", max_tokens=4, extra_body={"custom_params": {"probe": {"rows": {"handle": "x"}}}}
        )

"""A live server with a library: what clients can read of it, and what they cannot name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sglang_probe import load_run
from sglang_probe.steering.library import Library
from sglang_probe.verify.verify import verify
from tests.end_to_end.live_server import LiveServer
from tests.end_to_end.test_vectors import SCORES, library  # noqa: F401

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("steering", "live")]


@pytest.fixture(scope="module")
def server(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:  # noqa: F811
    probe = {
        "hook_points": ["hook_embed", "blocks.1.hook_resid_post", SCORES[0]],
        "scores": {"library": str(library.folder), "names": ["code", "up"]},
        "steer": {"library": str(library.folder)},
        "asks": ["steer"],
    }
    found = LiveServer(tmp_path_factory.mktemp("live"), "--dtype", "float32", privacy="ids", probe=probe)
    try:
        found.wait_until_ready()
        yield found
    finally:
        found.kill()


def test_cards_are_listed_and_tensors_are_not(server: LiveServer, library: Library) -> None:  # noqa: F811
    assert server.anybody.get("/probe/vectors").status_code == 401
    told = server.http.get("/probe/vectors").json()
    assert set(told) == {"steer", "scores"}
    for of in told.values():
        assert of["library"] == library.hash
        assert {c["name"]: c["hash"] for c in of["vectors"]} == {v.name: v.hash for v in library.values()}
        assert not any(isinstance(x, list) and len(x) > 8 for c in of["vectors"] for x in c.values())


def test_scores_of_a_live_segment_are_read(server: LiveServer, library: Library) -> None:  # noqa: F811
    rng = np.random.default_rng(1)
    for strength in (0.0, 3.0):
        steer = {"custom_params": {"probe": {"steer": [{"vector": "up", "strength": strength}]}}}
        server.generate(rng.integers(10, 1000, 30).tolist(), sampling_params=steer)
    segment = Path(server.admin.post("/probe/flush").json()["segment"])
    run = load_run(segment)
    assert [str(c) for c in verify(run) if not c.holds] == []
    assert run.manifest["scores"] == {SCORES[0]: {n: library[n].hash for n in ("code", "up")}}
    scores = run.scores()
    tokens = run.tokens()
    rows = tokens.set_index(["rid", "position"]).loc[list(zip(scores["rid"], scores["position"], strict=True)), "row"]
    x = run.rows("blocks.1.hook_resid_post", rows.to_numpy()).double()
    for name in ("code", "up"):
        w = library[name].vector.double()
        error = np.abs((x @ w).numpy() - scores[name].to_numpy()) / (x.norm(dim=1) * w.norm()).numpy()
        assert error.max() < 1e-6
    assert 0 < scores["intervention"].notna().sum() < len(scores)


def test_an_unknown_vector_is_refused_by_name(server: LiveServer) -> None:
    steer = {"probe": {"steer": [{"vector": "../up", "strength": 1.0}]}}
    asked = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2, "custom_params": steer}}
    answer = server.http.post("/generate", json=asked)
    assert answer.status_code == 400
    assert "`../up` is not in the library" in answer.text

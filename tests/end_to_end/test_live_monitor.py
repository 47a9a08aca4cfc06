"""Two real servers, one after the other: the first collects; a profile and a gate are made of that; the second judges
its traffic by them, and clamps requests that are in scope."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_probe.paths import shipped
from sglang_probe.run.run import Run, load_run
from sglang_probe.steering.library import MadeBy, weight_hash_of_folder, write
from sglang_probe.steering.probe import fit
from sglang_probe.verify.verify import verify
from tests.declared import run_commands
from tests.end_to_end.live_server import MODEL, LiveServer
from tests.end_to_end.steering import make_library
from tests.steering.clamped import make_clamp

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("rows", "steering")]

POINT, NEW, LENGTH = "blocks.2.hook_resid_post", 12, 20
USUAL, IN_SCOPE = (100, 3000), 3001
"""Token ids of prompts, and the last ones of those that are in scope of the clamp."""
SAE = str(shipped("models/sae-probe-text/seed-0"))


def _prompts(n: int, seed: int, kind: tuple[int, int] = USUAL, *, in_scope: bool = False) -> list[list[int]]:
    rng = random.Random(seed)
    drawn = [[rng.randrange(*kind) for _ in range(LENGTH)] for _ in range(n)]
    return [[*p[:-6], *[IN_SCOPE] * 6] for p in drawn] if in_scope else drawn


def _serve(server: LiveServer, prompts: list[list[int]], **params: object) -> None:
    told = {"max_new_tokens": NEW, "temperature": 1.0, "ignore_eos": True, **params}
    answer = server.http.post("/generate", json={"input_ids": prompts, "sampling_params": told}, timeout=300)
    assert answer.status_code == 200, answer.text


def _alone(server: LiveServer, prompts: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Each by itself, so that nothing but the server tells two of them apart."""
    asked = {"return_logprob": True, "logprob_start_len": 0}
    return {rid: server.generate(prompt, NEW, rid=rid, **asked) for rid, prompt in prompts.items()}


def _server(folder: Path, **probe: Any) -> LiveServer:
    told = {"asks": ["steer"], "hook_points": ["hook_embed", POINT], **probe}
    server = LiveServer(folder, "--dtype", "float32", probe=told, privacy="ids")
    server.wait_until_ready()
    server.flush()  # without SGLang's own warm-up
    return server


def _checked(path: Path) -> Run:
    run = load_run(path)
    assert [c.violation for c in verify(run) if not c.holds] == []
    return run


@dataclass
class Served:
    """What the first server gave, and the second."""

    plain: Run
    answers: dict[str, dict[str, Any]]
    prompts: dict[str, list[int]]
    server: LiveServer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("monitored")
    make_library(folder / "library")
    kinds = {"in": True, "out": False}
    prompts = {f"{k} {i}": p for k, inside in kinds.items() for i, p in enumerate(_prompts(3, 5, in_scope=inside))}
    sampling = {"sampling": {"every": 4}, "rows": 3}
    library = {"library": str(folder / "library")}
    (folder / "collects").mkdir()
    first = _server(folder / "collects", monitor={"hook_point": POINT, "sae": SAE, **sampling}, steer=library)
    try:
        assert first.http.get("/probe/alerts").json()["judging"] is False
        _serve(first, _prompts(160, 1))
        collected = first.flush()
        answers = _alone(first, prompts)
        plain = first.flush()
        _serve(first, _prompts(40, 6, in_scope=True))
        scope = first.flush()
    finally:
        first.kill()
    assert len(_checked(collected).monitored()) == 160 * 3
    profile = folder / "profile"
    assert list(run_commands([["profile", str(collected), "--monitored", "--output", str(profile)]]).values()) == [0]
    inside, outside = (_last_rows(load_run(p)) for p in (scope, collected))
    w = torch.from_numpy(fit(inside.double().numpy(), outside.double().numpy())).float()
    threshold = ((inside @ w).min() + (outside @ w).max()) / 2
    assert (inside @ w).min() > threshold > (outside @ w).max()
    write(
        folder / "library",
        {"vector": w, "threshold": threshold},
        name="scope",
        kind="probe",
        hook_point=POINT,
        model="probe-text",
        model_weight_hash=weight_hash_of_folder(MODEL),
        layer_mean_norm=1.0,
        made_by=MadeBy(command="test"),
    )
    clamps = [{**make_clamp(folder), "probe": "scope"}]
    (folder / "judges").mkdir()
    monitor = {"profile": str(profile), "sae": SAE, "share": 0.1, "rate": 0.01}
    second = _server(folder / "judges", monitor=monitor, steer={**library, "clamps": clamps})
    try:
        yield Served(_checked(plain), answers, prompts, second)
    finally:
        second.kill()


def _last_rows(run: Run) -> torch.Tensor:
    """`[n, d]`: of the last prompt position of each request."""
    tokens = run.tokens()
    last = tokens[(tokens["position"] == LENGTH - 1) & (tokens["status"] == "computed")]
    return run.rows(POINT, last["row"].to_numpy()).float()


def test_a_clamp_touches_nobody_out_of_scope_in_any_bit(served: Served) -> None:
    before_it = served.server.status()["clamps"]["opened"]
    answers = _alone(served.server, served.prompts)
    again = served.server.generate(served.prompts["out 0"], NEW)
    run = _checked(served.server.flush())
    assert again["meta_info"]["cached_tokens"] == LENGTH - 1  # it shares the prefix cache as ever
    gates = run.gates().set_index("rid")["opened"]
    for rid, before in served.answers.items():
        after = answers[rid]
        x, y = (r.activations(rid, POINT, intervened=True) for r in (served.plain, run))
        assert torch.equal(x[:LENGTH], y[:LENGTH])  # the prompt is plain in any case
        if rid.startswith("out"):
            assert not gates[rid]
            assert after["output_ids"] == before["output_ids"]
            assert after["meta_info"]["output_token_logprobs"] == before["meta_info"]["output_token_logprobs"]
            assert torch.equal(x, y)
        else:
            assert gates[rid]
            assert not torch.equal(x[LENGTH], y[LENGTH])
    marked = run.tokens().dropna(subset=["intervention"])
    assert set(marked["rid"]) == {"in 0", "in 1", "in 2"}
    assert marked["position"].min() == LENGTH
    told = served.server.status()["clamps"]
    assert (told["opened"] - before_it, told["off"], told["of"][0]["label"]) == (3, None, "planted")
    assert run.manifest["steer"]["clamps"][0]["status"] == "validated"


def test_neither_a_usual_stream_nor_one_client_alarms_and_every_endpoint_says_so(served: Served) -> None:
    # That a planted drift alarms is shown before the real recording, in tests/engine/live/test_monitor.py.
    server = served.server
    before, opened = server.http.get("/probe/alerts").json()["requests"], server.status()["clamps"]["opened"]
    _serve(server, _prompts(60, 2))
    usual = server.flush()
    told = server.http.get("/probe/alerts").json()
    judged = before + 60 - (server.status()["clamps"]["opened"] - opened)  # who is clamped is not
    assert (told["requests"], told["drift"], told["off"]) == (judged, {}, None)
    assert judged > before + 40
    # What one client asks of the probe, and what it cannot have: nobody is judged by it.
    steer = [{"vector": "up", "strength": 400}]
    _serve(server, _prompts(40, 3), custom_params={"probe": {"steer": steer}})
    for bad in ({"custom_params": {"probe": {"monitor": 1}}}, {"max_new_tokens": -3}, {"temperature": -1}):
        body = {"input_ids": [5, 6], "sampling_params": bad}
        assert server.http.post("/generate", json=body).status_code == 400
    _checked(server.flush())
    told = server.http.get("/probe/alerts").json()
    assert (told["requests"], told["drift"], told["off"]) == (judged, {}, None)
    line = _checked(usual).manifest["monitor"]["drift_log"]
    assert (line["drift"], line["events"], line["requests"]) == (False, [], judged - before)
    metrics = server.anybody.get("/metrics").text
    assert "sglang_probe:monitored_requests_total{model_name=" in metrics
    assert (server.run / "drift.jsonl").read_text().count("segment") >= 2

"""The monitor's instrument without an engine: which rows are read, whose are not, and what a fault costs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import monitor as module
from sglang_probe.engine.hooks.instruments.base import Forward
from sglang_probe.engine.hooks.instruments.monitor import Watching
from sglang_probe.engine.ledger.facts import ForwardPlan, Under, Watched
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.monitor.stored import Watch
from tests.end_to_end.steering import MODEL, POINTS, WIDTH, make_library
from tests.engine.hooks.test_steer import Layer, Release
from tests.engine.made_session import make_session


def attached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, tp_size: int = 1, device: str = "cpu", **monitor: Any
) -> tuple[Watching, list[Layer]]:
    make_library(tmp_path / "library")
    given = {"hook_point": POINTS[1], "library": str(tmp_path / "library"), "vectors": ["up"], **monitor}
    config = EngineProbeConfig.model_validate({"run": "run", "live": {}, "monitor": given})
    session = make_session(monkeypatch, config)
    session.tp_size = tp_size
    watching = session.of(Watching)
    assert watching is not None
    layers = [Layer() for _ in range(4)]
    monkeypatch.setattr(module, "check_architecture", lambda _name: None)
    monkeypatch.setattr(module, "release", Release)
    watching.attach(
        SimpleNamespace(
            device=device,
            model=SimpleNamespace(model=SimpleNamespace(layers=layers)),
            model_config=SimpleNamespace(hidden_size=WIDTH),
            server_args=SimpleNamespace(model_path=str(MODEL)),
        )
    )
    return watching, layers


def forward(
    watching: Watching,
    layers: list[Layer],
    pieces: list[tuple[str, int, int, int]],
    *,
    under: dict[int, Under] | None = None,
    logits: torch.Tensor | None = None,
    reqs: list[Any] | None = None,
) -> tuple[Watched | None, torch.Tensor]:
    """A forward of `(rid, start, end, prompt_len)` each, one position past the prompt being a decode step."""
    rids, starts, ends, lengths = (list(x) for x in zip(*pieces, strict=True))
    decoding = [e - s == 1 and s >= n for s, e, n in zip(starts, ends, lengths, strict=True)]
    contexts = [None] * len(rids)
    plan = ForwardPlan(1, "mixed", rids, starts, ends, decoding, [0] * len(rids), lengths, contexts, 0)
    plan.under = dict(under or {})
    watching.launch(reqs or [SimpleNamespace() for _ in rids], [], plan)
    n = sum(ends) - sum(starts)
    x = torch.arange(n * WIDTH).float().reshape(n, WIDTH)
    layers[1](x, forward_batch=SimpleNamespace(residual=torch.ones_like(x), forward_mode=None))
    watching.after(Forward(None, None, plan, logits=logits))
    return plan.watched, x + 1


def test_every_so_many_decode_steps_of_each_request_are_read_where_they_are_in_the_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watching, layers = attached(monkeypatch, tmp_path, sampling={"every": 4})
    pieces = [
        ("a", 0, 5, 9),
        ("b", 10, 11, 10),
        ("c", 12, 13, 10),
        ("d", 14, 15, 10),
    ]  # a prompt's chunk; steps 0, 2, 4
    found, x = forward(watching, layers, pieces)
    assert found is not None
    assert (found.rids, found.positions) == (["b", "d"], [10, 14])
    assert torch.equal(found.x_ND, x[[5, 7]])
    assert found.probability_N.tolist() == [0.25, 0.25]
    nothing, _ = forward(watching, layers, [("c", 13, 14, 10), ("a", 5, 9, 9)])
    assert nothing is None


@pytest.mark.parametrize("sampling", [{"every": 2}, {"entropy": {"above": 1.0, "high": 1, "low": 1}}])
def test_no_more_rows_of_a_request_are_read_than_the_configuration_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    watching, layers = attached(monkeypatch, tmp_path, sampling=sampling, rows=2)
    reqs = [SimpleNamespace(), SimpleNamespace()]
    read: list[tuple[str, int]] = []
    for step in range(10):
        pieces = [("a", 10 + step, 11 + step, 10), ("b", 4 + step, 5 + step, 10)]
        found, _ = forward(watching, layers, pieces, logits=torch.zeros(2, 50), reqs=reqs)
        read += [] if found is None else zip(found.rids, found.positions, strict=True)
    apart = 2 if "every" in sampling else 1
    assert sorted(read) == [("a", 10), ("a", 10 + apart), ("b", 10), ("b", 10 + apart)]


@pytest.mark.parametrize("privacy", ["none", "hashes", "ids"])
def test_as_many_numbers_of_a_row_as_could_be_inverted_need_token_ids(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, privacy: str
) -> None:
    (tmp_path / "sae").mkdir()
    given = {"hook_point": POINTS[1], "sae": str(tmp_path / "sae"), "features": list(range(64))}
    config = {"run": "run", "live": {"privacy": privacy}, "monitor": given}
    assert EngineProbeConfig.model_validate(config).monitor is not None
    given["features"] = list(range(65))
    if privacy == "ids":
        assert EngineProbeConfig.model_validate(config).monitor is not None
        return
    with pytest.raises(ValidationError, match="65 features and vectors of each row can be inverted to text"):
        EngineProbeConfig.model_validate(config)


def test_a_profile_of_many_numbers_needs_token_ids_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sglang_probe.monitor.config.MOST_PROJECTIONS", 1)
    many = Watch(hook_point=POINTS[1], features=[0, 1], columns=["log norm"])
    monkeypatch.setattr(Watching, "_watched", lambda *_a, **_k: (many, None, {}))
    with pytest.raises(ConfigError, match="2 features and vectors"):
        attached(monkeypatch, tmp_path)


def test_who_is_under_interventions_of_its_own_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watching, layers = attached(monkeypatch, tmp_path, sampling={"every": 1})
    mine = Under("own", 3, 10, "[]")
    found, _ = forward(watching, layers, [("a", 10, 11, 10), ("b", 10, 11, 10)], under={0: mine})
    assert found is not None
    assert found.rids == ["b"]


def test_by_entropy_the_unsure_are_read_more_often_and_with_their_probability(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watching, layers = attached(monkeypatch, tmp_path, sampling={"entropy": {"above": 1.0, "high": 2, "low": 16}})
    watching._draws = np.random.default_rng(0)
    sure = torch.zeros(50).index_fill(0, torch.tensor([3]), 100.0)
    unsure = torch.zeros(50)
    pieces = [(f"r{i}", 10, 11, 10) for i in range(400)]
    found, _ = forward(watching, layers, pieces, logits=torch.stack([unsure if i % 2 else sure for i in range(400)]))
    assert found is not None
    odd = np.array([int(r[1:]) % 2 for r in found.rids], dtype=bool)
    assert set(found.probability_N[odd]) == {0.5}
    assert set(found.probability_N[~odd]) == {1 / 16}
    assert found.entropy_N[odd] == pytest.approx(np.log(50))
    assert 70 < odd.sum() < 130
    assert 3 < (~odd).sum() < 30


def test_a_fault_turns_the_monitor_off_and_stops_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watching, layers = attached(monkeypatch, tmp_path, sampling={"every": 1})
    monkeypatch.setattr(Release, "residual", lambda *_a: 1 / 0)
    found, _ = forward(watching, layers, [("a", 10, 11, 10)])
    assert found is None
    assert "ZeroDivisionError" in str(watching.judge().off)
    assert module.guard.active().fault is None
    assert forward(watching, layers, [("a", 11, 12, 10)])[0] is None  # it is not tried again


@pytest.mark.parametrize("where", [{"tp_size": 2}, {"device": "cuda"}])
def test_where_rows_cannot_be_read_the_server_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedError, match="`monitor`"):
        attached(monkeypatch, tmp_path, **where)


def test_a_monitor_is_of_a_live_server() -> None:
    with pytest.raises(ValidationError, match="needs `live"):
        EngineProbeConfig.model_validate({"run": "run", "monitor": {"hook_point": POINTS[1]}})

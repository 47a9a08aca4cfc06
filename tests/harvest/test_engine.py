"""What is made of what SGLang answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.harvest.engine import ProbedEngine
from sglang_probe.harvest.in_flight import RequestRefused


class Answers:
    """In the place of SGLang's engine: a stream."""

    def __init__(self, *told: dict[str, Any]) -> None:
        self.told = told

    async def async_generate(self, **asked: Any) -> AsyncIterator[dict[str, Any]]:
        async def answers() -> AsyncIterator[dict[str, Any]]:
            for told in self.told:
                yield told

        assert asked["stream"]
        return answers()


def _engine(tmp_path: Path, *told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> ProbedEngine:
    engine = ProbedEngine("model", EngineProbeConfig(run=tmp_path), {"device": "cpu", "watchdog_timeout": 1})
    engine._engine = Answers(*told)
    monkeypatch.setattr(engine, "look", lambda: None)
    return engine


def _told(*ids: int, **finish: Any) -> dict[str, Any]:
    return {"output_ids": list(ids), "meta_info": {"cached_tokens": 2, "finish_reason": finish or None}}


def test_the_first_token_is_told_once_and_the_last_answer_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _engine(tmp_path, _told(7), _told(7, 8), _told(7, 8, 9, type="length"), monkeypatch=monkeypatch)
    begun: list[int] = []
    answer = asyncio.run(engine.generate("r", [1], {}, lambda: begun.append(1)))
    assert (answer.output_ids, answer.cached_tokens, begun) == ([7, 8, 9], 2, [1])


def test_a_refusal_in_a_stream_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = _told(type="abort", status_code=400, message="too long")
    engine = _engine(tmp_path, refused, monkeypatch=monkeypatch)
    with pytest.raises(RequestRefused, match="too long"):
        asyncio.run(engine.generate("r", [1], {}, lambda: None))
    assert engine._in_flight == {}

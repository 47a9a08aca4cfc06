"""`GET /probe/rows/<handle>`: what is there, what has expired, and what nobody may ask for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.hooks import http
from sglang_probe.engine.hooks.http import Endpoints
from sglang_probe.engine.live.answer_files import EXPIRED, FETCHED, FULL, GONE, STOPPED, SUFFIX
from sglang_probe.rows_ask import file_name

HANDLE = "a" * 30


async def _nobody(*_args: Any) -> list[Any]:
    return []


async def _empty(_timeout: float) -> bool:
    return True


def _endpoints(folder: Path | None) -> Endpoints:
    return Endpoints(_nobody, _nobody, _empty, answers=folder)


def _get(folder: Path | None, handle: str = HANDLE) -> Any:
    return asyncio.run(_endpoints(folder).rows(handle, timeout=0))


async def _body(answer: Any) -> bytes:
    return b"".join([bytes(block) async for block in answer.body_iterator])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dp0").mkdir()
    (tmp_path / "dp1" / FETCHED).mkdir(parents=True)
    return tmp_path


def test_rows_of_any_rank_are_handed_out_and_then_go_first(folder: Path) -> None:
    (folder / "dp1" / f"{file_name(HANDLE)}{SUFFIX}").write_bytes(b"rows")
    answer = _get(folder)
    assert (answer.status_code, answer.headers["content-length"]) == (200, "4")
    assert not list((folder / "dp1" / FETCHED).iterdir())
    assert asyncio.run(_body(answer)) == b"rows"
    assert [p.name for p in (folder / "dp1" / FETCHED).iterdir()] == [file_name(HANDLE)]


def test_what_expires_before_it_is_sent_is_sent(folder: Path) -> None:
    place = folder / "dp1" / f"{file_name(HANDLE)}{SUFFIX}"
    place.write_bytes(b"rows")
    answer = _get(folder)
    place.unlink()
    assert asyncio.run(_body(answer)) == b"rows"


def test_few_may_wait_and_what_is_there_is_handed_out_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_ROWS_WAITING", 2)
    place = folder / "dp1" / f"{file_name(HANDLE)}{SUFFIX}"

    async def ask() -> None:
        endpoints = _endpoints(folder)
        waiting = [asyncio.ensure_future(endpoints.rows(HANDLE, timeout=30)) for _ in range(2)]
        while endpoints._rows_waiting < 2:
            await asyncio.sleep(0)
        assert (await endpoints.rows(HANDLE, timeout=30)).status_code == 429
        assert (await endpoints.rows(HANDLE, timeout=0)).status_code == 404
        place.write_bytes(b"rows")
        assert (await endpoints.rows(HANDLE, timeout=30)).status_code == 200
        assert [a.status_code for a in await asyncio.gather(*waiting)] == [200, 200]
        assert endpoints._rows_waiting == 0

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("handle", "status", "told"),
    [(HANDLE, 404, "no rows under this handle"), ("short", 400, "a handle is"), ("../" * 10, 400, "a handle is")],
)
def test_what_is_not_there_or_no_handle_is_said(folder: Path, handle: str, status: int, told: str) -> None:
    answer = _get(folder, handle)
    assert answer.status_code == status
    assert told in json.loads(answer.body)["reason"]


@pytest.mark.parametrize(
    ("why", "status", "told"), [(EXPIRED, 410, "have expired"), (FULL, 503, "no room"), (STOPPED, 503, "was stopped")]
)
def test_why_there_are_none_is_said(folder: Path, why: str, status: int, told: str) -> None:
    (folder / "dp1" / f"{file_name(HANDLE)}{GONE}").write_text(why)
    answer = _get(folder)
    assert answer.status_code == status
    assert told in json.loads(answer.body)["reason"]


def test_a_server_that_hands_out_none_says_so() -> None:
    assert _get(None).status_code == 404

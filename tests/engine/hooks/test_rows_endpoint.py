"""`GET /probe/rows/<handle>`: what is there, what has expired, and what nobody may ask for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.hooks.http import Endpoints
from sglang_probe.engine.live.answers import GONE, SUFFIX
from sglang_probe.rows_ask import file_name

HANDLE = "a" * 30


async def _nobody(*_args: Any) -> list[Any]:
    return []


def _get(folder: Path | None, handle: str = HANDLE) -> Any:
    async def empty(_timeout: float) -> bool:
        return True

    return asyncio.run(Endpoints(_nobody, _nobody, empty, answers=folder).rows(handle, timeout=0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dp1").mkdir()
    return tmp_path


def test_rows_of_any_rank_are_handed_out(folder: Path) -> None:
    (folder / "dp1" / f"{file_name(HANDLE)}{SUFFIX}").write_bytes(b"rows")
    answer = _get(folder)
    assert answer.status_code == 200
    assert Path(answer.path).read_bytes() == b"rows"


@pytest.mark.parametrize(
    ("handle", "status", "told"),
    [(HANDLE, 404, "no rows under this handle"), ("short", 400, "a handle is"), ("../" * 10, 400, "a handle is")],
)
def test_what_is_not_there_or_no_handle_is_said(folder: Path, handle: str, status: int, told: str) -> None:
    answer = _get(folder, handle)
    assert answer.status_code == status
    assert told in json.loads(answer.body)["reason"]


def test_what_has_expired_is_gone(folder: Path) -> None:
    (folder / "dp1" / f"{file_name(HANDLE)}{GONE}").touch()
    answer = _get(folder)
    assert answer.status_code == 410
    assert "have expired" in json.loads(answer.body)["reason"]


def test_a_server_that_hands_out_none_says_so() -> None:
    assert _get(None).status_code == 404

"""What lies under a handle, as an HTTP answer: `GET /probe/rows/<handle>` (`http.py`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sglang_probe.engine.live.answer_files import EXPIRED, FETCHED, GONE, SUFFIX, WHY

_BLOCK = 1 << 20


def found_in(places: Sequence[Path]) -> Any:
    """The answer from what lies in one of these places (paths without a suffix); None: nothing does, so far."""
    from fastapi.responses import JSONResponse, StreamingResponse

    for place in places:
        try:  # opened here: what expires while it is sent is sent all the same
            file = open(f"{place}{SUFFIX}", "rb")  # noqa: SIM115 - closed once it is sent
        except FileNotFoundError:
            with contextlib.suppress(FileNotFoundError):
                why = Path(f"{place}{GONE}").read_text()
                return JSONResponse({"reason": WHY[why]}, status_code=410 if why == EXPIRED else 503)
            continue
        size = {"content-length": str(os.fstat(file.fileno()).st_size)}
        return StreamingResponse(_sent(file, place), media_type="application/octet-stream", headers=size)
    return None


def _sent(file: BinaryIO, place: Path) -> Iterator[bytes]:
    """The bytes of an answer; once they are sent, it goes first when room is needed."""
    with file:
        while block := file.read(_BLOCK):
            yield block
    with contextlib.suppress(OSError):  # the folder may be gone
        (place.parent / FETCHED / place.name).touch()

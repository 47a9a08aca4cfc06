"""A client for rows of one's own requests: standard library and numpy, nothing of SGLang or torch.

    from sglang_probe.client import ask_rows, fetch_rows

    asked = ask_rows(hook_points=["blocks.10.hook_resid_post"], last=1)
    params = {"max_new_tokens": 16, "custom_params": {"probe": asked}}
    requests.post(f"{url}/generate", json={"text": "2 + 2 =", "sampling_params": params}, headers=...)
    rows = fetch_rows(url, asked, api_key="...")
    rows["blocks.10.hook_resid_post"]       # float32 [n, width]; NaN: rows.missing says why

The server's YAML needs `asks: [rows]`. With OpenAI's client `custom_params` goes into `extra_body`.
"""

from __future__ import annotations

import json
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_SERVER_WAITS = 20.0
"""Seconds that one question waits at the server."""
_PAUSE = 0.5
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}


class RowsError(Exception):
    """The server has no such rows; the message is what it says."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class FetchedRows(Mapping[str, Array]):
    """Rows by hook point, float32 `[n, width]` (bfloat16 is held exactly), NaN where there is none. A hook point of
    which there is none at all is not in it."""

    position: Array
    """int64 `[n]`, ascending: place of each row in prompt and output."""
    has_row: dict[str, Array]
    """By hook point, bool `[n]`."""
    spans: list[dict[str, Any]]
    """What became of the request's positions: start, end, status, phase and intervention (null: the plain model's)."""
    missing: dict[str, dict[str, int]]
    """By hook point, how many rows are missing, by reason."""
    rid: str
    prompt_len: int
    rows: dict[str, Array]

    def __getitem__(self, hook_point: str) -> Array:
        return self.rows[hook_point]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def ask_rows(
    *,
    hook_points: Sequence[str] | None = None,
    last: int | None = None,
    windows: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """What goes into `custom_params.probe` of one request; its handle is new, random, and good for this request alone.

    Args:
        hook_points: among those that the server records; default: all of them.
        last: the last so many positions. windows: ranges `[start, end]`. Neither: all positions.
    """
    asked = {"hook_points": hook_points, "last": last, "windows": windows}
    return {"rows": {"handle": secrets.token_urlsafe(24), **{k: v for k, v in asked.items() if v is not None}}}


def fetch_rows(
    url: str, asked: Mapping[str, Any] | str, *, api_key: str | None = None, timeout: float = 10.0
) -> FetchedRows:
    """Fetch the rows of a request that has ended; waits up to `timeout` seconds for them to be there.

    Args:
        url: of the server, without a path. asked: what `ask_rows` gave, or the handle.

    Raises:
        RowsError: 400, 404, 410, 429 or 503 with the server's reason, 401 without the key.
        OSError: the server cannot be reached.
    """
    handle = asked if isinstance(asked, str) else asked["rows"]["handle"]
    place = f"{url.rstrip('/')}/probe/rows/{urllib.parse.quote(handle, safe='')}"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    deadline = time.monotonic() + timeout
    while True:
        asked_at = time.monotonic()
        wait = min(max(0.0, deadline - asked_at), _SERVER_WAITS)
        try:
            request = urllib.request.Request(f"{place}?timeout={wait:g}", headers=headers)
            with urllib.request.urlopen(request, timeout=wait + 30) as answer:
                return read_rows(answer.read())
        except urllib.error.HTTPError as e:
            now = time.monotonic()
            # A 404 that comes at once is of a server that hands out none.
            again = now < deadline and (e.code == 429 or (e.code == 404 and now - asked_at > 0.9 * wait))
            if not again:
                raise RowsError(e.code, _reason(e.read())) from None
        if now - asked_at < _PAUSE:  # the server was busy
            time.sleep(_PAUSE)


def read_rows(data: bytes) -> FetchedRows:
    """The safetensors bytes of an answer."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = json.loads(header.pop("__metadata__")["probe"])
    tensors = {name: _tensor(data, 8 + length, entry) for name, entry in header.items()}
    position = tensors.pop("position")
    mark = "/has_row"
    has_row = {name.removesuffix(mark): tensors.pop(name) != 0 for name in list(tensors) if name.endswith(mark)}
    named = {k: told[k] for k in ("spans", "missing", "rid", "prompt_len")}
    return FetchedRows(position=position, has_row=has_row, rows=tensors, **named)


def _tensor(data: bytes, start: int, entry: Mapping[str, Any]) -> Array:
    first, end = entry["data_offsets"]
    raw = memoryview(data)[start + first : start + end]
    if entry["dtype"] == "BF16":
        flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(raw, _DTYPES[entry["dtype"]])
        flat = flat.astype(np.float32) if entry["dtype"] == "F16" else flat
    return flat.reshape(entry["shape"])


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["reason"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]

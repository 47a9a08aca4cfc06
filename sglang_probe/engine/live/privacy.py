"""What is written of prompts and outputs.

Token ids leave the requests of a commit before the writer has it. A prompt goes along as a `_Ended`, which no table
takes as it is: the writer's thread asks it what the level allows (`told`), and that alone can be written. There, and
not on the scheduler's thread, because hashing a long prompt takes milliseconds, which everybody's next step would wait.

`hashes` is BLAKE2b with a random key that lives in this process only and is never written: with the files alone nobody
can test a guess, and equal prompts are recognised within one server process, not across restarts. Every prefix of
prompt and output has a hash too (`sglang_probe.hashing.keyed_prefix_hashes`): how much two requests have in common can
be told, and `sglang-probe why` needs no more.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.engine.live.config import Privacy
from sglang_probe.hashing import keyed_prefix_hashes
from sglang_probe.run import schema

_RID = schema.ENGINE_REQUESTS.get_field_index("rid")
_OUTPUT_IDS = schema.ENGINE_REQUESTS.get_field_index("output_ids")


class Redactor:
    """Removes token ids from commits, and adds what the level allows of prompts."""

    def __init__(self, level: Privacy) -> None:
        self._level = level
        self._keys = None if level == "ids" else (secrets.token_bytes(32), secrets.token_bytes(32))
        self._prompts: dict[str, Any] = {}

    def ending(self, rid: str, prompt_ids: Any) -> None:
        """A request is about to end; its end comes with one of the next commits. Without `prompt_ids` it has none."""
        if self._level != "none":
            self._prompts[rid] = prompt_ids

    def forget(self) -> None:
        """The ends that were announced do not come any more."""
        self._prompts.clear()

    def apply(self, commit: Commit) -> None:
        """Rewrite the requests of a commit in place."""
        if not commit.requests:
            return
        for request in commit.requests:
            prompt = self._prompts.pop(request[_RID], None)
            if prompt is not None:
                commit.prompts.append(_Ended(request[_RID], prompt, request[_OUTPUT_IDS] or [], self._keys))
        if self._level != "ids":
            commit.requests = [(*r[:_OUTPUT_IDS], None, *r[_OUTPUT_IDS + 1 :]) for r in commit.requests]


@dataclass(frozen=True, slots=True)
class _Ended:
    """A prompt and its output, and the keys with which they are hashed; None: they are written as they are."""

    rid: str
    prompt: Sequence[int]
    output: Sequence[int]
    keys: tuple[bytes, bytes] | None

    @property
    def nbytes(self) -> int:
        return 8 * (len(self.prompt) + len(self.output))

    def told(self) -> tuple[str, Any, str | None, Any]:
        ids = _array(self.prompt)
        if self.keys is None:
            return self.rid, ids.astype(np.int32), None, None
        key, prefix_key = self.keys
        prefixes = keyed_prefix_hashes(np.concatenate([ids, _array(self.output)]), prefix_key)
        return self.rid, None, hashlib.blake2b(ids.tobytes(), key=key, digest_size=16).hexdigest(), prefixes


_AT_ONCE = 1 << 14
"""Elements of a list that are converted before another thread may have Python's lock."""


def _array(ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    if not isinstance(ids, list):
        return np.asarray(ids, dtype=np.int64)
    out = np.empty(len(ids), dtype=np.int64)
    for at in range(0, len(ids), _AT_ONCE):
        out[at : at + _AT_ONCE] = ids[at : at + _AT_ONCE]
    return out

"""What is written of prompts and outputs. Applied before anything reaches the writer, so nothing else can leak.

`hashes` is BLAKE2b with a random key that lives in this process only and is never written: with the files alone nobody
can test a guess, and equal prompts are recognised within one server process, not across restarts. Every prefix of
prompt and output has a hash too (`sglang_probe.hashing.keyed_prefix_hashes`): how much two requests have in common can
be told, and `sglang-probe why` needs no more.
"""

from __future__ import annotations

import hashlib
import secrets
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
        self._key, self._prefix_key = secrets.token_bytes(32), secrets.token_bytes(32)
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
                commit.prompts.append((request[_RID], *self._told(prompt, request[_OUTPUT_IDS])))
        if self._level != "ids":
            commit.requests = [(*r[:_OUTPUT_IDS], None, *r[_OUTPUT_IDS + 1 :]) for r in commit.requests]

    def _told(self, prompt: Any, output: Any) -> tuple[list[int] | None, str | None, Any]:
        ids = np.asarray(prompt, dtype=np.int64)
        if self._level == "ids":
            return ids.tolist(), None, None
        whole = np.concatenate([ids, np.asarray(output or [], dtype=np.int64)])
        prefixes = keyed_prefix_hashes(whole, self._prefix_key)
        return None, hashlib.blake2b(ids.tobytes(), key=self._key, digest_size=16).hexdigest(), prefixes

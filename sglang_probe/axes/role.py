"""Axis `role`: who speaks, recovered from token ids alone, for traffic of which only the ids were recorded.

A chat template writes a header before every message (`<|im_start|>user\\n`) and something after it (`<|im_end|>\\n`).
Both are found by rendering small chats with a marker for every content (as `workload/render.py` does). A header's key
is its shortest end that begins with a special token and belongs to one role only; in the traffic, tokens after a key
are the role's until a special token with which the template ends a message. Special tokens are `special`, what else the
template writes is `template`, and a request without any header is `plain`: it did not go through the template.

Where a template separates roles by ordinary text only, there is nothing to recover, and the axis refuses.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from sglang_probe.axes.axis import UNKNOWN, Axis
from sglang_probe.axes.batch import Array, Batch
from sglang_probe.errors import ConfigError

SPECIAL, TEMPLATE, PLAIN = "special", "template", "plain"
_CHATS = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant"),
    ("developer", "user"),
    ("user", "assistant", "tool"),
    ("user", "assistant", "tool", "assistant"),
)
_MAIN_ROLES = ("system", "user", "assistant")
_MARKER = re.compile("\ue000([0-9]+)\ue001")
Ids = tuple[int, ...]


class Role(Axis):
    """Roles by the chat template of a tokenizer.

    Raises (on construction):
        ConfigError: the tokenizer has no chat template, or the template has no special tokens that tell roles apart.
    """

    needs_ids = True

    def __init__(self, tokenizer: Any) -> None:
        self._headers, self._enders, special = read_template(tokenizer)
        # Few tokens stand after headers.
        self._text: Callable[[int], str] = functools.lru_cache(4096)(lambda i: str(tokenizer.decode([i])))
        super().__init__("role", [*self._headers, TEMPLATE, SPECIAL, PLAIN, UNKNOWN])
        self._special = np.zeros(1 + max(special), dtype=bool)
        self._special[list(special)] = True

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        ids = batch.ids
        # States change at events: 1 + role after a header, 0 after a message. Later ones at a position win.
        events = {int(at) + 1: 0 for at in np.flatnonzero(np.isin(ids, self._enders))}
        template, n = len(self._headers), len(ids)
        codes = np.full(n, template, dtype=np.uint16)
        written: list[tuple[int, int]] = []
        chats = np.zeros(len(batch.offsets) - 1, dtype=bool)
        for role, (key, space) in enumerate(self._headers.values()):
            for at in find(ids, key).tolist():
                request = int(np.searchsorted(batch.offsets, at, side="right")) - 1
                limit, end = int(batch.offsets[request + 1]), at + len(key)
                if end > limit:
                    continue  # the match runs into the next request
                end += self._space_tokens(ids[end : min(limit, end + 8)], space)
                written.append((at, end))
                events[end] = 1 + role
                chats[request] = True
        for a in batch.offsets[:-1].tolist():  # what is open at the end of a request says nothing of the next
            events.setdefault(a, 0)
        marks = sorted(events)
        for a, b in pairwise([*marks, n]):
            if events[a]:
                codes[a:b] = events[a] - 1
        for a, b in written:
            codes[a:b] = template
        codes[~batch.each(chats)] = template + 2
        inside = (ids >= 0) & (ids < len(self._special))
        codes[inside & self._special[np.where(inside, ids, 0)]] = template + 1
        codes[ids < 0] = template + 3
        return codes

    def _space_tokens(self, ids: Array, space: str) -> int:
        """How many tokens make up the white space that ends a header; the last may hold more white space."""
        for n, token in enumerate(ids.tolist()):
            text = self._text(token)
            if not space or not text.isspace() or not (text.startswith(space) or space.startswith(text)):
                return n
            space = space[len(text) :]
        return len(ids)


def find(ids: Array, key: Ids) -> Array:
    """Where `key` begins in `ids`."""
    at = np.flatnonzero(ids[: len(ids) - len(key) + 1] == key[0]) if len(ids) >= len(key) else np.empty(0, np.int64)
    for i, token in enumerate(key[1:], start=1):
        at = at[ids[at + i] == token]
    return at


def read_template(tokenizer: Any) -> tuple[dict[str, tuple[Ids, str]], list[int], set[int]]:
    """Headers by role as (key, white space after it), special tokens that end a message, and all special tokens."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the tokenizer has no chat template, so there are no roles to recover", fix="leave out the axis `role`"
        )
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
    before, after = defaultdict(set), set()
    for chat in _CHATS:
        literals = _literals(tokenizer, chat)
        if literals is None:
            continue
        for i, role in enumerate(chat):
            before[role].add(literals[i])
            after.add(literals[i + 1])
    headers = {role: _common_end(found) for role, found in before.items()}
    keys = {role: _key(role, headers, special) for role in headers}
    known = {role: key for role, key in keys.items() if key is not None}
    if not known:
        raise ConfigError(
            "the chat template separates roles by ordinary text, not by special tokens, so they cannot be recovered",
            fix="leave out the axis `role`; the workload's own segments know the roles",
        )
    enders = {next(t for t in literal if t in special) for literal in after if special & set(literal)}
    return {role: _without_space(tokenizer, key) for role, key in known.items()}, sorted(enders), special


def _literals(tokenizer: Any, chat: tuple[str, ...]) -> list[Ids] | None:
    """Tokens that the template writes before, between and after the contents; None if it refuses the chat."""
    messages = [{"role": r, "content": f"\ue000{i}\ue001"} for i, r in enumerate(chat)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except Exception:  # a template may raise anything for roles or orders that it does not know
        return None
    first, *rest = _MARKER.split(text)
    if [int(i) for i in rest[::2]] != list(range(len(chat))):
        return None
    return [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (first, *rest[1::2])]


def _common_end(literals: set[Ids]) -> Ids:
    shortest = min(literals, key=len)
    n = next((i for i in range(len(shortest)) if len({t[len(t) - 1 - i] for t in literals}) > 1), len(shortest))
    return shortest[len(shortest) - n :]


def _key(role: str, headers: dict[str, Ids], special: set[int]) -> Ids | None:
    """The shortest end of the role's header that begins with a special token and occurs in no main role's header.

    A template may write other roles as a kind of user message; their longer headers then win in the traffic.
    """
    own = headers[role]
    others = [h for r, h in headers.items() if r != role and r in _MAIN_ROLES]
    for start in range(len(own) - 1, -1, -1):
        key = own[start:]
        if key[0] in special and not any(len(find(np.array(h), key)) for h in others if len(h) >= len(key)):
            return key
    return None


def _without_space(tokenizer: Any, header: Ids) -> tuple[Ids, str]:
    """Header, and the white space at its end, which may be cut into other tokens when a content follows."""
    n = len(header)
    while n > 1 and tokenizer.decode([header[n - 1]]).isspace():
        n -= 1
    return header[:n], str(tokenizer.decode(list(header[n:])))

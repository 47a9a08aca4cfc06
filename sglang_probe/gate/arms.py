"""Every arm of the comparison, sent: the same requests cold, warm, and cold again.

| arm | what is sent | reuses |
|---|---|---|
| cold | prefix and tail | nothing |
| branch | the same, after a request with the same prefix and another tail | the prefix |
| repeat | the same once more | all but the last token |
| staged | the same, after the prefix was computed in three requests, each a part longer | the prefix |
| turns | prefix, tail, the answer to it, and a further turn | also what the model generated |
| company | cold and branch, several at a time, of different prefixes | the prefix |
| cancelled | company, after and among requests whose clients went away in the middle of the answer | the prefix |
| extended | cold, with more tokens after the tail: other shapes, the same tokens before | nothing |
| control | cold, with wrong tokens in the prefix: what a wrong entry would do | nothing |

Each is sent twice, in two orders; `cold-1` is the first. A case has a namespace of its own in every arm and order, or
the cache is flushed before it (`Cold`).
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from sglang_probe.errors import ConfigError
from sglang_probe.gate.client import Answer, Client, Ids, RefusedError
from sglang_probe.gate.prompts import Case

Cold = Literal["cache_salt", "extra_key", "flush"]
"""How a request is kept from reusing: a field that gives it cache entries of its own, or a flush before it."""
MEANS: dict[Cold, str] = {
    "cache_salt": "each cold request carries a `cache_salt` of its own: the same tokens at the same positions, "
    "computed anew. Warm ones share a salt with the request before. Nobody else's cache entries are read; a full cache "
    "evicts some for them",
    "extra_key": "each cold request carries an `extra_key` of its own: the same tokens at the same positions, "
    "computed anew. Warm ones share a key with the request before. Nobody else's cache entries are read; a full cache "
    "evicts some for them",
    "flush": "the server's cache was flushed before every cold request, which other clients of this server noticed; "
    "warm requests reuse what any client of the server would",
}
WRONG = (1, 16)
"""Tokens of the prefix that a control changes."""
Arms = dict[str, dict[int, Answer]]


@dataclass
class Sent:
    """All answers by arm and case, and what could not be asked."""

    cold: Cold
    arms: Arms = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """Every request that got no answer, those that only prepare the cache too."""
    refused: dict[str, dict[int, str]] = field(default_factory=dict)
    """By arm and case: why there is no answer."""
    paths: tuple[str, ...] = ()
    """Paths that were asked."""
    unsent: dict[str, str] = field(default_factory=dict)
    """Paths that were to be asked and cannot be, with the reason."""


def how_to_be_cold(client: Client, prompt: Ids, asked: str = "auto") -> Cold:
    """What this server understands: asked twice with one namespace a prompt is reused, with another it is not.

    Args:
        asked: `auto`, or one of `Cold`. `auto` never flushes: that would empty everybody's cache.

    Raises:
        ConfigError: it does not do what was asked, or nothing of it.
    """
    tried = [asked] if asked != "auto" else ["cache_salt", "extra_key"]
    for way in tried:
        if way == "flush":
            if client.flush():
                return "flush"
            continue
        one, other = ({way: f"gate-{uuid.uuid4().hex}"} for _ in range(2))
        try:
            client.ask(prompt, new=1, salt=one)
            again = client.ask(prompt, new=1, salt=one)
            apart = client.ask(prompt, new=1, salt=other)
        except RefusedError as e:
            if e.status not in (400, 422):
                raise
            continue
        # A server whose cache is off, or that reports nothing, is judged later, where it can be said.
        if apart.cached in (0, None) or not again.cached:
            return "cache_salt" if way == "cache_salt" else "extra_key"
    if asked != "auto":
        raise ConfigError(f"this server does not do `--cold {asked}`", fix="try another, or `--cold auto`")
    raise ConfigError(
        "this server separates no cache entries by `cache_salt` or `extra_key`, so nothing can be asked cold",
        fix="if nobody else uses it, `--cold flush` empties its cache before every cold request",
    )


def send(
    client: Client,
    cases: Sequence[Case],
    cold: Cold,
    *,
    new: int,
    paths: Sequence[str],
    company: int,
    seed: int = 0,
    origin: bool = False,
    tell: Callable[[str, int, int], None] = lambda arm, done, of: None,
    early: Callable[[Sent], None] = lambda sent: None,
) -> Sent:
    """All arms of the paths asked for; `cold`, `extended` and the controls always.

    Args:
        new: tokens that are generated for each request.
        paths: of `branch`, `repeat`, `staged`, `turns`, `company`, `cancelled`.
        company: requests at a time in `company`.
        tell: hears which arm comes next, how many are done, and of how many.
        early: hears what there is after `branch`, which is enough for a first verdict.
    """
    sender = _Sender(client, cases, cold, new, company, random.Random(seed), origin)
    alone = ["cold", *(p for p in paths if p == "branch")]
    later = [p for p in ("repeat", "staged", "turns", "company", "cancelled") if p in paths]
    if cold == "flush" and (alike := [p for p in later if p in ("company", "cancelled")]):
        # What all prompts begin with would be reused among those of a wave.
        later = [p for p in later if p not in alike]
        sender.sent.unsent = dict.fromkeys(alike, "requests at a time need a salt each, and a flush gives none")
    sender.sent.paths = (*alone[1:], *later)
    steps = [(arm, k) for k in (1, 2) for arm in alone] + [("extended", 0), ("control", 0)]
    first = len(steps)
    steps += [(arm, k) for arm in later for k in (1, 2)]
    for done, (arm, k) in enumerate(steps):
        if done == first and alone[1:]:
            early(sender.sent)
        tell(f"{arm} {k}" if k else arm, done, len(steps))
        getattr(sender, arm)(k)
    return sender.sent


class _Sender:
    """One method an arm; `k` is the order, 1 or 2."""

    def __init__(
        self,
        client: Client,
        cases: Sequence[Case],
        cold: Cold,
        new: int,
        size: int,
        rng: random.Random,
        origin: bool,
    ) -> None:
        self.client, self.cases, self.new, self.size, self.rng, self.asks = client, cases, new, size, rng, origin
        self.sent = Sent(cold)

    def cold(self, k: int) -> None:
        for i in self._order():
            self._keep(f"cold-{k}", i, self.cases[i].prompt, len(self.cases[i].prefix), self._apart())

    def branch(self, k: int) -> None:
        for i in self._order():
            c, salt = self.cases[i], self._apart()
            self._only(c.prefix + c.seed, salt)
            self._keep(f"branch-{k}", i, c.prompt, len(c.prefix), salt, reuses=True)

    def repeat(self, k: int) -> None:
        for i in self._order():
            c, salt = self.cases[i], self._apart()
            self._only(c.prompt, salt)
            self._keep(f"repeat-{k}", i, c.prompt, -1, salt, reuses=True)

    def staged(self, k: int) -> None:
        for i in self._order():
            c, salt = self.cases[i], self._apart()
            n = len(c.prefix)
            for end in (n // 3, 2 * n // 3, n):
                self._only(c.prefix[:end], salt)
            self._keep(f"staged-{k}", i, c.prompt, n, salt, reuses=True)

    def turns(self, k: int) -> None:
        """The further turn of the conversation; its answer is the first cold request's, for both orders alike."""
        said = self.sent.arms["cold-1"]
        for i in [i for i in self._order() if i in said]:
            c = self.cases[i]
            longer = c.prompt + said[i].output
            start = len(longer) - 1  # the last token that was generated was never the input of a forward pass
            self._keep(f"turns-cold-{k}", i, longer + c.further, start, self._apart())
            salt = self._apart()
            self._only(c.prompt, salt, new=self.new)
            self._keep(f"turns-{k}", i, longer + c.further, start, salt, reuses=True)

    def company(self, k: int) -> None:
        order = self._order()
        for at in range(0, len(order), self.size):
            wave = order[at : at + self.size]
            self._flush()
            self._together(wave, f"company-cold-{k}", [self._salt() for _ in wave], reuses=False)
            self._flush()
            salts = [self._salt() for _ in wave]
            self._together(wave, None, salts, reuses=False)
            self._together(wave, f"company-{k}", salts, reuses=True)

    def cancelled(self, k: int) -> None:
        order = self._order()
        cold = f"company-cold-{k}"
        asked = cold in self.sent.arms
        for at in range(0, len(order), self.size):
            wave = order[at : at + self.size]
            if not asked:  # `company` was not: what this path is compared with is sent here
                self._together(wave, cold, [self._salt() for _ in wave], reuses=False)
            salts = [self._salt() for _ in wave]
            with ThreadPoolExecutor(len(wave)) as pool:
                leaving = [lambda i=i, s=s: self._leave(i, s) for i, s in zip(wave, salts, strict=True)]  # type: ignore[misc]
                list(pool.map(lambda leave: leave(), leaving))
                still = [pool.submit(leave) for leave in leaving]
                self._together(wave, f"cancelled-{k}", salts, reuses=True)
                for one in still:
                    one.result()

    def _leave(self, i: int, salt: dict[str, str]) -> None:
        try:
            self.client.give_up(self.cases[i].prefix + self.cases[i].seed, salt=salt)
        except RefusedError as e:
            self.sent.failures.append(e.message)

    def _together(self, wave: Sequence[int], arm: str | None, salts: Sequence[dict[str, str]], *, reuses: bool) -> None:
        """Ask a wave at once; without an arm, what computes the prefixes."""

        def one(i: int, salt: dict[str, str]) -> None:
            c = self.cases[i]
            if arm is None:
                self._only(c.prefix + c.seed, salt)
            else:
                self._keep(arm, i, c.prompt, len(c.prefix), salt, reuses=reuses)

        with ThreadPoolExecutor(len(wave)) as pool:
            list(pool.map(one, wave, salts))

    def extended(self, _k: int) -> None:
        for i in self._order():
            c = self.cases[i]
            self._keep("extended", i, c.prompt + c.further, len(c.prefix), self._apart(), new=1)

    def control(self, _k: int) -> None:
        """Tokens of the prefix are replaced by others of it, anywhere but in front, where a token may be special."""
        for i in self._order():
            c = self.cases[i]
            for wrong in WRONG:
                changed = list(c.prefix)
                at = self.rng.randrange(1, max(2, len(changed) - wrong))
                for j in range(at, min(at + wrong, len(changed))):
                    changed[j] = self.rng.choice([t for t in c.prefix if t != c.prefix[j]] or list(c.prefix))
                self._keep(f"control-{wrong}", i, (*changed, *c.tail), len(c.prefix), self._apart(), new=1)

    def _order(self) -> list[int]:
        return self.rng.sample(range(len(self.cases)), len(self.cases))

    def _salt(self) -> dict[str, str]:
        return {} if self.sent.cold == "flush" else {self.sent.cold: f"gate-{uuid.uuid4().hex}"}

    def _apart(self) -> dict[str, str]:
        self._flush()
        return self._salt()

    def _flush(self) -> None:
        if self.sent.cold == "flush" and not self.client.flush():
            self.sent.failures.append("the server did not flush its cache: other requests were in flight")

    def _only(self, ids: Ids, salt: dict[str, str], new: int = 1) -> None:
        try:
            self.client.ask(ids, new=new, salt=salt)
        except RefusedError as e:
            self.sent.failures.append(e.message)

    def _keep(
        self,
        arm: str,
        i: int,
        ids: Ids,
        start: int,
        salt: dict[str, str],
        *,
        new: int | None = None,
        reuses: bool = False,
    ) -> None:
        new = self.new if new is None else new
        try:
            answer = self.client.ask(ids, new=new, start=start, salt=salt, origin=self.asks and reuses)
        except RefusedError as e:
            self.sent.failures.append(f"{arm}, {self.cases[i].name}: {e.message}")
            self.sent.refused.setdefault(arm, {})[i] = e.message
            return
        self.sent.arms.setdefault(arm, {})[i] = answer

"""What others saw of the same server, against the ledger: independent witnesses of reuse.

| witness | what a line or file holds | what is asked |
|---|---|---|
| answers | JSONL, a line an answer of `/generate` or its `meta_info` | cached tokens, by tier, are the ledger's |
| KV events | JSONL, a line a batch as SGLang publishes it: `[ts, events]` | reused pages were stored |
| metrics | two scrapes of `/metrics` (`before=FILE`, `after=FILE`) | counters grew by what the ledger has |
| canary | the server's log with `[canary]` lines (SGLang's `kv_canary`) | it saw no violation |

A witness is recognised by what it holds. Each mismatch is one sentence; what a witness cannot speak of is a note. One
that speaks of nothing of this run is no witness for it: that is a violation too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.verify.check import Check

SLACK = 1.0
"""Seconds by which a batch of events may be stamped later than the forward that already reuses its entries: SGLang
stamps it when it publishes, after the forward that follows."""
_FIX = "answers (`meta_info`), KV events, two scrapes of /metrics as before=FILE and after=FILE, or a log with [canary]"
_COUNTERS = {
    "sglang:prompt_tokens_total": "prompt tokens",
    "sglang:generation_tokens_total": "generated tokens",
    "sglang:cached_tokens_total": "cached tokens",
    "sglang:num_requests_total": "requests",
}
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+([-+.\deEinfNa]+)\s*$")
_CANARY = re.compile(r"\[canary\] step=(\d+) .*?violations=(\d+)")


@dataclass
class Witnesses:
    """What was given, by kind."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    batches: list[tuple[float, list[dict[str, Any]]]] = field(default_factory=list)
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    canary: list[tuple[int, int]] = field(default_factory=list)
    """Step and violations so far."""
    canary_said: list[str] = field(default_factory=list)


def read_witnesses(given: Sequence[str]) -> Witnesses:
    """Read the files.

    Args:
        given: paths, those of scrapes as `before=PATH` and `after=PATH`.

    Raises:
        ConfigError: a file cannot be read, or holds no testimony.
    """
    found = Witnesses()
    for one in given:
        when, _, rest = one.partition("=")
        path = Path(rest if when in ("before", "after") else one)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"witness {path} cannot be read: {e}", fix=_FIX) from e
        if when in ("before", "after"):
            setattr(found, when, counters(text, str(path)))
        elif "[canary]" in text or "kv_canary" in text:
            _read_log(found, text, str(path))
        elif text.lstrip().startswith(("{", "[")):
            _read_lines(found, text, str(path))
        else:
            raise ConfigError(f"witness {path} holds no testimony", fix=_FIX)
    if (found.before is None) != (found.after is None):
        raise ConfigError("one scrape of /metrics says nothing", fix="give before=FILE and after=FILE")
    return found


def counters(text: str, where: str) -> dict[str, float]:
    """Sums of SGLang's counters over their labels, of a scrape of `/metrics`.

    Raises:
        ConfigError: there are none.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample and sample[1] in _COUNTERS:
            found[sample[1]] = found.get(sample[1], 0.0) + float(sample[3])
    if not found and "sglang" not in text:
        raise ConfigError(f"{where} is no scrape of SGLang's /metrics", fix="start the server with --enable-metrics")
    return found


def _read_lines(found: Witnesses, text: str, where: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
        except ValueError as e:
            raise ConfigError(f"{where}, line {number}: no JSON ({e})", fix=_FIX) from e
        if isinstance(told, dict) and "meta_info" in told:
            told = told["meta_info"]
        if isinstance(told, list) and len(told) >= 2 and isinstance(told[1], list):
            told = {"ts": told[0], "events": told[1]}
        if isinstance(told, dict) and isinstance(told.get("events"), list) and isinstance(told.get("ts"), int | float):
            found.batches.append((float(told["ts"]), [e for e in told["events"] if isinstance(e, dict)]))
        elif isinstance(told, dict) and "cached_tokens" in told and "id" in told:
            found.answers.append(told)
        else:
            raise ConfigError(f"{where}, line {number}: neither an answer nor a batch of KV events", fix=_FIX)


def _read_log(found: Witnesses, text: str, where: str) -> None:
    reports = [(int(m[1]), int(m[2])) for m in _CANARY.finditer(text)]
    said = [line.strip()[:200] for line in text.splitlines() if "kv_canary violation" in line]
    if not reports and not said:
        raise ConfigError(f"{where} names the canary and has no report of it", fix="is it the whole log of the server?")
    found.canary += reports
    found.canary_said += said


def ask(run: Run, witnesses: Witnesses) -> list[Check]:
    """One check a kind of witness that was given."""
    checks = []
    if witnesses.answers:
        checks.append(answers_agree(run, witnesses.answers))
    if witnesses.batches:
        checks.append(events_agree(run, witnesses.batches))
    if witnesses.before is not None and witnesses.after is not None:
        checks.append(metrics_agree(run, witnesses.before, witnesses.after))
    if witnesses.canary or witnesses.canary_said:
        checks.append(canary_agrees(witnesses.canary, witnesses.canary_said))
    return checks


def answers_agree(run: Run, answers: Iterable[Mapping[str, Any]]) -> Check:
    """Cached tokens of every answer, and their tiers, are what the ledger has as reused in its first attempt."""
    name = "witness: answers"
    claim = "cached tokens of every answer, and their tiers, are what the ledger has as reused"
    spans = run.spans()
    first = spans[(spans["attempt"] == 0) & (spans["status"] == schema.REUSED)]
    by_tier = (first["end"] - first["start"]).groupby([first["rid"], first["tier"]]).sum().to_dict()
    known = set(spans["rid"])
    covered, unknown = 0, 0
    for a in answers:
        rid = str(a["id"])
        if rid not in known:
            unknown += 1
            continue
        covered += 1
        mine = _of(by_tier, rid)
        if int(a["cached_tokens"]) != sum(mine.values()):
            why = f"{rid}: its answer says {a['cached_tokens']} cached tokens, and the ledger has {sum(mine.values())}"
            return Check(name, claim, covered, "answers", f"{why} as reused")
        for tier, n in (a.get("cached_tokens_details") or {}).items():
            if tier in ("device", "host", "storage") and isinstance(n, int) and n != mine.get(tier, 0):
                why = (
                    f"{rid}: its answer says {n} cached tokens from the {tier}, and the ledger has {mine.get(tier, 0)}"
                )
                return Check(name, claim, covered, "answers", why)
    note = f"{unknown} answers are of requests that this run does not have" if unknown else None
    nothing = None if covered else "no answer is of a request of this run: nothing was compared"
    return Check(name, claim, covered, "answers", nothing, note)


def _of(by_tier: Mapping[Any, Any], rid: str) -> dict[str, int]:
    return {t: int(by_tier[rid, t]) for t in ("device", "host", "storage") if (rid, t) in by_tier}


def metrics_agree(run: Run, before: Mapping[str, float], after: Mapping[str, float]) -> Check:
    """SGLang's counters grew by what the ledger has."""
    name, claim = "witness: metrics", "SGLang's counters grew, between the two scrapes, by what the ledger has"
    ended = run.requests()
    ended = ended[ended["finish_reason"].isin(["length", "stop", "abort"])]
    spans = run.spans()
    first = spans[(spans["attempt"] == 0) & (spans["status"] == schema.REUSED) & spans["rid"].isin(ended["rid"])]
    ledger = {
        "sglang:prompt_tokens_total": int(ended["prompt_len"].sum()),
        "sglang:generation_tokens_total": int(ended["output_len"].sum()),
        "sglang:cached_tokens_total": int((first["end"] - first["start"]).sum()),
        "sglang:num_requests_total": len(ended),
    }
    if not after:
        return Check(
            name, claim, 0, "counters", "the second scrape has none of SGLang's counters: nothing was compared"
        )
    for counter, words in _COUNTERS.items():
        grew = round(after.get(counter, 0.0) - before.get(counter, 0.0))
        if grew != ledger[counter]:
            why = f"`{counter}` grew by {grew:,}, and the ledger has {ledger[counter]:,} {words} of ended requests"
            return Check(name, claim, len(ledger), "counters", why)
    return Check(name, claim, len(ledger), "counters")


def canary_agrees(steps: Sequence[tuple[int, int]], said: Sequence[str]) -> Check:
    """SGLang's own canary of slot contents saw no violation."""
    name, claim = "witness: canary", "SGLang's own canary of slot contents saw no violation"
    worst = max(steps, key=lambda s: s[1], default=(0, 0))
    why = None
    if worst[1]:
        why = f"at step {worst[0]:,} the canary had seen {worst[1]:,} violations"
    elif said:
        why = f"the canary says: {said[0]}"
    return Check(name, claim, len(steps), "reports", why)


def events_agree(run: Run, batches: Sequence[tuple[float, Sequence[Mapping[str, Any]]]]) -> Check:
    """Every page that a request reused had been stored, and not been removed, when its forward was launched.

    Pages are known by the tokens of the whole prefix; two namespaces with the same tokens are one here, because events
    name no `extra_key`. The recording must hold token ids.
    """
    name = "witness: KV events"
    claim = "every page that a request reused had been stored, and not removed, when its forward was launched"
    asked = run.requests(interrupted=True)
    if "prompt_ids" not in asked or not asked["prompt_ids"].notna().any():
        why = "the run has no token ids (`privacy: ids`), so that no page has a name: nothing was compared"
        return Check(name, claim, 0, "pages", why)
    log = _EventLog(batches)
    spans = run.spans()
    spans = spans[(spans["status"] == schema.REUSED) & (spans["tier"] == "device")].sort_values(["rid", "start"])
    launched = run.forwards().set_index("forward_id")["launched"].to_dict()
    ids_of = {r.rid: _ids(r) for r in asked.itertuples()}
    covered, older = 0, 0
    for (rid, _attempt, forward), part in spans.groupby(["rid", "attempt", "forward_id"], sort=False):
        ids, when = ids_of.get(rid), launched.get(forward)
        if ids is None or when is None:
            continue
        for end, key in log.pages(ids[: int(part["end"].max())]):
            inside = part[(part["start"] < end) & (part["end"] >= end)]
            if inside.empty:
                continue
            if inside["origin_rid"].isna().any():  # computed before the recording: so may its event be
                older += 1
                continue
            covered += 1
            if (state := log.at(key, float(when))) != "stored":
                place = f"{rid}: the ledger has positions up to {end} as reused by forward {forward}"
                said = "no event says that they were stored" if state is None else "the events say they were removed"
                return Check(name, claim, covered, "pages", f"{place}, and {said}")
    stated = run.forwards()
    window = (float(stated["launched"].min()), float((stated["launched"] + stated["seconds"]).max()))
    if (strange := log.nobodys(ids_of.values(), window)) is not None:
        why = f"the events say that a prefix of {strange[0]} tokens was stored, which no request of the run has"
        return Check(name, claim, covered, "pages", why, f"there are {strange[1]} such pages")
    notes = [f"{older} reused pages are older than the recording"] if older else []
    nothing = None
    if not covered:
        # Nothing was reused that could be asked: the events can only say that what was stored is of these requests.
        covered = log.of(ids_of.values(), window)
        notes.append("of pages that were stored: the run reused none that events could speak of")
        nothing = None if covered else "no event is of a page of this run: nothing was compared"
    return Check(name, claim, covered, "pages", nothing, "; ".join(notes) or None)


def _ids(row: Any) -> np.ndarray[Any, Any] | None:
    if row.prompt_ids is None:
        return None
    out = row.output_ids if row.output_ids is not None else []
    return np.concatenate([np.asarray(row.prompt_ids, np.int64), np.asarray(out, np.int64)])


class _EventLog:
    """Which prefixes were stored when: chains of pages, each known by the hash of its tokens and of all before."""

    def __init__(self, batches: Sequence[tuple[float, Sequence[Mapping[str, Any]]]]) -> None:
        self._key: dict[int, int] = {}  # block hash -> key of its prefix
        self._length: dict[int, int] = {0: 0}
        self._changes: dict[int, list[tuple[float, bool]]] = {}
        self._held: dict[int, int] = {}  # key -> blocks that hold it: several namespaces may
        self.page = 0
        for ts, events in batches:
            for event in events:
                self._take(ts, event)

    def _take(self, ts: float, event: Mapping[str, Any]) -> None:
        kind = event.get("type")
        if event.get("medium") not in (None, "GPU"):
            return
        if kind == "BlockStored":
            parent = event.get("parent_block_hash")
            key = 0 if parent is None else self._key.get(parent, -1)
            size = int(event["block_size"])
            tokens = event["token_ids"]
            self.page = self.page or size
            for i, block in enumerate(event["block_hashes"]):
                before = key
                key = _chain(key, tokens[i * size : (i + 1) * size])
                self._length[key] = self._length.get(before, 0) + size
                if self._key.get(block) != key:
                    self._key[block] = key
                    self._change(ts, key, +1)
        elif kind == "BlockRemoved":
            for block in event["block_hashes"]:
                if (gone := self._key.pop(block, None)) is not None:
                    self._change(ts, gone, -1)
        elif kind == "AllBlocksCleared":
            for held in list(self._key.values()):
                self._change(ts, held, -1)
            self._key.clear()

    def _change(self, ts: float, key: int, by: int) -> None:
        was = self._held.get(key, 0)
        self._held[key] = was + by
        if (was > 0) != (was + by > 0):
            self._changes.setdefault(key, []).append((ts, was + by > 0))

    def pages(self, ids: np.ndarray[Any, Any]) -> Iterable[tuple[int, int]]:
        """End and key of every whole page of a prefix."""
        key, size = 0, self.page or 1
        for end in range(size, len(ids) + 1, size):
            key = _chain(key, ids[end - size : end].tolist())
            yield end, key

    def at(self, key: int, when: float) -> str | None:
        """Whether it was stored at a time: `stored`, `removed`, or None if it never was by then.

        An entry that is in use is not evicted, and what is reused is in use from its match on, so that a removal
        stamped within the slack says nothing.
        """
        state = None
        for ts, there in self._changes.get(key, ()):
            if there and ts <= when + SLACK:
                state = "stored"
            elif not there and ts <= when - SLACK:
                state = "removed"
        return state

    def nobodys(
        self, known: Iterable[np.ndarray[Any, Any] | None], window: tuple[float, float]
    ) -> tuple[int, int] | None:
        """Length of the shortest prefix that was stored within a time and that no request has, and how many there are.

        Requests of which the run has no token ids may have stored anything: then None.
        """
        left = self._stored(window[0] + SLACK, window[1])
        for ids in known:
            if ids is None:
                return None
            left.difference_update(key for _, key in self.pages(ids))
        return (min(self._length[k] for k in left), len(left)) if left else None

    def of(self, known: Iterable[np.ndarray[Any, Any] | None], window: tuple[float, float]) -> int:
        """How many prefixes of these requests were stored within a time."""
        stored = self._stored(window[0] - SLACK, window[1] + SLACK)
        return len(stored & {key for ids in known if ids is not None for _, key in self.pages(ids)})

    def _stored(self, after: float, until: float) -> set[int]:
        """Prefixes whose first event is within that time."""
        return {key for key, changes in self._changes.items() if after < changes[0][0] <= until}


def _chain(before: int, tokens: Sequence[int]) -> int:
    return hash((before, *map(int, tokens)))

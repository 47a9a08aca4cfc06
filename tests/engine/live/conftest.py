"""A made-up engine in front of the real recorder and the real live recording."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.ledger.facts import Context, ForwardPlan, RequestEnd, Watched
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.engine.live.recording import LiveRecording
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.check import Check
from sglang_probe.verify.verify import verify

EMBEDDING = torch.randn((100, 4), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


class FakeEngine:
    """Page size 1, no overlap scheduling, every request's prefix published after its prefill and its end."""

    def __init__(self, root: Path, *, rows: bool = False, **options: Any) -> None:
        drops = options.pop("drops", True)
        monitor = options.pop("monitor", None)
        self.watch: Callable[[ForwardPlan], Watched | None] = lambda _plan: None
        """The decode rows of a forward that a monitor reads."""
        options["segments"] = {"min_seconds": 0.0, **options.get("segments", {})}
        config = EngineProbeConfig(run=root, live=LiveConfig(**options), checkpoint_seconds=0.05)
        assert config.live is not None
        facts = {"hook_points": {"hook_embed": ""} if rows else {}}
        self.live = LiveRecording(root, config.live, facts, part_seconds=0.05, drops=drops, monitor=monitor, tick=0.02)
        self._forwards = 0
        self.recorder = self._recorder(rows)
        self._rows = rows
        self._tag = 0
        self._names: dict[str, str] = {}
        self._began_before: set[str] = set()
        self.weights = 0
        self.unexplained: str | None = None
        """Why the next forward passes cannot be accounted for."""
        self.tokens: dict[str, list[int]] = {}
        self._prompt: dict[str, int] = {}
        self._cached: dict[str, int] = {}
        self.retractions: dict[str, int] = {}

    def _recorder(self, rows: bool) -> Recorder:
        lineage = Lineage(1, 10_000)
        self.live.names.remembered = lineage.remembers
        return Recorder(
            self.live.sink(),
            lineage=lineage,
            captures_rows=rows,
            first_forward=self._forwards,
            first_row=self.live.totals.rows,
            tolerant=True,
        )

    def follow(self) -> None:
        """What the session does before a launch, once the recording has begun again."""
        self.recorder = self._recorder(self._rows)
        self._began_before = set(self._names)
        self._names.clear()

    def update_weights(self, version: str) -> None:
        """The engine's weights are others from now on."""
        self.weights += 1
        self.live.weights_changed({"number": self.weights, "how": "disk", "version": version, "path": None})

    def prefill(self, rid: str, prompt: list[int], *, reused: int = 0, asking: bool = False) -> None:
        self.tokens[rid], self._prompt[rid], self._cached[rid] = list(prompt), len(prompt), reused
        self._forward("extend", [(rid, reused, len(prompt))], asking={rid} if asking else set())
        self._publish(rid, protected=reused)
        self.tokens[rid].append(99)

    def retract(self, rid: str, times: int = 1) -> None:
        """Take back what a request has; it is computed anew at once."""
        self.retractions[rid] = self.retractions.get(rid, 0) + times
        self._forward("extend", [(rid, 0, len(self.tokens[rid]))])
        self.tokens[rid].append(98)

    def decode(self, *rids: str, n: int = 1) -> None:
        for _ in range(n):
            self._forward("decode", [(r, len(self.tokens[r]) - 1, len(self.tokens[r])) for r in rids])
            for r in rids:
                self.tokens[r].append(98)

    def end(self, *rids: str, reason: str = "length") -> None:
        """End requests with a last decode step."""
        rows = [(r, len(self.tokens[r]) - 1, len(self.tokens[r])) for r in rids]
        self._forward("decode", rows, ending=rids, reason=reason)

    def _ends(self, rids: Sequence[str], reason: str) -> list[RequestEnd]:
        ended = []
        for r in rids:
            name = self._names.pop(r)
            self.live.ending(name, self.tokens[r][: self._prompt[r]])
            n = len(self.tokens[r]) + 1 - self._prompt[r]
            output = [*self.tokens[r][self._prompt[r] :], 97]
            ended.append(
                RequestEnd(name, self._prompt[r], n, self._cached[r], self.retractions.get(r, 0), reason, output)
            )
        return ended

    def serve(self, rid: str, prompt: list[int], n: int = 3, reused: int = 0) -> None:
        """A whole request."""
        self.prefill(rid, prompt, reused=reused)
        self.decode(rid, n=n - 2)
        self.end(rid)

    def flush(self) -> Path:
        asked = self.live.ask_flush()
        _wait(lambda: self.live.status()["flush"]["done"] >= asked)
        return Path(self.live.status()["flush"]["segment"])

    def _publish(self, rid: str, protected: int) -> None:
        length = self._prompt[rid]
        context = Context(np.array(self.tokens[rid]), None)
        name = self._names[rid]
        self.recorder.publish(
            name, self.retractions.get(rid, 0), context, length=length, first_new=protected, protected=protected
        )

    def _forward(
        self,
        mode: str,
        rows: list[tuple[str, int, int]],
        *,
        ending: Sequence[str] = (),
        reason: str = "",
        asking: set[str] | None = None,
    ) -> None:
        self._tag += 1
        self._names.update({r: self.live.name(r) for r, _, _ in rows if r not in self._names})
        decoding = mode == "decode"
        plan = ForwardPlan(
            self._tag,
            mode,
            [self._names[r] for r, _, _ in rows],
            [s for _, s, _ in rows],
            [e for _, _, e in rows],
            [decoding] * len(rows),
            [self.retractions.get(r, 0) for r, _, _ in rows],
            [self._prompt[r] for r, _, _ in rows],
            [None if decoding else Context(np.array(self.tokens[r]), None) for r, _, _ in rows],
            sum(e - s for _, s, e in rows),
        )
        before, self._began_before = self._began_before, self._began_before - {r for r, _, _ in rows}
        plan.began_before = frozenset(self._names[r] for r, _, _ in rows if r in before)
        plan.weights, plan.unaccounted = self.weights, self.unexplained
        self.recorder.launch(plan)
        self._forwards = plan.forward_id + 1
        self.live.launched(plan, asking or set())
        if decoding:
            plan.watched = self.watch(plan)
        if self._rows:
            plan.rows = {"hook_embed": EMBEDDING[[self.tokens[r][p] for r, s, e in rows for p in range(s, e)]]}
        self.recorder.commit(self._tag, graph=False, ended=self._ends(ending, reason))


def _wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def wait() -> Callable[..., None]:
    return _wait


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., FakeEngine]]:
    engines: list[FakeEngine] = []

    def make(name: str = "live", **options: Any) -> FakeEngine:
        engines.append(FakeEngine(tmp_path / name, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.live.close()


def checked(path: Path) -> tuple[Run, list[Check]]:
    run = load_run(path)
    return run, verify(run)


def notes(checks: list[Check]) -> str:
    return "; ".join(c.note for c in checks if c.note)


def violations(checks: list[Check]) -> list[str]:
    return [c.violation for c in checks if c.violation]

"""Who really wrote each KV slot, against what the lineage believes: for proofs alone (`EngineProbeConfig.slot_truth`).

The truth is read from the device, which nothing else here does: every forward writes the slots in `out_cache_loc` and
attends to the slots in its rows of `req_to_token`. Each read waits for the device, so that a recording with this
instrument is slow and its forwards hardly overlap; a proof makes another one without it.

Where both come from is in the inventory (`slot truth`), so that a proof is refused where SGLang fills them otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.base import Forward, Instrument
from sglang_probe.engine.ledger.facts import ForwardPlan

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig

Ints = np.ndarray[Any, np.dtype[np.int64]]
Attempt = tuple[str, int]
"""Of a request: its id and how often it had been retracted."""

NOBODY = -1
"""Owner of a slot that this recording has not seen written."""
UNKNOWN = -2
"""Owner by the lineage where it knows none."""
_EVERY = 20
"""Forwards between two reports, so that an engine that dies leaves one."""


class SlotTruth(Instrument):
    """See the module. Reports are `<slot_truth>.<data-parallel rank>.json`; `prove/owners.py` reads them."""

    name = "slot truth"
    features = ("slot truth",)
    in_model = True

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return config.slot_truth is not None

    def __init__(self, config: EngineProbeConfig) -> None:
        super().__init__(config)
        self.truth: Truth | None = None

    def open(self, config: EngineProbeConfig, scheduler: Any) -> None:
        super().open(config, scheduler)
        self.truth = None if config.slot_truth is None else Truth()

    def before(self, forward: Forward) -> None:
        plan, truth = forward.plan, self.truth
        recorder = guard.active().recorder
        if plan is None or truth is None or recorder is None:
            return
        table = forward.runner.req_to_token_pool.req_to_token
        rows = table[forward.batch.req_pool_indices.long(), : max(plan.starts, default=0)].cpu().numpy()
        truth.before([slots.astype(np.int64) for slots in rows], recorder.lineage, plan)

    def after(self, forward: Forward) -> None:
        plan, truth = forward.plan, self.truth
        if plan is None or truth is None:
            return
        slots = getattr(forward.batch, "out_cache_loc_virtual", None)
        if slots is None:  # else attention was given places of another pool; `req_to_token` has these
            slots = forward.batch.out_cache_loc
        truth.after(slots[: plan.tokens].cpu().numpy().astype(np.int64), plan)
        if truth.forwards % _EVERY == 0:
            self._report(truth.counts())

    def close(self) -> None:
        if self.truth is not None and self.truth.forwards:  # a rank that does not record compares nothing
            self._report(self.truth.counts() | self.truth.told())

    def _report(self, told: dict[str, Any]) -> None:
        assert self.config.slot_truth is not None
        path = Path(f"{self.config.slot_truth}.{guard.active().dp_rank}.json")
        path.write_text(json.dumps(told), encoding="utf-8")


class Truth:
    """The owner of every slot, as its writes were seen, and how often the lineage was asked and was wrong."""

    def __init__(self) -> None:
        self.compared = self.wrong = self.unknown = self.forwards = 0
        self.first: str | None = None
        """What was wrong first."""
        self._attempts: list[Attempt] = []
        self._numbers: dict[Attempt, int] = {}
        self._owner: Ints = np.full(1024, NOBODY, dtype=np.int64)
        """Of each slot, the number of the attempt that wrote it last."""
        self._position: Ints = np.full(1024, -1, dtype=np.int64)
        self._computed: dict[int, set[int]] = {}
        """Of each attempt, the positions that it wrote."""
        self._reused: dict[int, dict[int, int]] = {}
        """Of each attempt, the owner of every position that it did not write, when it met it first."""
        self._last: dict[int, tuple[int, Ints]] = {}
        """Of each attempt, its last forward and the owners of what lay before that."""

    def before(self, slots: list[Ints], lineage: Any, plan: ForwardPlan) -> None:
        """Compare every position that this forward attends to below its first new one.

        Args:
            slots: of each request of the plan, the slots of its positions; as many as its first new one or more.
            lineage: `owners(rid)` is what it believes.
        """
        for i, rid in enumerate(plan.rids):
            mine, start = self._number((rid, plan.attempts[i])), plan.starts[i]
            at = slots[i][:start]
            self._grow(at)
            truth, position = self._owner[at], self._position[at]
            believed = self._believed(lineage.owners(rid), mine, start)
            self._note(mine, plan.forward_id, truth)
            unknown = believed == UNKNOWN
            wrong = ~unknown & ((truth != believed) | (position != np.arange(start)))
            self.compared += start
            self.unknown += int(unknown.sum())
            self.wrong += int(wrong.sum())
            if self.first is None and wrong.any():
                p = int(wrong.argmax())
                self.first = (
                    f"forward {plan.forward_id}, {rid} position {p}: slot {at[p]} was written by "
                    f"{self._named(int(truth[p]))} as position {position[p]}, the lineage says "
                    f"{self._named(int(believed[p]))}"
                )

    def after(self, slots: Ints, plan: ForwardPlan) -> None:
        """Note who wrote which slot.

        Raises:
            IndexError: fewer slots than positions.
        """
        self._grow(slots)
        done = 0
        for rid, attempt, start, end in zip(plan.rids, plan.attempts, plan.starts, plan.ends, strict=True):
            mine, at = self._number((rid, attempt)), slots[done : done + end - start]
            if len(at) < end - start:
                raise IndexError(f"forward {plan.forward_id} wrote {len(slots)} slots, of {plan.tokens} positions")
            self._owner[at], self._position[at] = mine, np.arange(start, end)
            self._computed.setdefault(mine, set()).update(range(start, end))
            done += end - start
        self.forwards += 1

    def counts(self) -> dict[str, Any]:
        """What was compared, and what was wrong."""
        return {name: getattr(self, name) for name in ("compared", "wrong", "unknown", "forwards", "first")}

    def told(self) -> dict[str, Any]:
        """What the finished run must say: of each attempt, the owners of what it reused and those at its last forward.
        Owners are numbers of `attempts`."""
        return {
            "attempts": self._attempts,
            "reused": [[n, *zip(*sorted(of.items()), strict=True)] for n, of in self._reused.items() if of],
            "last": [[n, forward, owners.tolist()] for n, (forward, owners) in self._last.items()],
        }

    def _believed(self, origins: list[Any], mine: int, length: int) -> Ints:
        """Owner of each position by the lineage; positions above what it was told are the request's own."""
        numbers = [UNKNOWN if o.rid is None else self._number((o.rid, o.attempt)) for o in origins]
        lengths = [o.end - o.start for o in origins]
        own = max(0, length - sum(lengths))
        return np.repeat(np.array([*numbers, mine], dtype=np.int64), [*lengths, own])[:length]

    def _note(self, mine: int, forward: int, owners: Ints) -> None:
        known = len(self._last[mine][1]) if mine in self._last else 0
        computed, reused = self._computed.get(mine, set()), self._reused.setdefault(mine, {})
        for position in range(known, len(owners)):
            if position not in computed:
                reused[position] = int(owners[position])
        self._last[mine] = (forward, owners)

    def _number(self, attempt: Attempt) -> int:
        if attempt not in self._numbers:
            self._numbers[attempt] = len(self._attempts)
            self._attempts.append(attempt)
        return self._numbers[attempt]

    def _named(self, number: int) -> str:
        return "nobody" if number < 0 else "{} (attempt {})".format(*self._attempts[number])

    def _grow(self, slots: Ints) -> None:
        needed = int(slots.max(initial=0)) + 1
        if needed > len(self._owner):
            more = max(needed, 2 * len(self._owner)) - len(self._owner)
            self._owner = np.concatenate([self._owner, np.full(more, NOBODY, dtype=np.int64)])
            self._position = np.concatenate([self._position, np.full(more, -1, dtype=np.int64)])

"""A second SGLang plugin, for tests: who really wrote each KV slot, against what the lineage believes.

The truth is read from the device, which the probe itself never does: every forward writes the slots in
`out_cache_loc` and attends to the slots in its rows of `req_to_token`. Loaded through `PYTHONPATH`, without being
installed. `SLOT_ORACLE` is how the names of its reports begin, one a process; `SLOT_ORACLE_SABOTAGE` disables one
safeguard of the probe, to show that the comparison would notice.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


class Oracle:
    def __init__(self, report: Path) -> None:
        self.report = report
        self.owner: dict[int, tuple[str, int, int]] = {}  # slot -> (rid, attempt, position)
        self.compared = self.wrong = self.unknown = self.forwards = 0
        self.first: str | None = None
        self.computed: set[tuple[str, int, int]] = set()
        self.reused: dict[tuple[str, int], dict[int, tuple[str, int]]] = {}  # attempt -> position -> who computed it
        self.last: dict[
            tuple[str, int], tuple[int, list[tuple[str, int]]]
        ] = {}  # attempt -> forward, owner by position

    def before(self, runner: Any, batch: Any, recorder: Any, plan: Any) -> None:
        """Compare every position that this forward attends to below its first new one."""
        table = runner.req_to_token_pool.req_to_token
        pools = batch.req_pool_indices.tolist()
        for i, rid in enumerate(plan.rids):
            slots = table[pools[i], : plan.starts[i]].tolist()
            believed = _expand(recorder.lineage.owners(rid), rid, plan.attempts[i], len(slots))
            self._note(rid, plan.attempts[i], plan.forward_id, slots)
            for position, (slot, belief) in enumerate(zip(slots, believed, strict=True)):
                self.compared += 1
                truth = self.owner.get(slot)
                if belief[0] is None:
                    self.unknown += 1
                elif truth is None or truth[2] != position or truth[:2] != belief:
                    self.wrong += 1
                    self.first = self.first or (
                        f"forward {plan.forward_id}, {rid} position {position}: slot {slot} was written by {truth}, "
                        f"the lineage says {belief}"
                    )

    def _note(self, rid: str, attempt: int, forward: int, slots: list[int]) -> None:
        """What the finished run must say of this attempt: the origin of what it reuses, and its last owners."""
        key = (rid, attempt)
        owners = [self.owner[slot][:2] if slot in self.owner else ("", -1) for slot in slots]
        known = len(self.last[key][1]) if key in self.last else 0
        reused = self.reused.setdefault(key, {})
        for position in range(known, len(owners)):
            if (rid, attempt, position) not in self.computed:
                reused[position] = owners[position]
        self.last[key] = (forward, owners)

    def after(self, batch: Any, plan: Any) -> None:
        """Note who wrote which slot."""
        slots = iter(batch.out_cache_loc.tolist())
        for rid, attempt, start, end in zip(plan.rids, plan.attempts, plan.starts, plan.ends, strict=True):
            for position in range(start, end):
                self.owner[next(slots)] = (rid, attempt, position)
                self.computed.add((rid, attempt, position))
        self.forwards += 1
        if self.forwards % 20 == 0:
            self.write()

    def write(self) -> None:
        names = ("compared", "wrong", "unknown", "forwards", "first")
        self.report.write_text(json.dumps({name: getattr(self, name) for name in names}))

    def write_truth(self) -> None:
        """For `tests/attack/written.py`."""
        truth = {
            "reused": [[*key, *owner, position] for key, at in self.reused.items() for position, owner in at.items()],
            "last": [[*key, forward, owners] for key, (forward, owners) in self.last.items()],
        }
        self.report.with_suffix(".truth").write_text(json.dumps(truth))


def _expand(origins: list[Any], rid: str, attempt: int, length: int) -> list[tuple[str | None, int]]:
    """Believed owner of each position; positions above what the lineage was told are the request's own."""
    out: list[tuple[str | None, int]] = []
    for o in origins:
        out += [(o.rid, o.attempt)] * (o.end - o.start)
    return (out + [(rid, attempt)] * length)[:length]


def register() -> None:
    if "SLOT_ORACLE" not in os.environ or "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_probe.engine.hooks import guard
    from sglang_probe.engine.hooks.session import Session

    # Every data-parallel rank is a process of its own, with slots of its own.
    oracle = Oracle(Path(f"{os.environ['SLOT_ORACLE']}.{os.getpid()}.json"))

    def forward(original: Any, runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        session = guard.session
        plan = session.plan if session is not None else None
        if plan is None or session is None or session.recorder is None:
            return original(runner, batch, *args, **kwargs)
        oracle.before(runner, batch, session.recorder, plan)
        output = original(runner, batch, *args, **kwargs)
        oracle.after(batch, plan)
        return output

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.forward", forward, HookType.AROUND)
    original_close = Session.close

    def close_and_report(session: Any) -> None:
        original_close(session)
        if oracle.forwards:  # a tensor-parallel rank that does not record compares nothing
            oracle.write()
            oracle.write_truth()

    Session.close = close_and_report  # type: ignore[method-assign]
    if what := os.environ.get("SLOT_ORACLE_SABOTAGE"):
        from slot_sabotage import sabotage

        sabotage(what)

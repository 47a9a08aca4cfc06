"""The owners of slots that a proof reads, on a device of eight slots."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.engine.hooks import instruments, inventory
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments.base import Forward
from sglang_probe.engine.hooks.instruments.slot_truth import SlotTruth, Truth
from sglang_probe.prove.owners import read_owners
from tests.engine.made_session import make_session


@dataclass
class Plan:
    """What `Truth` reads of a `ForwardPlan`."""

    rids: list[str]
    starts: list[int]
    ends: list[int]
    forward_id: int = 0
    attempts: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        self.attempts = self.attempts[: len(self.rids)]

    @property
    def tokens(self) -> int:
        return sum(self.ends) - sum(self.starts)


def origin(rid: str | None, start: int, end: int, attempt: int = 0) -> Any:
    return SimpleNamespace(rid=rid, attempt=attempt, start=start, end=end)


class Believing:
    """A lineage that says this."""

    def __init__(self, **origins: list[Any]) -> None:
        self.origins = origins

    def owners(self, rid: str) -> list[Any]:
        return self.origins.get(rid, [])


def served() -> Truth:
    """`a` computed positions 0 to 3 into slots 4, 5, 6 and `b` shares two of them, and computes one of its own."""
    truth = Truth()
    truth.before([np.array([], dtype=np.int64)], Believing(), Plan(["a"], [0], [3]))
    truth.after(np.array([4, 5, 6]), Plan(["a"], [0], [3]))
    return truth


def ask(truth: Truth, believed: list[Any], slots: list[int], start: int = 2) -> dict[str, Any]:
    truth.before([np.array(slots)], Believing(b=believed), Plan(["b"], [start], [start + 1], forward_id=1))
    return truth.counts()


def test_a_lineage_that_is_right_is_right() -> None:
    counts = ask(served(), [origin("a", 0, 2)], [4, 5])
    assert (counts["compared"], counts["wrong"], counts["unknown"], counts["first"]) == (2, 0, 0, None)


@pytest.mark.parametrize(
    ("believed", "slots", "named"),
    [
        ([origin("c", 0, 2)], [4, 5], r"b position 0: slot 4 was written by a .attempt 0. as position 0.*says c"),
        ([origin("a", 0, 2, attempt=1)], [4, 5], r"says a .attempt 1."),
        ([origin("a", 0, 2)], [5, 4], r"position 0: slot 5 was written by a .attempt 0. as position 1"),
        ([origin("a", 0, 2)], [4, 7], r"position 1: slot 7 was written by nobody"),
        ([origin("a", 0, 1)], [4, 5], r"position 1: .*the lineage says b"),
    ],
    ids=["another request", "another attempt", "exchanged positions", "a slot never written", "taken for its own"],
)
def test_a_wrong_owner_is_named(believed: list[Any], slots: list[int], named: str) -> None:
    counts = ask(served(), believed, slots)
    assert counts["wrong"] > 0
    assert re.search(named, counts["first"])


def test_an_owner_that_the_lineage_does_not_know_is_unknown_and_not_wrong() -> None:
    counts = ask(served(), [origin(None, 0, 1), origin("a", 1, 2)], [4, 5])
    assert (counts["wrong"], counts["unknown"]) == (0, 1)


def test_a_slot_that_is_written_again_has_the_new_owner() -> None:
    truth = served()
    truth.after(np.array([5]), Plan(["c"], [1], [2], forward_id=1))
    assert ask(truth, [origin("a", 0, 1), origin("c", 1, 2)], [4, 5])["wrong"] == 0


def test_fewer_slots_than_positions_are_no_truth() -> None:
    with pytest.raises(IndexError, match="wrote 1 slots, of 2 positions"):
        Truth().after(np.array([3]), Plan(["a"], [0], [2]))


def test_the_report_says_what_the_finished_run_must_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the instrument, from tensors as SGLang has them."""
    config = EngineProbeConfig(run=tmp_path, slot_truth=tmp_path / "slots")
    running = make_session(monkeypatch, config, SlotTruth)
    (instrument,) = running.instruments
    instrument.open(config, None)
    table = torch.zeros(3, 16, dtype=torch.int32)
    table[1, :3], table[2, :3] = torch.tensor([4, 5, 6]), torch.tensor([4, 5, 7])
    runner = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=table))
    recorder = SimpleNamespace(lineage=Believing(b=[origin("a", 0, 2)]))
    monkeypatch.setattr(running, "recorder", recorder)

    def run(plan: Plan, pools: list[int], slots: list[int], physical: list[int] | None = None) -> None:
        virtual = torch.tensor([*slots, 0], dtype=torch.int32)  # padded, as of a graph
        batch = SimpleNamespace(
            req_pool_indices=torch.tensor(pools, dtype=torch.int32),
            out_cache_loc=virtual if physical is None else torch.tensor(physical),
            out_cache_loc_virtual=None if physical is None else virtual,
        )
        forward = Forward(runner, batch, plan)  # type: ignore[arg-type]
        instrument.before(forward)
        instrument.after(forward)

    run(Plan(["a"], [0], [3]), [1], [4, 5, 6], physical=[1, 0, 2])  # translated for attention; the table is not
    run(Plan(["a", "b"], [3, 2], [4, 3], forward_id=1), [1, 2], [8, 7])
    instrument.close()
    found = read_owners(tmp_path / "slots")
    assert (found.compared, found.wrong, found.unknown, found.forwards, found.violation) == (5, 0, 0, 2, None)
    assert found.reused == {("b", 0): {0: ("a", 0), 1: ("a", 0)}}
    assert found.last == {("a", 0): (1, [("a", 0)] * 3), ("b", 0): (1, [("a", 0)] * 2)}
    assert json.loads((tmp_path / "slots.0.json").read_text())["attempts"] == [["a", 0], ["b", 0]]


def test_it_is_there_for_proofs_alone(tmp_path: Path) -> None:
    plain = EngineProbeConfig(run=tmp_path)
    proof = plain.model_copy(update={"slot_truth": tmp_path / "slots"})
    assert (SlotTruth.wanted(plain), SlotTruth.wanted(proof)) == (False, True)
    features = instruments.features(proof)
    assert "slot truth" in features
    assert "slot truth" not in instruments.features(plain)
    targets = {
        f.target.target.rpartition(".")[2]: f.state for f in inventory.examine(inventory.load_inventory(), features)
    }
    assert (targets["write"], targets["alloc_for_extend"]) == ("fine", "fine")
    assert SlotTruth.serves(proof, plain)
    assert not SlotTruth.serves(plain, proof)

"""Marks of interventions in the ledger: each way in which one can be wrong is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from sglang_probe.ask import Ask
from sglang_probe.run import schema
from sglang_probe.steer_ask import Steer
from sglang_probe.verify.interventions import has_interventions, marked_as_planned
from tests.steering.toy import LIBRARY, spec

ALL, PREFILL, LATER = {}, {"phases": ["prefill"]}, {"phases": ["decode"]}
MARK = {name: spec(entry).id for name, entry in {"all": ALL, "prefill": PREFILL, "later": LATER}.items()}


class FakeRun:
    """Tables of a run: a plain request, three steered ones, and what reused their entries."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[dict[str, Any] | None, int]] = {
            "plain": (None, 10),
            "all": (ALL, 10),
            "again": (ALL, 12),
            "later": (LATER, 10),
            "prefill": (PREFILL, 10),
            "follows": (None, 14),
        }
        self.rows: list[list[Any]] = []
        self.rebound: list[list[Any]] = []
        self._computed("plain", 0, 13, None)
        self._computed("all", 0, 13, MARK["all"])
        self._reused("again", 0, 11, "all", MARK["all"])
        self._computed("again", 11, 15, MARK["all"])
        self._reused("later", 0, 9, "plain", None)
        self._computed("later", 9, 10, None)
        self._computed("later", 10, 13, MARK["later"])
        self._computed("prefill", 0, 13, MARK["prefill"])
        self._reused("follows", 0, 9, "plain", None)
        self._computed("follows", 9, 17, None)
        self.manifest: dict[str, Any] = {
            "policy": {},
            "steer": {
                "vectors": {k: {"hash": v.hash, **v.card.__dict__} for k, v in LIBRARY.items()},
                "deployment": [],
            },
        }

    def _computed(self, rid: str, start: int, end: int, mark: str | None) -> None:
        self.rows.append([rid, start, end, schema.COMPUTED, None, mark])

    def _reused(self, rid: str, start: int, end: int, origin: str, mark: str | None) -> None:
        self.rows.append([rid, start, end, schema.REUSED, origin, mark])

    def at(self, rid: str, start: int) -> list[Any]:
        return next(r for r in self.rows if r[0] == rid and r[1] == start)

    def spans(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["rid", "start", "end", "status", "origin_rid", "intervention"])

    def rebinds(self) -> pd.DataFrame:
        return pd.DataFrame(self.rebound, columns=["rid", "start", "end", "origin_rid"])

    def interventions(self) -> pd.DataFrame:
        told = []
        for rid, (entry, length) in self.asked.items():
            if entry is not None:
                one = spec(entry)
                told.append([rid, one.id, length, one.onset(length), json.dumps(one.to_json())])
        return pd.DataFrame(told, columns=schema.INTERVENTIONS.names)

    def gates(self) -> pd.DataFrame:
        return pd.DataFrame(columns=schema.GATES.names)

    def budget(self) -> pd.DataFrame:
        return pd.DataFrame(columns=schema.BUDGET.names)

    def engine_requests(self) -> pd.DataFrame:
        return pd.DataFrame([[rid, n] for rid, (_, n) in self.asked.items()], columns=["rid", "prompt_len"])

    def requests(self, *, interrupted: bool = False) -> pd.DataFrame:
        rows = []
        for rid, (entry, n) in self.asked.items():
            params = {}
            if entry is not None:
                params = Ask(steer=(Steer.model_validate({"vector": "up", "strength": 2, **entry}),)).into({})
            rows.append([rid, n, json.dumps(params), "length"])
        return pd.DataFrame(rows, columns=["rid", "prompt_len", "sampling_params", "finish_reason"])


def violation(run: Any) -> str | None:
    return marked_as_planned(run).violation


def test_a_ledger_that_is_marked_as_planned_holds() -> None:
    run: Any = FakeRun()
    assert violation(run) is None
    assert marked_as_planned(run).covered == 13 + 15 + 3 + 13
    assert has_interventions(run)


def _set(rid: str, start: int, column: int, value: Any) -> Callable[[FakeRun], None]:
    def plant(run: FakeRun) -> None:
        run.at(rid, start)[column] = value

    return plant


def _shared_with_the_plain(run: FakeRun) -> None:
    """The leak: a plain request hits a steered prefix, and the ledger says so."""
    run.at("follows", 0)[4:] = ["all", MARK["all"]]


def _clean_entries_for_the_steered(run: FakeRun) -> None:
    run.at("again", 0)[4:] = ["plain", None]


def _prefill_of_another_length(run: FakeRun) -> None:
    """Equal specifications are not enough: the prompt of one ends where the other's goes on."""
    run.asked["prefill 2"] = (PREFILL, 13)
    run._reused("prefill 2", 0, 12, "prefill", MARK["prefill"])
    run._computed("prefill 2", 12, 16, MARK["prefill"])


def _other_history(run: FakeRun) -> None:
    run.at("again", 0)[4:] = ["prefill", MARK["prefill"]]
    run.at("again", 0)[2] = 11


def _rebound(run: FakeRun) -> None:
    run.rebound.append(["plain", 3, 8, "all"])


def _unasked(run: FakeRun) -> None:
    run.requests = lambda **_: FakeRun.requests(run).assign(sampling_params="{}")  # type: ignore[method-assign]


def _counted(run: FakeRun) -> None:
    run.manifest["positions_intervened"] = 7


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (_set("all", 0, 5, None), "all positions 0 to 13: an intervention of its request had reached it"),
        (_set("plain", 0, 5, MARK["all"]), "it is marked, and no intervention of its request had reached it"),
        (_set("later", 9, 2, 11), "an intervention begins within it"),
        (_set("later", 9, 5, MARK["later"]), "it is marked, and no intervention"),
        (_set("all", 0, 5, MARK["later"]), "another intervention than its request's"),
        (_set("all", 0, 3, schema.DROPPED), "neither computed nor reused"),
        (_set("again", 0, 5, None), "written under " + MARK["all"] + ", and marked as under none"),
        (_set("follows", 0, 5, MARK["all"]), "written under no intervention, and marked as under"),
        (_shared_with_the_plain, "follows positions 0 to 9, reused from all: its interventions up to there are none"),
        (_clean_entries_for_the_steered, "again positions 0 to 11, reused from plain: its interventions"),
        (_prefill_of_another_length, "prefill 2 positions 0 to 12, reused from prefill"),
        (_other_history, "again positions 0 to 11, reused from prefill"),
        (_rebound, "plain positions 3 to 8, rebound from all"),
        (_unasked, "all: it asked for no intervention, and ran under"),
        (_counted, "44 positions are marked, and the manifest counted 7"),
    ],
)
def test_every_wrong_mark_and_every_leak_is_found(plant: Callable[[FakeRun], None], found: str) -> None:
    run: Any = FakeRun()
    plant(run)
    assert found in str(violation(run))


def test_a_shared_prompt_before_the_end_of_both_is_no_leak() -> None:
    run: Any = FakeRun()
    run.asked["prefill 2"] = (PREFILL, 13)
    run._reused("prefill 2", 0, 10, "prefill", MARK["prefill"])
    run._computed("prefill 2", 10, 16, MARK["prefill"])
    assert violation(run) is None

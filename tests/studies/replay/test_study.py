"""The floor is of two replays that did the same, and a replay that shows nothing does not pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from sglang_probe.steer_ask import Steer
from sglang_probe.steering.features import FeatureManifest
from sglang_probe.steering.resolve import spec_of
from sglang_probe.studies.replay.page import answer
from sglang_probe.studies.replay.runs import AGAIN, SHUFFLED, idle
from sglang_probe.studies.replay.stated import entries_of
from sglang_probe.studies.replay.study import ReplayResult, _differences, _gates, _within_the_floor
from tests.end_to_end.steering import make_library
from tests.steering.clamped import make_direction

STORED, ASKED = "r", "replay-0"
POINT = "blocks.1.hook_resid_post"


def _run(rid: str, opened: bool | None) -> Any:
    told = [] if opened is None else [(rid, opened)]
    return SimpleNamespace(gates=lambda: pd.DataFrame(told, columns=["rid", "opened"]))


@pytest.mark.parametrize(
    ("stored", "again", "shuffled", "says"),
    [
        (True, True, True, None),
        (None, None, None, None),
        (True, True, False, "its gate was open, and is open in the replay and closed in the other order"),
        (True, False, False, "closed in the replay"),
        (True, True, None, "not decided in the other order"),
        (None, True, True, "its gate was not decided, and is open"),
    ],
)
def test_a_gate_is_decided_as_stored_in_both_replays(stored: Any, again: Any, shuffled: Any, says: str | None) -> None:
    replay: Any = SimpleNamespace(stored=_run(STORED, stored), names=[STORED])
    check = _gates(replay, {AGAIN: _run(ASKED, again), SHUFFLED: _run(f"{ASKED}~1", shuffled)})
    assert check.holds == (says is None)
    assert says is None or says in str(check.violation)


def _rows(*points: tuple[str, bool]) -> pd.DataFrame:
    names = ["hook_point", "interventions", "positions", "median", "largest", "floor", "limit"]
    return pd.DataFrame([(p, under, 3, 0.0, 0.0, 0.0, 1e-6) for p, under in points], columns=names)


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ([(POINT, True)], True),
        ([("blocks.3.hook_resid_post", True)], True),
        ([(POINT, False)], False),
        ([("blocks.0.hook_resid_post", True), ("hook_embed", True), ("blocks.3.hook_resid_post", False)], False),
        ([("blocks.1.attn.hook_q", True)], False),
        ([], False),
    ],
)
def test_rows_before_the_interventions_show_nothing_of_them(rows: list[tuple[str, bool]], shown: bool) -> None:
    check = _within_the_floor(_rows(*rows), [POINT])
    assert check.holds == shown
    if not shown:
        assert str(check.violation).startswith("rows show nothing of it")
    empty = pd.DataFrame()
    result = ReplayResult("run", _rows(*rows), empty, empty, 4, 2, {"replay": [check]}, 1, "a" * 64, {})
    assert answer(result).startswith("The run is what" if shown else "That the run is what the manifest states is not")


def test_what_is_deployed_and_was_not_done_is_a_difference(tmp_path: Path) -> None:
    library = make_library(tmp_path / "vectors")
    listed = [make_direction(library[n], status="deployed") for n in ("up", "late")]
    manifest = FeatureManifest(model="m", model_weight_hash="a" * 64, directions=listed)
    done = spec_of([Steer.model_validate({"vector": "up", "op": "cap", "strength": -0.5})], library, where="steer")
    assert done is not None
    told = idle(manifest, entries_of(library, manifest), [done])
    assert told == ("direction `late` is `deployed`, and was asked of no request",)
    replay: Any = SimpleNamespace(stated={}, differences=told, under=2, undecided=("x",))
    assert _differences(replay).values.tolist() == [[told[0], 2], ["the server clamped, and decided no gate of it", 1]]

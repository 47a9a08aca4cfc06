"""`make bench-peers`: its prompts, its rows on disk, its comparison of them, and its page."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
MINE, HOOKS, OTHER = "sglang-probe", "transformers, hooks", "nnsight"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the benchmark by name, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "peers"))
    return importlib.import_module


def test_prompts_in_families_share_what_was_asked_and_no_two_are_alike(part: Any) -> None:
    prompts = part("prompts")
    made = prompts.shared(range(10_000), 64, 50, share=0.8, families=4)
    assert prompts.share_of(made) == pytest.approx(0.8, abs=0.01)
    assert {len(p) for p in made} == {50}
    assert len({tuple(p) for p in made}) == 64


def test_windows_of_a_text_share_nothing(part: Any) -> None:
    prompts = part("prompts")
    made = prompts.unshared(range(1000), 10, 100)
    assert [t for p in made for t in p] == list(range(1000))
    assert prompts.share_of(made) == 0


@pytest.mark.parametrize("wrong", [{"share": 0.99, "families": 4}, {"share": 0.8, "families": 3}])
def test_a_share_that_no_family_can_have_is_refused(part: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot share"):
        part("prompts").shared(range(10_000), 8, 50, **wrong)


def test_rows_come_back_from_whatever_file_they_are_in(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, compare = part("child"), part("compare")
    monkeypatch.setattr(child, "SHARD_BYTES", 40)
    writer = child.RowWriter(tmp_path, [0])
    rows = torch.arange(70.0).reshape(35, 2)
    for batch in rows.split(10):
        writer.add([batch])
    writer.flush()
    assert writer.rows == 35
    assert len(list((tmp_path / "layer-0").iterdir())) == 4
    assert compare.theirs(tmp_path, 0, [(p, list(range(5))) for p in range(7)], 5).equal(rows)


@pytest.mark.parametrize("spoil", ["shape", "nan", "swapped"])
def test_rows_that_are_not_ours_are_far_away(part: Any, spoil: str) -> None:
    compare = part("compare")
    rows = torch.eye(4) + 1
    other = {"shape": rows[:3], "nan": rows * float("nan"), "swapped": rows.flip(0)}[spoil]
    assert compare.distance(rows, rows) == 0
    assert compare.distance(other, rows) > compare.TOLERANCE


def _measured() -> dict[str, Any]:
    """Two rounds, the second on a machine of half the speed."""

    def visits(seconds: float) -> dict[str, Any]:
        common = {"bytes": 1e6, "cpu_seconds": seconds, "peak_rss_mib": 100.0, "rows": 1000, "serving_seconds": seconds}
        mine = {**common, "seconds": 2 * seconds, "reused": 0}
        return {MINE: mine, HOOKS: {**common, "seconds": seconds}, OTHER: {**common, "seconds": 3 * seconds}}

    def shared(seconds: float) -> dict[str, Any]:
        found = visits(seconds)
        found[MINE] |= {"rows": 200, "reused": 800, "seconds": seconds / 4}
        return found

    names = (MINE, HOOKS, OTHER)
    return {
        "model": "tiny",
        "machine": "a machine",
        "load": [1.0, 1.0, 1.0],
        "layers": [1, 3],
        "prompts": 10,
        "length": 100,
        "families": 2,
        "batches": [4, 16],
        "shares": {"unshared": 0.0, "shared": 0.8},
        "loaded": {n: {"load_seconds": 5.0, "versions": {"python": "3", "torch": "2"}} for n in names},
        "chosen": {MINE: {}, HOOKS: {"batch": 16, "threads": 2}, OTHER: {"batch": 4, "threads": 1}},
        "distance": dict.fromkeys(names, 1e-6),
        "missing": {"gone": "no such package"},
        "rounds": [{"unshared": visits(s), "shared": shared(s)} for s in (1.0, 2.0)],
    }


def test_a_ratio_is_taken_within_a_round(part: Any) -> None:
    page, found = part("peers_page"), _measured()
    assert page.best_other(found, "unshared") == HOOKS
    assert page.ratios(found, "unshared", MINE, HOOKS) == [0.5, 0.5]
    assert page.ratios(found, "shared", MINE, HOOKS) == [4.0, 4.0]
    assert page.rows_per_second(found, "shared", MINE) == [800.0, 400.0]
    assert page.covered_per_second(found, "shared", MINE) == [4000.0, 2000.0]


def test_the_page_says_which_goal_is_missed_and_which_peer_is_not_there(part: Any) -> None:
    lines = list(part("peers_page").verdict({"tiny": _measured()}))
    assert "**0.50** (0.50 to 0.50) of the best other, transformers, hooks" in lines[0]
    assert lines[0].endswith("The goal, 1.0, is **missed**.")
    assert lines[1].endswith("The goal, 3.0, is **reached**.")
    text = part("peers_page").page({"tiny": _measured()}, "peers.svg")
    alone = _measured()
    del alone["chosen"][OTHER]
    assert "(0.50 to 0.50) of the only other that was measured, transformers, hooks" in next(
        part("peers_page").verdict({"tiny": alone})
    )
    assert "gone could not be run here: `no such package`" in text
    assert "Batch sizes tried: 4 and 16." in text
    assert "counted from what the benchmark held" not in text


def test_the_peak_of_a_peer_does_not_begin_at_that_of_the_benchmark(part: Any) -> None:
    held = torch.ones(200 << 20, dtype=torch.uint8)
    child = "import sys; sys.path.insert(0, sys.argv[1]); import child; print(child.peak_rss_mib())"
    command = [sys.executable, "-S", "-c", child, str(ROOT / "bench" / "peers")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 1 < float(done.stdout) < held.nbytes / 2**20


def test_the_committed_page_and_figure_are_what_the_script_makes_of_the_numbers(part: Any) -> None:
    page, place = part("peers_page"), ROOT / "docs" / "evidence" / "peers.md"
    every = json.loads(place.with_suffix(".json").read_text())
    assert page.page(every, "peers.svg") == place.read_text()
    assert page.figure(every) == place.with_suffix(".svg").read_text()


def test_every_peer_is_pinned_and_no_pin_names_a_registry(part: Any) -> None:
    environments = part("environments")
    pins = environments.PINS.read_text()
    lines = [line for line in pins.splitlines() if not line.startswith("#")]
    assert {need for peer in environments.PEERS for need in peer.needs} <= {line.partition("==")[0] for line in lines}
    assert all("==" in line and "/" not in line for line in lines)

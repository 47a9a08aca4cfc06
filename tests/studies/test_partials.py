"""Pieces of a study that are kept: found again where everything is the same, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from sglang_probe.errors import ProbeError
from sglang_probe.run.run import Run
from sglang_probe.studies import partials as partials_module
from sglang_probe.studies import workers
from sglang_probe.studies.partials import Partials, identity
from tests.made_run import make_run

__all__ = ["make_run"]
TABLES = {"steps": pd.DataFrame({"x": [1.0, 2.0]}), "coverage": pd.DataFrame({"rid": ["a"]})}


def test_a_piece_is_found_again_with_resume_alone(tmp_path: Path) -> None:
    Partials(tmp_path, {"window": 32}, resume=False).write("layer-003", TABLES)
    kept = Partials(tmp_path, {"window": 32}, resume=True)
    found = kept.read("layer-003")
    assert found is not None
    assert found.keys() == TABLES.keys()
    pd.testing.assert_frame_equal(found["steps"], TABLES["steps"])
    assert kept.read("layer-004") is None
    assert Partials(tmp_path, {"window": 32}, resume=False).read("layer-003") is None


def test_a_piece_of_other_settings_or_other_code_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Partials(tmp_path, {"window": 32}, resume=False).write("layer-003", TABLES)
    assert Partials(tmp_path, {"window": 16}, resume=True).read("layer-003") is None
    Partials(tmp_path, {"window": 32}, resume=False).write("layer-003", TABLES)
    monkeypatch.setattr(partials_module, "_code_digest", lambda: "changed")
    assert Partials(tmp_path, {"window": 32}, resume=True).read("layer-003") is None


def test_a_damaged_piece_is_computed_again(tmp_path: Path) -> None:
    kept = Partials(tmp_path, {}, resume=False)
    kept.write("layer-003", TABLES)
    folder = kept.path("layer-003")
    assert folder is not None
    (folder / "steps.parquet").write_bytes(b"half")
    assert kept.read("layer-003") is None
    assert kept.path("layer-003") is None


def test_a_run_is_another_when_any_of_its_rows_is(make_run: Callable[..., Run]) -> None:
    run, other = make_run("a"), make_run("b", cache=False)
    before = identity(run)
    assert before == identity(run)
    assert before["journal.jsonl"] != identity(other)["journal.jsonl"]
    (run.path / "requests.parquet").write_bytes(b"others")
    assert before != identity(run)


def piece(number: int, advance: Callable[[], None]) -> int:
    """Two documents; the piece 7 fails."""
    advance()
    advance()
    if number == 7:
        raise ProbeError("seven", fix="take another")
    return number**2


def test_processes_compute_what_one_computes_and_count_documents() -> None:
    told: dict[int, list[int]] = {1: [], 2: []}
    found = {n: dict(workers.compute([1, 2, 3], piece, processes=n, advance=told[n].append)) for n in (1, 2)}
    assert found[1] == found[2] == {1: 1, 2: 4, 3: 9}
    assert max(told[1]) == max(told[2]) == 6


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_a_piece_is_told_with_what_to_do(processes: int) -> None:
    with pytest.raises(ProbeError, match="seven") as e:
        list(workers.compute([7], piece, processes=processes))
    assert e.value.fix == "take another"


def test_few_pieces_start_no_process_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [workers.side_by_side(n) for n in (0, 1, 3, 4, 30)] == [1, 1, 1, 2, 8]
    assert [workers.side_by_side(n, 4) for n in (1, 3, 30)] == [1, 3, 4]

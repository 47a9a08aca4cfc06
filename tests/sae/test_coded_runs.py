"""Several runs are coded as one: the same codes, and each row under the name of its run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae import labels
from sglang_probe.sae.coded_run import code_run, code_runs, run_names
from sglang_probe.sae.folder import read_sae
from sglang_probe.sae.sae import SAE
from tests.studies.features.planted import planted_run, planted_sae


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs whose requests have the same names and families, and other tokens."""
    place = tmp_path_factory.mktemp("coded")
    return [planted_run(place / name, texts=8, seed=i) for i, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> SAE:
    return read_sae(planted_sae(tmp_path_factory.mktemp("coded") / "sae"))


def test_two_runs_are_coded_as_each_is_alone(runs: list[Run], sae: SAE) -> None:
    both, alone = code_runs(runs, sae), [code_run(run, sae) for run in runs]
    assert len(both) == sum(map(len, alone))
    assert both.runs == ["one", "two"]
    for name, one in zip(both.runs, alone, strict=True):
        mine = np.flatnonzero(both.rows["run"] == name)
        assert (both.codes[mine] != one.codes).nnz == 0
        columns = ["rid", "position", "token_id", "row", "family", "reused"]
        assert both.rows.iloc[mine][columns].reset_index(drop=True).equals(one.rows[columns])
    # A place of either run leads to its own text, its own row, and whether that was gathered.
    assert (both.ids[both.rows["flat"]] == both.rows["token_id"]).all()
    assert (both.row_of[both.rows["flat"]] == np.arange(len(both))).all()
    assert both.gathered.sum() == sum(one.gathered.sum() for one in alone) > 0
    there = both.texts.iloc[both.text_of_row].reset_index(drop=True)
    assert (there[["run", "rid"]] == both.rows[["run", "rid"]]).all(axis=None)


def test_whole_texts_are_drawn_from_all_runs_until_there_are_enough_rows(runs: list[Run], sae: SAE) -> None:
    some = code_runs(runs, sae, most=200, seed=3)
    assert set(some.texts["run"]) == {"one", "two"}
    # With every text it would pass, it is the smallest number of texts that reach it, first positions included.
    counts = some.rows.groupby(["run", "rid"]).size() + 1
    assert counts.sum() >= 200 > counts.sum() - counts.max()
    for (run, rid), part in some.rows.groupby(["run", "rid"]):
        whole = code_run(runs[some.runs.index(run)], sae).rows
        assert len(part) == (whole["rid"] == rid).sum()


def test_a_condition_may_leave_one_of_the_runs_without_rows(runs: list[Run], sae: SAE) -> None:
    only_first = runs[0].requests()["rid"].tolist()[:1]
    assert code_runs(runs, sae, where=f"rid == '{only_first[0]}'").rows["rid"].unique().tolist() == only_first
    with pytest.raises(ConfigError, match="2 runs: none of them"):
        code_runs(runs, sae, where="position > 9999")


def test_names_tell_runs_apart_and_none_is_given_twice(tmp_path: Path, runs: list[Run], sae: SAE) -> None:
    assert run_names([Path("/x/a/run"), Path("/x/b/run"), Path("/x/c/other")]) == ["a/run", "b/run", "c/other"]
    assert run_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    with pytest.raises(ConfigError, match="named twice"):
        code_runs([runs[0], load_run(runs[0].path)], sae)
    copy = tmp_path / "copies" / "one"
    shutil.copytree(runs[0].path, copy)
    assert len(code_runs([runs[0], load_run(copy)], sae).runs) == 2


def test_a_family_finds_labels_or_judges_them_and_never_both(runs: list[Run], sae: SAE) -> None:
    coded = code_runs(runs, sae)
    first = labels.halves(coded.texts["family"].tolist())
    sides = coded.texts.assign(first=first).groupby("family")["first"]
    assert (sides.nunique() == 1).all()
    assert (sides.size() == 2).all()  # one text of each run
    assert sides.first().sum() == 4


def test_requests_without_a_family_are_not_taken_for_those_of_another_run(tmp_path: Path, sae: SAE) -> None:
    import torch

    from tests.rows_run import Text, write_run
    from tests.studies.features.planted import FOLDER, POINT, WIDTH

    rows = {"r0": torch.randn((4, WIDTH), generator=torch.Generator().manual_seed(0))}
    pair = [
        write_run(tmp_path / n, {"r0": Text([350, 301, 302, 303])}, {POINT: rows}, model=FOLDER) for n in ("a", "b")
    ]
    assert code_runs(pair, sae).texts["family"].tolist() == ["a: r0", "b: r0"]

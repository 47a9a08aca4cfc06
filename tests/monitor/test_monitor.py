"""`sglang-probe monitor` on recorded runs: a planted drift is found where it is, and none where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.monitor.profile import kl_by_dimension, profile
from sglang_probe.monitor.trajectories import read
from sglang_probe.run.run import Run
from sglang_probe.studies.monitor.study import Options, _refuse_other_probes, monitor
from tests.declared import run_commands
from tests.monitor.stream import RESID, WIDTH, make_stream


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("streams")
    return {
        "reference": make_stream(folder / "reference", 160, seed=1),
        "usual": make_stream(folder / "usual", 60, seed=2),
        "drifted": make_stream(folder / "drifted", 60, seed=3, shift_from=30),
        "other": make_stream(folder / "other", 30, seed=4, weights="another"),
    }


@pytest.mark.parametrize("hook_point", [None, RESID])
def test_a_planted_drift_is_found_in_its_segment_and_none_in_a_usual_run(
    runs: dict[str, Run], hook_point: str | None
) -> None:
    options = Options(hook_point=hook_point, segment=30)
    found = monitor([runs["usual"].path, runs["drifted"].path], [runs["reference"].path], options)
    assert found.segments["segment"].tolist() == ["usual 1", "usual 2", "drifted 1", "drifted 2"]
    assert found.segments["trajectories"].tolist() == [30] * 4
    assert found.segments["drift"].tolist() == [False, False, False, True]
    assert set(found.events["segment"]) == {"drifted 2"}
    assert found.trajectories["rid"].tolist()[:2] == ["r00000", "r00001"]


def test_its_command_writes_a_report_without_what_is_undeclared(runs: dict[str, Run], tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["monitor", runs["drifted"].path, "--reference", runs["reference"].path, "--output", out, "--share", "0.05"]
    assert list(run_commands([[str(a) for a in args]]).values()) == [0]
    told = json.loads((out / "summary.json").read_text())
    assert told["trajectories"] == 60
    assert told["events"][0]["event"] == "retrain"
    assert told["events"][0]["place"] >= 30
    assert "For triage, not for alarms" in (out / "report.html").read_text()


def test_the_trajectories_of_scores_and_of_rows_are_the_same(runs: dict[str, Run]) -> None:
    scores, rows = read([runs["usual"]]), read([runs["usual"]], hook_point=RESID)
    assert scores.frame.equals(rows.frame)
    assert scores.names == ("watched",)
    assert rows.x_ND is not None
    assert np.array_equal(scores.values_NK[:, 0].astype(np.float32), rows.x_ND[:, 0].numpy())
    assert np.allclose(np.exp(rows.values_NK[:, 0]), rows.x_ND.norm(dim=1).numpy(), rtol=1e-5)
    first = read([runs["usual"]], rows=2)
    assert first.frame["rows"].tolist() == [2] * 60
    assert np.array_equal(first.values_NK, scores.values_NK.reshape(60, 4, 1)[:, :2].reshape(-1, 1))


def test_nothing_is_fitted_to_the_trajectories_that_are_ranked_against(runs: dict[str, Run]) -> None:
    usual, fitted, ranked = profile(read([runs["reference"]], hook_point=RESID))
    assert not set(fitted.frame["family"]) & set(ranked.frame["family"])
    assert len(fitted) + len(ranked) == 160
    assert len(usual.reference) == len(ranked) == 80
    told = fitted.values_NK.reshape(len(fitted), -1)
    assert usual.centre["log norm mean"] == pytest.approx(np.median(told.mean(1)))
    assert "mahalanobis" in usual.statistics
    # Two of the eight dimensions would do for another width: the distance is within all of them here.
    assert usual.whitening is not None
    assert usual.whitening[1].shape == (WIDTH, WIDTH)


def test_kl_is_that_of_two_normal_distributions_and_zero_of_one_with_itself() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (200_000, 2)), rng.normal([1, 0], [1, 2], (200_000, 2))
    assert kl_by_dimension(y, x) == pytest.approx([0.5, 2 - 0.5 - np.log(2)], abs=0.03)
    assert kl_by_dimension(x, x) == pytest.approx([0, 0], abs=1e-12)
    assert np.isnan(kl_by_dimension(np.ones((5, 1)), np.ones((5, 1)))).all()


@pytest.mark.parametrize(
    ("watched", "reference", "more", "says"),
    [
        ("usual", "usual", {}, "its own reference"),
        ("usual", "other", {}, "different weights"),
        ("other", "usual", {}, "different weights"),
        ("usual", "reference", {"where": "phase == 'nothing'"}, "no scores of positions"),
        ("usual", "reference", {"where": "fase == 1"}, "cannot be used"),
        ("usual", "reference", {"rows": 9}, "no trajectory has 9 rows"),
        ("usual", "reference", {"features": (3,), "hook_point": RESID}, "needs `--sae`"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    runs: dict[str, Run], watched: str, reference: str, more: dict, says: str
) -> None:
    with pytest.raises((ConfigError, RunDirectoryError), match=says):
        monitor([runs[watched].path], [runs[reference].path], Options(**more))


def test_scores_of_another_probe_of_the_same_name_are_refused(runs: dict[str, Run]) -> None:
    usual, reference = runs["usual"], runs["reference"]
    other = {"blocks.0.hook_scores": {"watched": "f" * 64}}
    one = {"blocks.0.hook_scores": {"watched": "0" * 64}}
    with_scores = [SimpleNamespace(path=r.path, manifest={"scores": s}) for r, s in ((usual, one), (reference, other))]
    with pytest.raises(ConfigError, match="are of different probes"):
        _refuse_other_probes(with_scores)  # type: ignore[arg-type]
    _refuse_other_probes(with_scores[:1])  # type: ignore[arg-type]


def test_a_small_reference_is_said_to_be_too_small_for_single_alarms(runs: dict[str, Run]) -> None:
    found = monitor([runs["reference"].path], [runs["usual"].path], Options())
    assert any("no single trajectory can alarm" in note for note in found.notes)
    assert not found.trajectories["alarm"].any()


def test_a_rate_outside_its_range_is_refused(runs: dict[str, Run], cli: Callable) -> None:
    done = cli("monitor", runs["usual"].path, "--reference", runs["reference"].path, "--share", "1.5")
    assert done.returncode == 2
    assert "--share" in done.stderr

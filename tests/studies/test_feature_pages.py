"""Pages of lens, features and diff where there is little to show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.report.page import render
from sglang_probe.studies.diff.page import diff_page
from sglang_probe.studies.diff.study import diff
from sglang_probe.studies.features.dashboard import render as dashboard
from sglang_probe.studies.features.page import features_page
from sglang_probe.studies.features.study import study
from sglang_probe.studies.lens.page import lens_page
from sglang_probe.studies.lens.study import lens
from tests.rows_run import Text, write_run
from tests.studies.features.planted import FOLDER, MEAN, POINT, WIDTH, planted_run, planted_sae


def test_a_single_text_has_labels_and_no_scores(tmp_path: Path) -> None:
    result = study(planted_run(tmp_path / "run", texts=1).path, planted_sae(tmp_path / "sae"))
    assert result.latents["detection"].isna().all()
    assert "nothing is left to judge them by" in result.notes[0]
    assert "–" in render(features_page(result))
    assert '"cards"' in dashboard(result)
    assert result.to_json()["alive"] > 0


def test_rows_in_which_nothing_fires_are_refused(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", {"a": Text([350, 351, 352])}, {POINT: {"a": torch.full((3, WIDTH), MEAN)}}, model=FOLDER
    )
    with pytest.raises(ConfigError, match="no latent of"):
        study(run.path, planted_sae(tmp_path / "sae"))


def test_a_comparison_without_a_finding_says_so(tmp_path: Path) -> None:
    run = planted_run(tmp_path / "run", texts=16)
    result = diff(planted_sae(tmp_path / "sae"), run.path, by="family", a="f?", b="f1?", permutations=200)
    page = render(diff_page(result))
    assert result.shortlist.empty
    assert "no latent was confirmed" in page
    assert result.to_json()["shortlist"] == []


def test_a_lens_without_the_last_layer_and_without_a_next_token_has_a_page(tmp_path: Path) -> None:
    rows = torch.randn((3, WIDTH), generator=torch.Generator().manual_seed(0))
    run = write_run(
        tmp_path / "run",
        {"a": Text([350, 351, 352])},
        {"blocks.0.hook_resid_post": {"a": rows}},
        model=FOLDER,
        model_config={"num_hidden_layers": 4},
    )
    result = lens(run.path, window=2)
    page = render(lens_page(result))
    assert "the last layer was not captured" in page
    hostile = replace(result, map=result.map.assign(top_text="<img src=x onerror=alert(1)>"))
    assert "<img" not in render(lens_page(hostile))

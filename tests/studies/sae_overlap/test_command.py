"""`sglang-probe sae overlap` on two recorded regimes of planted features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.report.page import render
from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.folder import write_sae
from sglang_probe.sae.sae import SAE
from sglang_probe.studies.sae_overlap.page import overlap_page
from sglang_probe.studies.sae_overlap.study import _shared_tokens, paired, study_overlap
from tests.sae.made_rows import POINT, Text, make_run_of

FEATURES, WIDTH, TEXTS, PROMPT, OUTPUT = 60, 64, 16, 5, 81
DIRECTIONS = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0][:FEATURES]
RATES = 0.4 / np.arange(1, FEATURES + 1) ** 0.5
CHANGED = 2
ROWS = TEXTS * (PROMPT + OUTPUT - 2)


def features(seed: int, factor: float = 1) -> np.ndarray[Any, Any]:
    """Magnitudes `[TEXTS, rows, FEATURES]`; one feature fires so many times as often."""
    rng, rates = np.random.default_rng(seed), RATES.copy()
    rates[CHANGED] *= factor
    size = (TEXTS, PROMPT + OUTPUT - 1, FEATURES)
    return (rng.random(size) < rates) * rng.uniform(1, 2, size)


def texts(seed: int, factor: float = 1, token: int = 1) -> list[Text]:
    x = features(seed, factor) @ DIRECTIONS + 0.3 * np.random.default_rng([seed, 1]).normal(size=(TEXTS, 1, WIDTH)) / 8
    return [Text(range(PROMPT), [token] * OUTPUT, rows) for rows in x]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("regimes")
    made = {
        "human": texts(1),
        "again": texts(1),
        "decoded": texts(2, factor=0.3, token=2),
    }
    return {name: make_run_of(folder / name, each) for name, each in made.items()}


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae")
    d = torch.from_numpy(DIRECTIONS.astype(np.float32))
    known = SAE(
        "jumprelu",
        d.T.contiguous(),
        d,
        torch.zeros(FEATURES),
        torch.zeros(WIDTH),
        threshold=torch.full((FEATURES,), 0.5),
        metadata={"hook_name": POINT},
    )
    write_sae(known, folder)
    return folder


def test_the_command_finds_the_changed_rate_and_nothing_in_the_numerics(
    cli: Callable, runs: dict[str, Run], sae: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    where = ["--where-second", "phase == 'decode'", "--draws", "99"]
    done = cli("sae", "overlap", sae, runs["human"].path, runs["decoded"].path, *where, "--output", out, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["rows"] == TEXTS * (OUTPUT - 1)
    assert told["rows_of_the_same_tokens"] == 0
    assert told["numerics"] == []
    assert told["rate_drift"]["discovered"] >= 1
    assert {p.name for p in out.iterdir()} == {"report.html", "summary.json", "tables"}
    import pandas as pd

    drift = pd.read_parquet(out / "tables" / "drift.parquet").sort_values("p")
    assert drift["latent"].iloc[0] == CHANGED
    assert drift["log2"].iloc[0] == pytest.approx(np.log2(0.3), abs=0.5)
    assert "not known" in told["notes"][0]


def test_the_same_tokens_computed_twice_differ_in_nothing(runs: dict[str, Run], sae: Path) -> None:
    found = study_overlap(sae, (runs["human"].path, runs["again"].path), draws=19)
    assert found.same_tokens == found.rows == ROWS
    row = found.numerics.iloc[0]
    assert (row["jaccard"], row["identical"]) == (1, 1)
    assert not (found.drift["q"] <= 0.05).any()
    assert not (found.turned["q"] <= 0.05).any()
    assert found.rotated["value"].tolist() == pytest.approx([1, 1])
    assert not any("cannot single out" in n for n in found.notes)
    assert any("nothing is content" in n for n in found.notes)
    assert "nothing to show, because no other dictionary" in render(overlap_page(found)).lower()


def test_rows_are_paired_by_request_and_position_and_tokens_count_up_to_the_first_that_differs(
    runs: dict[str, Run],
) -> None:
    pair = paired([runs["human"], runs["decoded"]], POINT, (None, None), Sinks(), 10**6)
    assert pair.first.tokens[["rid", "position"]].equals(pair.second.tokens[["rid", "position"]])
    assert pair.first.tokens.loc[pair.same_N, "position"].max() == PROMPT - 1
    assert pair.first.tokens["position"].min() == 1  # the first is a sink
    assert pair.same_N.sum() == TEXTS * (PROMPT - 1)
    assert len(paired([runs["human"], runs["decoded"]], POINT, (None, None), Sinks(), 50).text_N) == 50


def test_splits_need_those_of_seeds_beside_them(runs: dict[str, Run], sae: Path) -> None:
    both = (runs["human"].path, runs["decoded"].path)
    with pytest.raises(ConfigError, match="between seeds"):
        study_overlap(sae, both, other=sae)
    found = study_overlap(sae, both, other=sae, floors=[sae], draws=19)
    assert found.splits["dictionary"].tolist() == ["of the second regime", f"another seed ({sae.name})"]
    assert (found.splits[["splits", "merges"]] == 0).all(axis=None)
    assert "of the second regime" in render(overlap_page(found))


def test_runs_that_share_nothing_or_too_few_texts_are_refused(runs: dict[str, Run], sae: Path, tmp_path: Path) -> None:
    both = (runs["human"].path, runs["decoded"].path)
    with pytest.raises(ConfigError, match="no rows of the same requests"):
        study_overlap(sae, both, where=("phase == 'prefill'", "phase == 'decode'"))
    few = make_run_of(tmp_path / "few", texts(1)[:5])
    seven = make_run_of(tmp_path / "seven", texts(1)[:7])
    assert any("at least 1/64" in n for n in study_overlap(sae, (seven.path, seven.path), draws=19).notes)
    with pytest.raises(ConfigError, match="5 families"):
        study_overlap(sae, (few.path, few.path))
    other = make_run_of(tmp_path / "other", texts(1), model={"name": "m", "weights_sha256": {"w": "1"}})
    with pytest.raises(ConfigError, match="different weights"):
        study_overlap(sae, (runs["human"].path, other.path))


def test_tokens_that_were_withheld_in_both_runs_are_not_known_to_be_the_same() -> None:
    frame = pd.DataFrame({"rid": ["a", "b"], "prompt_ids": [[1, 2], [1, -1]], "output_ids": [[3, -1], [3, 4]]})
    run: Any = SimpleNamespace(requests=lambda: frame)
    assert _shared_tokens([run, run]) == {"a": 3, "b": 1}

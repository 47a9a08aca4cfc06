"""`sglang-probe sae hybrid`: which rows a mixture holds, and a planted difference between human and decoded rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.harvest.progress import Quiet
from sglang_probe.report.page import render
from sglang_probe.run.run import Run
from sglang_probe.studies.lessons import train_missing
from sglang_probe.studies.sae_hybrid import runs as hybrid_runs
from sglang_probe.studies.sae_hybrid.command import SaeHybrid
from sglang_probe.studies.sae_hybrid.config import SaeHybridConfig
from sglang_probe.studies.sae_hybrid.page import hybrid_page
from sglang_probe.studies.sae_hybrid.study import HybridResult, gaps, reconstruction, study_hybrid
from sglang_probe.studies.sae_stability.runs import scale_of
from tests.sae.lens import needs_sae_lens
from tests.sae.made_rows import POINT, Text, make_run_of
from tests.sae.planted import Array, Planted

TEXTS, PROMPT, LENGTH = 16, 4, 40
PLANTED, OWN = Planted.make(features=12, width=16), Planted.make(features=12, width=16, seed=1)
CONFIG = {
    "model": "probe-text",
    "hook_point": POINT,
    "prompt_tokens": PROMPT,
    "continuation_tokens": LENGTH,
    "shares": [0, 0.5, 1],
    "latents": 16,
    "k": 3,
    "samples": 640,
    "batch_size": 64,
    "lr": 0.01,
    "lr_warm_up_steps": 2,
    "held_out": 0.5,
}


def config(**keys: Any) -> SaeHybridConfig:
    return parse_config({**CONFIG, **keys}, SaeHybridConfig, where="test")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Human rows are of one dictionary, the model's own rows of another; decoded and prefilled again are equal."""
    folder = tmp_path_factory.mktemp("hybrid")
    prompts = [PLANTED.rows(PROMPT, seed=i).numpy() for i in range(TEXTS)]
    human = [np.vstack([p, PLANTED.rows(LENGTH, seed=100 + i).numpy()]) for i, p in enumerate(prompts)]
    own = [np.vstack([p, OWN.rows(LENGTH, seed=200 + i).numpy()]) for i, p in enumerate(prompts)]
    tokens = [[*range(100 * i, 100 * i + PROMPT + LENGTH)] for i in range(TEXTS)]

    def prefilled(rows: list[Array]) -> list[Text]:
        return [Text(t, [1], x) for t, x in zip(tokens, rows, strict=True)]

    decoded = [Text(t[:PROMPT], [5] * (LENGTH + 1), x) for t, x in zip(tokens, own, strict=True)]
    again = [Text([*t[:PROMPT], *[5] * LENGTH], [1], x) for t, x in zip(tokens, own, strict=True)]
    made = {"human": prefilled(human), "decoded": decoded, "reforward": again}
    return {name: make_run_of(folder / name, texts) for name, texts in made.items()}


def test_a_mixture_holds_the_asked_share_and_the_same_positions(runs: dict[str, Run]) -> None:
    of = config()
    rows = hybrid_runs.read_rows(of, runs)
    assert set(rows.keys["position"]) == set(range(PROMPT, PROMPT + LENGTH))
    assert len(rows.keys) + len(rows.held_out_keys) == TEXTS * LENGTH
    lessons = {x.name: x for x in hybrid_runs.lessons(of, rows)}
    assert list(lessons)[::2] == [
        "human-0-seed0",
        *(f"{s}-{n}-seed0" for s in ("decoded", "reforward") for n in (50, 100)),
    ]
    batches = {n: lessons[f"{n}-seed0"].batch(2) for n in ("human-0", "decoded-50", "decoded-100", "reforward-50")}
    human = (batches["decoded-50"] == batches["human-0"]).all(1)
    own = (batches["decoded-50"] == batches["decoded-100"]).all(1)
    assert (human ^ own).all()
    assert 0.35 < own.float().mean() < 0.65
    assert torch.equal(batches["reforward-50"], batches["decoded-50"])
    assert rows.repeated["decoded"] > 0.8  # one token again and again; the first seven have no eight before them
    assert rows.repeated["human"] == 0


def test_what_a_mixture_changes_is_paired_by_family() -> None:
    rng = np.random.default_rng(0)
    family = np.repeat(np.arange(8), 5)
    text = np.repeat(rng.normal(size=8), 5)  # families differ far more than mixtures
    errors = {
        (source, share, seed): {arm: 10 + text + add[arm] + 0.01 * rng.normal(size=40) for arm in add}
        for source, share, add in [
            ("human", 0.0, {"human": 0.0, "decoded": 2.0, "reforward": 2.0}),
            ("decoded", 1.0, {"human": 1.0, "decoded": 0.5, "reforward": 0.5}),
        ]
        for seed in (0, 1)
    }
    table = reconstruction(errors, family, 20.0, [0, 1]).set_index(["source", "arm"])
    assert table.loc[("decoded", "decoded"), "more"] == pytest.approx(-1.5 / 20, abs=1e-3)
    assert table.loc[("decoded", "decoded"), "more_high"] < -0.07
    assert table.loc[("decoded", "human"), "more_low"] > 0.04
    assert table.loc[("human", "human"), "more"] == 0
    found = gaps(errors, family, 20.0, [0, 1])["gap"]
    assert found.tolist() == pytest.approx([2 / 20, -0.5 / 20], abs=1e-3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"shares": [0.25, 1]}, "rise from 0"),
        ({"shares": [0, 1, 0.5]}, "rise from 0"),
        ({"shares": [0, 2]}, "rise from 0"),
        ({"sampling": {"max_new_tokens": 4}}, "continuation_tokens"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**keys)


def test_what_is_recorded_is_a_phase_study_of_one_replicate() -> None:
    phase = config(sampling={"temperature": 0.5}).phase
    assert (phase.replicates, phase.prompt_tokens, phase.sampling["temperature"]) == (1, PROMPT, 0.5)
    assert phase.hook_points == ["hook_embed", POINT]
    prepared: Any = SimpleNamespace(workload=SimpleNamespace(requests=range(9)))
    plan = SaeHybrid().plan(prepared, config())
    assert plan.table.frame["run"].tolist() == ["human", "decoded", "reforward"]
    assert "10, one after another" in plan.notes[1]


TAKING = {k: v for k, v in CONFIG.items() if k != "model"}


def test_runs_that_are_there_are_taken_and_not_recorded(runs: dict[str, Run]) -> None:
    folder = runs["human"].path.parent
    taking = parse_config({**TAKING, "runs": str(folder)}, SaeHybridConfig, where="test")
    prepared = hybrid_runs.prepare(taking)
    assert isinstance(prepared, dict)
    assert {n: r.path for n, r in prepared.items()} == {n: r.path for n, r in runs.items()}
    plan = SaeHybrid().plan(prepared, taking)
    assert (plan.starts, plan.table.frame["requests"].tolist()) == (0, [TEXTS] * 3)
    with pytest.raises(ConfigError, match="`sampling` was decided when `runs` were recorded"):
        parse_config({**TAKING, "runs": str(folder), "sampling": {}}, SaeHybridConfig, where="test")


def test_runs_that_are_there_stay_as_they_are(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs["human"].path.parent
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    trained: list[Any] = []
    monkeypatch.setattr(hybrid_runs, "require_sae_lens", lambda: None)
    monkeypatch.setattr(hybrid_runs, "train_missing", lambda lessons, *_, **__: trained.extend(lessons))
    monkeypatch.setattr(SaeHybrid, "study", lambda self, found, *_: found)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**TAKING, "runs": str(folder)}))
    command = SaeHybrid()
    given = {p.name: p.default for p in command.parameters()}
    given |= {"experiment": tmp_path / "mine.yaml", "output": tmp_path / "out"}
    found, _ = command.obtain(given, Console(quiet=True))
    assert (len(trained), list(found)) == (10, ["human", "decoded", "reforward"])
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("prompt", "length"), [(PROMPT - 1, LENGTH), (PROMPT, LENGTH + 1)])
def test_runs_that_were_cut_otherwise_are_refused(runs: dict[str, Run], prompt: int, length: int) -> None:
    keys = {"runs": str(runs["human"].path.parent), "prompt_tokens": prompt, "continuation_tokens": length}
    with pytest.raises(ConfigError, match=f"4 prompt tokens and 40 after them, and the YAML says {prompt} and"):
        hybrid_runs.prepare(parse_config({**TAKING, **keys}, SaeHybridConfig, where="test"))


def test_runs_of_other_texts_or_models_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def text(prompt: list[int], output: list[int]) -> list[Text]:
        return [Text(prompt, output, rng.normal(size=(len(prompt) + len(output) - 1, 4)))]

    def refused(said: str, *, again: list[int], human: list[int], weights: str = "0") -> None:
        folder = tmp_path / said[:5]
        model = {"name": "m", "weights_sha256": {"w": "0"}}
        make_run_of(folder / "human", text(human, [9]), model=model)
        make_run_of(folder / "decoded", text([1, 2], [3, 4, 5]), model=model)
        make_run_of(folder / "reforward", text(again, [9]), model={**model, "weights_sha256": {"w": weights}})
        keys = {"runs": str(folder), "prompt_tokens": 2, "continuation_tokens": 2}
        with pytest.raises(RunDirectoryError, match=said):
            hybrid_runs.prepare(parse_config({**TAKING, **keys}, SaeHybridConfig, where="test"))

    refused("is not the same text", again=[1, 2, 3, 5], human=[1, 2, 6, 6])
    refused("not the same text in all", again=[1, 2, 3, 4], human=[1, 3, 6, 6])
    refused("of another model", again=[1, 2, 3, 4], human=[1, 2, 6, 6], weights="1")


@needs_sae_lens
@pytest.mark.slow
def test_a_planted_difference_is_found_and_the_control_equals_what_it_controls(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    of = config(samples=12800)
    rows = hybrid_runs.read_rows(of, runs)
    train_missing(
        hybrid_runs.lessons(of, rows),
        tmp_path,
        recipe=of.recipe,
        latents=of.latents,
        scale=scale_of(rows.train["human"], len(rows.keys)),
        held_out=rows.held_out["human"].rows(np.arange(len(rows.held_out_keys))),
        metadata={"hook_name": POINT},
        identity=hybrid_runs.identity(of, runs),
        overwrite=False,
        resume=False,
        reporter=Quiet(),
    )
    found = study_hybrid(runs, of, tmp_path, "x")
    table = found.fvu.set_index(["source", "share", "arm"])
    assert table.loc[("decoded", 1.0, "decoded"), "more_high"] < 0
    assert table.loc[("decoded", 1.0, "human"), "more_low"] > 0
    decoded, again = (found.fvu[found.fvu["source"] == s]["fvu"].to_numpy() for s in ("decoded", "reforward"))
    assert decoded == pytest.approx(again)
    moved = found.matches.set_index(["source", "share"])["moved"]
    assert moved[("human", 0.0)] == 0
    assert moved[("decoded", 1.0)] > moved[("decoded", 0.5)] > 0
    assert "Should" not in render(hybrid_page(found))


def test_the_page_of_made_up_numbers() -> None:
    fvu = pd.DataFrame(
        [
            [s, q, arm, 0.2, 0.01, 0.005, 0.02]
            for s, q in (("human", 0.0), ("decoded", 1.0))
            for arm in ("human", "decoded")
        ],
        columns=["source", "share", "arm", "fvu", "more", "more_low", "more_high"],
    )
    of = {
        "model": {"name": "m"},
        "keys": 9,
        "rows_held_out": 4,
        "families_held_out": 2,
        "repeated_8_grams": {"human": 0.1},
    }
    of["config"] = {**config().trained(), "sampling": {}}
    empty = pd.DataFrame()
    html = render(hybrid_page(HybridResult("x", of, {}, fvu, empty, empty, empty)))
    assert "With 100% decoded rows" in html.replace("\u202f", "")
    assert "Nothing was compared" in render(hybrid_page(HybridResult("x", of, {}, empty, empty, empty, empty)))

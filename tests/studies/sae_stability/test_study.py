"""`sglang-probe sae stability`: which rows each dictionary sees, and distances beside their floors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.harvest.progress import Quiet
from sglang_probe.report.page import render
from sglang_probe.run.run import Run
from sglang_probe.sae.sae import SAE
from sglang_probe.studies.lessons import train_missing
from sglang_probe.studies.sae_stability import runs as stability_runs
from sglang_probe.studies.sae_stability.command import SaeStability
from sglang_probe.studies.sae_stability.config import SaeStabilityConfig
from sglang_probe.studies.sae_stability.page import stability_page
from sglang_probe.studies.sae_stability.study import SEED, StabilityResult, distances, matched, study_stability
from tests.sae.lens import needs_sae_lens
from tests.sae.made_rows import POINT, Text, make_run_of
from tests.sae.planted import Planted
from tests.sae.small import random_sae

TEXTS, SYSTEM, PROMPT, OUTPUT = 10, 6, 10, 15
PLANTED = Planted.make(features=12, width=16)
CONFIG = {
    "model": "probe-text",
    "workload": {"source": "documents"},
    "hook_point": POINT,
    "arms": {"off": {"cache": "off"}, "on": {}},
    "dictionaries": {"hits": {"of": "on", "rows": "computed"}, "lineage": {"of": "on"}},
    "latents": 12,
    "k": 3,
    "samples": 640,
    "batch_size": 64,
    "lr_warm_up_steps": 2,
    "lr": 0.01,
}


def config(**keys: Any) -> SaeStabilityConfig:
    given = {k: v for k, v in {**CONFIG, **keys}.items() if v is not None}
    return parse_config(given, SaeStabilityConfig, where="test")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Ten requests with one system prompt, whose rows depend on token and position alone; with and without a cache."""
    folder = tmp_path_factory.mktemp("stability")
    system = PLANTED.rows(SYSTEM, seed=5).numpy()
    own = [PLANTED.rows(PROMPT + OUTPUT - 1 - SYSTEM, seed=10 + i).numpy() for i in range(TEXTS)]
    texts = [
        Text([*range(SYSTEM), *range(50 + 4 * i, 54 + 4 * i)], [7] * OUTPUT, np.vstack([system, x]), SYSTEM)
        for i, x in enumerate(own)
    ]
    found = {name: make_run_of(folder / name, texts) for name in ("off", "off.repeat")}
    return {**found, "on": make_run_of(folder / "on", texts, cached=SYSTEM)}


def test_a_cached_harvest_lacks_the_shared_prefix_and_with_lineage_nothing(runs: dict[str, Run]) -> None:
    rows = stability_runs.read_rows(config(), runs)
    assert list(rows.harvests) == ["off", "repeat", "hits", "lineage"]
    missing = rows.keys[~rows.harvests["hits"].has]
    assert set(missing["segment"]) == {"system"}
    has_first = "t0" in set(rows.keys["rid"])
    assert len(missing) == (rows.keys["rid"].nunique() - has_first) * (SYSTEM - 1)  # position 0 is a sink
    for name in ("repeat", "lineage"):
        keys = np.arange(len(rows.keys))
        assert torch.equal(rows.harvests[name].rows(keys), rows.harvests["off"].rows(keys))
    assert not set(rows.keys["family"]) & set(rows.held_out.tokens["family"])


def test_dictionaries_share_batches_and_only_one_has_another_order(runs: dict[str, Run]) -> None:
    of = config()
    rows = stability_runs.read_rows(of, runs)
    lessons = {x.name: x for x in stability_runs.lessons(of, rows)}
    assert len(lessons) == 2 * 5
    first = lessons["off-seed0"].batch(3)
    for name in ("off-seed1", "repeat-seed0", "lineage-seed1"):
        assert torch.equal(lessons[name].batch(3), first)
    assert not torch.equal(lessons["order-seed0"].batch(3), first)
    hits = lessons["hits-seed0"].batch(3)
    same = (hits == first).all(1)
    assert 0.4 < same.float().mean() < 1  # the others are rows of the shared prefix


def test_distances_stand_over_that_of_another_order() -> None:
    a, strangers = random_sae("standard", 16, 20, seed=1), [random_sae("standard", 16, 20, seed=s) for s in (2, 3, 4)]
    near = SAE("standard", a.W_enc, a.W_dec + 0.1 * strangers[0].W_dec, a.b_enc, a.b_dec)
    saes = {("off", 0): a, ("off", 1): strangers[0], ("repeat", 0): a, ("order", 0): strangers[1], ("hits", 0): near}
    alive = {k: np.ones(20, dtype=bool) for k in saes}
    pairs = matched(saes, alive, "off")
    table = distances(pairs, "off").set_index("dictionary")
    assert table.index.tolist() == ["hits", "repeat", "order", "seed"]
    assert table.loc["repeat", "distance"] == pytest.approx(0, abs=1e-9)
    assert table.loc["hits", "of_order"] == pytest.approx(
        table.loc["hits", "distance"] / table.loc["order", "distance"]
    )
    assert 0 < table.loc["hits", "of_order"] < 0.3
    assert table.loc["repeat", "same_index"] == pytest.approx(1)
    assert np.isnan(pairs.set_index("dictionary").loc[SEED, "same_index"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"dictionaries": {"x": {"of": "nothing"}}}, "no arm"),
        ({"dictionaries": {"order": {"of": "on"}}}, "trained anyway"),
        ({"arms": {"off": {}}, "dictionaries": None}, "nothing to compare"),
        ({"hook_points": [POINT]}, "one `hook_point`"),
        ({"seeds": [0]}, "seeds"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"k": 12}, "not less than"),
        ({"rows": {"window": 4}}, "leave it out"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**keys)


def test_by_default_every_other_arm_has_a_dictionary() -> None:
    assert config(dictionaries=None).compared["on"].rows == "lineage"
    assert config().hook_points == ["hook_embed", POINT]


def test_the_plan_lists_runs_and_dictionaries() -> None:
    prepared: Any = SimpleNamespace(workload=SimpleNamespace(requests=range(8)))
    plan = SaeStability().plan(prepared, config(arms={"off": {}, "on": {}, "bf16": {"dtype": "bfloat16"}}))
    assert plan.table.frame["run"].tolist() == ["off", "off.repeat", "on", "bf16"]
    assert plan.starts == 2
    assert "10, one after another" in plan.notes[0]


def test_dictionaries_that_are_missing_are_named(runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"lacks 10 of 10 dictionaries, e\.g\. off-seed0"):
        study_stability(runs, config(), tmp_path, "x")


@needs_sae_lens
@pytest.mark.slow
def test_what_is_trained_from_equal_rows_is_equal_and_what_lacks_rows_is_not(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    of = config()
    rows = stability_runs.read_rows(of, runs)

    def train(resume: bool = False) -> None:
        train_missing(
            stability_runs.lessons(of, rows),
            tmp_path,
            recipe=of.recipe,
            latents=of.latents,
            scale=stability_runs.scale_of(rows.harvests["off"], len(rows.keys)),
            held_out=rows.held_out.x_ND,
            metadata={"hook_name": POINT},
            identity=stability_runs.identity(of, runs),
            overwrite=False,
            resume=resume,
            reporter=Quiet(),
        )

    train()
    weights = tmp_path / "dictionaries" / "off-seed0" / "sae_weights.safetensors"
    before = weights.stat().st_mtime_ns
    train(resume=True)
    assert weights.stat().st_mtime_ns == before
    found = study_stability(runs, of, tmp_path, "x")
    table = found.distances.set_index("dictionary")["distance"]
    assert table["repeat"] == pytest.approx(0, abs=1e-6)
    assert table["lineage"] == pytest.approx(0, abs=1e-6)
    assert min(table["hits"], table["order"], table["seed"]) > 1e-3
    more = found.fvu[found.fvu["dictionary"] == "repeat"]["more"]
    assert more.abs().max() < 1e-9
    html = render(stability_page(found))
    assert "another order" in html


def test_the_page_of_made_up_numbers() -> None:
    pairs = pd.DataFrame(
        [[n, s, 0.1 + 0.1 * i] for i, n in enumerate(["hits", "repeat", "order", "seed"]) for s in (0, 1)],
        columns=["dictionary", "seed", "distance"],
    ).assign(mcc=0.5, mcc_chance=0.1, mcc_encoder=0.4, shared=0.3, same_index=0.2, alive_second=9)
    pairs["above_0.7"] = 0.1
    held = {"keys": 10, "rows_held_out": 3, "families_held_out": 2, "reference": "off", "model": {"name": "m"}}
    result = StabilityResult(
        "x",
        {**held, "config": config().trained()},
        {},
        pairs,
        distances(pairs, "off"),
        pd.DataFrame({"harvest": ["hits"], "segment": ["system"], "share": [0.1], "identical": [1.0], "keys": [10]}),
        pd.DataFrame(),
        pd.DataFrame(),
        pd.DataFrame(),
    )
    html = render(stability_page(result))
    assert "moves the dictionary 0.333 times as far as another order" in html
    empty = replace(result, pairs=pairs.iloc[:0], distances=pd.DataFrame())
    assert "Nothing was compared" in render(stability_page(empty))

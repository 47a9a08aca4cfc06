"""Wrong against right: a planted feature is found and shown to be causal, others are not; cases are what they say."""

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

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError
from sglang_probe.paths import shipped
from sglang_probe.report.page import render
from sglang_probe.run.run import Run
from sglang_probe.sae.causal import alike, causal_tests, halves, least_p
from sglang_probe.sae.folder import write_sae
from sglang_probe.sae.sae import SAE
from sglang_probe.studies.debug.cases import answered, read_cases
from sglang_probe.studies.debug.page import answer, debug_page
from sglang_probe.studies.debug.study import DebugResult, _notes, debug
from sglang_probe.studies.trace.setup import prepare
from tests.rows_run import Text, write_run

FOLDER = shipped("models/probe-text/checkpoint")
POINT = "blocks.3.hook_resid_post"
WRONG, RIGHT = 300, 500
LATENTS, FAMILIES = 12, 40


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Prompts that the model answers with `WRONG` or `RIGHT`, whichever it prefers, and an SAE of the last layer whose
    feature 0 is what prefers the first; the others write where neither is read."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    prompts = {f"r{i}": rng.integers(20, 900, 9).tolist() for i in range(FAMILIES)}
    rows, texts = {}, {}
    kept: dict[str, torch.Tensor] = {}
    model.model.layers[3].register_forward_hook(
        lambda _m, _a, out: kept.__setitem__("x", (out[0] if isinstance(out, tuple) else out)[0])
    )
    for rid, ids in prompts.items():
        logits = model(torch.tensor([ids])).logits[0, -1]
        rows[rid] = kept["x"]
        texts[rid] = Text(ids, (WRONG if logits[WRONG] > logits[RIGHT] else RIGHT,), family=f"family {rid}")
    # One prompt with both answers.
    both = next(r for r, t in texts.items() if t.output[0] == WRONG)
    texts["other"] = Text(prompts[both], (RIGHT,), family=f"family {both}")
    rows["other"] = rows[both]
    read = model.model.norm.weight * (model.lm_head.weight[WRONG] - model.lm_head.weight[RIGHT])
    basis = torch.cat([read[None], torch.randn(LATENTS - 1, 256, generator=torch.Generator().manual_seed(1))])
    features = torch.linalg.qr(basis.T)[0].T.contiguous()
    features[0] *= torch.sign(features[0] @ read)
    sae = SAE("standard", features.T.contiguous(), features, torch.zeros(LATENTS), torch.zeros(256))
    place = tmp_path_factory.mktemp("debug")
    write_sae(sae.with_metadata(hook_name=POINT), place / "sae")
    run = write_run(place / "run", texts, {POINT: rows}, model=FOLDER, model_config={"num_hidden_layers": 4})
    return run, place / "sae"


@pytest.fixture(scope="module")
def found(planted: tuple[Run, Path]) -> DebugResult:
    run, sae = planted
    return debug(run.path, [sae], right=f"#{RIGHT}", wrong=f"#{WRONG}", top=4, shortlist=3, random=3)


def test_a_planted_feature_is_found_and_causal_and_the_others_are_not(found: DebugResult) -> None:
    assert found.apart
    assert len(found.cases) >= 14
    assert (found.cases["metric"] > 0).all()
    best = found.tests.iloc[0]
    assert (best["layer"], best["latent"]) == (3, 0)
    assert found.causal["latent"].tolist() == [0]
    # Without it nothing is left of the preference: it is the direction in which the two are told apart.
    tested = found.cases[found.cases["half"] == "tested in"]
    assert best["loss"] == pytest.approx(tested.groupby("family")["metric"].mean().mean(), rel=1e-3)
    assert best["loss_low"] < best["loss"] < best["loss_high"]
    assert abs(best["random"]) < 0.05 * best["loss"]
    planted = found.features[found.features["latent"] == 0].iloc[0]
    assert (planted["set"], planted["active"]) == ("wrong only", 1.0)


def test_features_are_tested_in_families_that_they_were_not_found_in(found: DebugResult) -> None:
    by_family = found.cases.groupby("family")["half"].nunique()
    assert (by_family == 1).all()
    assert set(found.cases["half"]) == {"found in", "tested in"}
    assert found.tests["families"].iloc[0] == found.cases.loc[found.cases["half"] == "tested in", "family"].nunique()


def test_few_families_give_effects_and_no_verdict(planted: tuple[Run, Path], tmp_path: Path) -> None:
    run, sae = planted
    some = [r.rid for r in run.requests().itertuples() if r.output_ids[0] == WRONG][:11]
    file = tmp_path / "cases.jsonl"
    file.write_text("\n".join(json.dumps({"rid": r, "right": f"#{RIGHT}"}) for r in some))
    found = debug(run.path, [sae], cases=file, shortlist=2, random=2)
    assert not found.apart
    assert found.tests["latent"].iloc[0] == 0
    assert found.causal.empty
    # Families enough for an interval that leaves zero out, and its prompts are those that it was found in.
    assert found.tests["p_holm"].iloc[0] <= 0.05
    told = json.loads(json.dumps(found.to_json()))
    assert not any(row["causal"] for row in told["tests"])
    assert not found.tables()["tests"]["causal"].any()
    assert "no feature is called causal" in " ".join(found.notes)
    assert "too few families" in answer(found)


def test_families_too_few_for_the_length_of_the_list_are_told(found: DebugResult) -> None:
    # The same loss in every family: no data say more.
    tests = causal_tests(np.ones((7, 5)), np.zeros((7, 5)), np.arange(7))
    assert tests["p_holm"].tolist() == [least_p(5, 7)] * 5 == [5 / 64] * 5
    assert not tests["causal"].any()
    assert causal_tests(np.ones((8, 5)), np.zeros((8, 5)), np.arange(8))["causal"].all()
    setup: Any = SimpleNamespace(readers=[])
    few = pd.DataFrame({"families": [7] * 5, "randoms": [3] * 5})
    (said,) = _notes(setup, [SimpleNamespace(family=str(i)) for i in range(28)], np.ones(28, bool), few)  # type: ignore[misc]
    assert said.startswith("7 families to test 5 features in can call none of them causal: the smallest p there is, ")
    assert not _notes(setup, [SimpleNamespace(family=str(i)) for i in range(28)], np.ones(28, bool), few[:3])  # type: ignore[misc]


def test_a_withheld_answer_is_no_wrong_one(planted: tuple[Run, Path]) -> None:
    given = {"a": ([1, 2], [WRONG]), "b": ([1, 2], [-1]), "c": ([1, -1], [WRONG]), "d": ([1, 2], [WRONG, -1])}
    names = ("prompt_ids", "output_ids")
    columns = {n: [np.array(x[i]) for x in given.values()] for i, n in enumerate(names)}
    requests = pd.DataFrame({"rid": list(given), "family": list(given), **columns})
    nobody = pd.DataFrame({"rid": []})
    run: Any = SimpleNamespace(path="run", requests=lambda: requests, interventions=lambda: nobody)
    setup: Any = SimpleNamespace(run=run, vocabulary=Vocabulary.load(FOLDER), text=str)
    assert [c.name for c in answered(setup, f"#{RIGHT}", None, 1)] == ["a", "d"]
    with pytest.raises(ConfigError, match="answers otherwise at step 2; 1 with withheld tokens"):
        answered(setup, f"#{RIGHT}", None, 2)


def test_two_continuations_are_compared_where_they_part(planted: tuple[Run, Path], tmp_path: Path) -> None:
    run, sae = planted
    setup = prepare(run.path, [sae])
    file = tmp_path / "cases.jsonl"
    outputs = run.requests().set_index("rid")["output_ids"]
    first = next(r for r, ids in outputs.items() if ids[0] == WRONG)
    file.write_text(json.dumps({"wrong_rid": first, "right_rid": "other"}) + "\n\n")
    (case,) = read_cases(setup, file)
    assert (case.wrong, case.right, len(case.ids)) == (WRONG, RIGHT, 9)
    for line, said in (
        ({"wrong_rid": "r0", "right_rid": "r1"}, "different prompts"),
        ({"wrong_rid": "r0", "right_rid": "r0"}, "say the same"),
        ({"rid": "r0"}, "has the keys rid"),
        ({"rid": "r0", "right": 5}, "named by its text"),
        ({"rid": "r0", "right": f"#{RIGHT}", "step": 2}, "not step 2"),
        ({"rid": "nobody", "right": f"#{RIGHT}"}, "no request `nobody`"),
    ):
        file.write_text("{}\n".replace("{}", json.dumps(line)))
        with pytest.raises(ConfigError, match=said):
            read_cases(setup, file)
    file.write_text("{not json")
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        read_cases(setup, file)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "name the right answer"),
        ({"right": "#5", "wrong": "#5"}, "same token"),
        ({"right": "#5", "wrong": "#6"}, "no request"),
        ({"right": f"#{RIGHT}", "step": 2}, "no request"),
    ],
)
def test_what_is_no_case_is_refused(planted: tuple[Run, Path], given: dict[str, Any], said: str) -> None:
    run, sae = planted
    with pytest.raises(ConfigError, match=said):
        debug(run.path, [sae], **given)


def _simulated(rng: np.random.Generator, effect: float, features: int = 6, families: int = 12) -> Any:
    """Three cases in a family, which share most of what they are."""
    family = np.repeat(np.arange(families), 3)
    shared = rng.normal(size=(families, features))[family]
    loss = shared + 0.3 * rng.normal(size=(len(family), features))
    loss[:, 0] += effect
    other = rng.normal(size=(families, features))[family] + 0.3 * rng.normal(size=loss.shape)
    return causal_tests(loss, other, family)


def test_the_causal_test_recovers_an_effect_and_holds_its_level_without_one() -> None:
    rng = np.random.default_rng(0)
    draws = [_simulated(rng, 2.5) for _ in range(100)]
    assert np.mean([t["causal"].iloc[0] for t in draws]) > 0.9
    covered = [t["difference_low"].iloc[0] <= 2.5 <= t["difference_high"].iloc[0] for t in draws]
    assert 0.9 <= np.mean(covered) <= 1.0
    nothing = [_simulated(rng, 0.0) for _ in range(400)]
    # Any of six features, Holm at 5 % two-sided and half of that to the side that counts; 400 draws.
    assert np.mean([t["causal"].any() for t in nothing]) <= 0.05


def test_cases_of_a_family_are_not_many_observations() -> None:
    """Were cases the units, differences of families would be called effects."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        family = np.repeat(np.arange(8), 10)
        loss = rng.normal(size=(8, 1))[family]
        zero = np.zeros_like(loss)
        assert not causal_tests(loss, zero, family)["p"].isna().any()
        hits += bool(causal_tests(loss, zero, np.arange(len(loss)))["p"].iloc[0] <= 0.05)
    assert hits > 60  # and by family at most some 5 %
    kept = [
        causal_tests(rng.normal(size=(8, 1)), np.zeros((8, 1)), np.arange(8))["p"].iloc[0] <= 0.05 for _ in range(200)
    ]
    assert np.mean(kept) <= 0.09


def test_halves_need_twelve_families_and_split_no_family() -> None:
    rng = np.random.default_rng(0)
    assert halves(np.repeat(np.arange(11), 2), rng) is None
    half = halves(family := np.repeat(np.arange(12), 2), rng)
    assert half is not None
    assert half.sum() == 12
    assert all(len({*half[family == f]}) == 1 for f in range(12))


def test_random_features_are_active_and_about_as_active() -> None:
    activity = np.array([0.0, 1.0, 1.1, 0.9, 5.0, 50.0, 1.05])
    drawn = alike(activity, 1, 1, {1}, np.random.default_rng(0))
    assert set(drawn) <= {2, 3, 4, 6}
    assert 0 not in alike(activity, 1, 6, {1}, np.random.default_rng(0))
    assert alike(np.zeros(3), 1, 2, set(), np.random.default_rng(0)) == []


def test_the_page_says_what_was_tested(found: DebugResult) -> None:
    html = render(debug_page(found))
    assert "What the wrong answer hangs on" in html
    assert "of the shortlist move it more than random ones do" in html


def test_the_command_leaves_page_summary_and_tables(cli: Callable, planted: tuple[Run, Path], tmp_path: Path) -> None:
    run, sae = planted
    given = ("--right", f"#{RIGHT}", "--wrong", f"#{WRONG}", "--shortlist", "2", "--random", "2")
    done = cli("debug", run.path, "--sae", sae, *given, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["causal"] == [{"layer": 3, "latent": 0}]
    assert "<script" not in (tmp_path / "out" / "report.html").read_text()
    assert {p.name for p in (tmp_path / "out" / "tables").glob("*.csv")} == {"cases.csv", "features.csv", "tests.csv"}

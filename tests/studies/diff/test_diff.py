"""A planted difference is found, confirmed, and told apart from one of tokens; without one the level is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from sglang_probe.errors import ConfigError
from sglang_probe.sae.coded_run import code_run
from sglang_probe.sae.differential import compare, false_discoveries, permutation_p, smallest_p, units_of
from sglang_probe.sae.folder import read_sae
from sglang_probe.studies.diff.page import shortlist_table
from sglang_probe.studies.diff.study import diff, groups
from tests.rows_run import Text, write_run
from tests.studies.features.planted import FOLDER, LATENTS, LENGTH, MEAN, POINT, directions, planted_sae

RATE, TOKENS = [0, 1], [2, 3]
"""Latents that fire more often in B: at random, and because they fire on a token that is more frequent in B."""
NOTHING = list(range(4, 40))


def draw(texts: int, rng: np.random.Generator, effect: float) -> tuple[np.ndarray, ...]:
    """Codes `[N, M]`, token, text and group of each row; texts have rates of their own."""
    length, latents = 60, 40
    group = np.repeat(np.arange(texts) % 2, length)
    text = np.repeat(np.arange(texts), length)
    frequent = 0.1 + 0.3 * effect * (group == 1)
    token = np.where(rng.random(len(group)) < frequent, 7, rng.integers(10, 20, len(group)))
    own = rng.beta(2, 20, (texts, latents))[text]
    rates = own + 0.25 * effect * ((group == 1)[:, None] & np.isin(np.arange(latents), RATE))
    fires = rng.random(own.shape) < rates
    fires[:, TOKENS] = (token == 7)[:, None]
    return fires * rng.uniform(1, 2, fires.shape), token, text, group


def test_planted_differences_are_confirmed_and_those_of_tokens_told_apart() -> None:
    codes, token, text, group = draw(40, np.random.default_rng(0), 1.0)
    units = units_of(sparse.csr_array(codes), token, text, group)
    assert not units.paired
    found = compare(units, permutations=4000, nulls=3).frame.set_index("latent")
    assert found.index[found["confirmed"]].tolist() == RATE + TOKENS
    assert found.index[found["beyond_tokens"]].tolist() == RATE
    assert found.loc[RATE, "difference"].mean() == pytest.approx(0.25, abs=0.05)
    assert found.loc[TOKENS, "matched"].abs().max() < 1e-12
    # Rates by hand: of text 0, in which a quarter of the rows or so fire.
    assert units.rate[0, 0] == pytest.approx((codes[text == 0, 0] > 0).mean())


def test_without_a_difference_the_false_discovery_rate_is_kept() -> None:
    false = 0
    for seed in range(40):
        codes, token, text, group = draw(24, np.random.default_rng([1, seed]), 0.0)
        units = units_of(sparse.csr_array(codes), token, text, group)
        false += compare(units, permutations=1000, nulls=0, seed=seed).discovered > 0
    assert false <= 6  # of 40 at 5 %: more has a chance below 1 %


def test_a_test_over_tokens_would_not_keep_it() -> None:
    """Why the unit is a text: on the same data the tokens of few texts tell groups apart that do not differ."""
    codes, token, text, group = draw(24, np.random.default_rng(2), 0.0)
    over_tokens = units_of(sparse.csr_array(codes), token, np.arange(len(text)), group)
    p = permutation_p(over_tokens.rate[:, NOTHING], over_tokens.group, permutations=500)
    assert (p < 0.05).mean() > 0.15


def test_p_values_of_permutations_are_exact_where_they_can_be_counted() -> None:
    values = np.array([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]])
    group = np.array([0, 0, 0, 1, 1, 1])
    # Two of the twenty ways to choose three of six are as far apart.
    assert permutation_p(values, group, permutations=20_000)[0] == pytest.approx(0.1, abs=0.01)
    paired = np.full((5, 1), 0.3)
    assert permutation_p(paired, np.full(5, -1), permutations=20_000)[0] == pytest.approx(2 / 32, abs=0.01)


def test_too_few_units_or_draws_to_discover_a_single_latent_are_said() -> None:
    # Five pairs: 2 of 32 sign patterns are as far from zero; three against three: 2 of 20; one against three: 1 of 4.
    assert smallest_p(np.full(5, -1), 20_000) == 2 / 32
    assert smallest_p(np.array([0, 0, 0, 1, 1, 1]), 20_000) == pytest.approx(0.1)
    assert smallest_p(np.array([0, 1, 1, 1]), 20_000) == pytest.approx(1 / 4)
    assert smallest_p(np.full(30, -1), 999) == pytest.approx(1 / 1000)
    codes, token, text, group = draw(24, np.random.default_rng(0), 1.0)
    found = compare(units_of(sparse.csr_array(codes), token, text, group), permutations=199, nulls=0)
    assert found.together == 4  # 40 latents, a p of 1/200 at least, and q of 1/20


def test_exchanged_groups_stand_beside_the_real_ones() -> None:
    codes, token, text, group = draw(40, np.random.default_rng(0), 1.0)
    found = compare(units_of(sparse.csr_array(codes), token, text, group), permutations=1000, nulls=10)
    assert found.confirmed == 4
    assert np.mean(found.null_confirmed) < 1


def test_random_halves_of_one_group_give_nothing_where_texts_are_the_unit() -> None:
    codes, token, text, group = draw(40, np.random.default_rng(0), 1.0)
    found = false_discoveries(sparse.csr_array(codes), token, text, group, splits=10, permutations=1000)
    assert [(h.group, h.units, len(h.confirmed)) for h in found] == [(0, 20, 10), (1, 20, 10)]
    assert sum(n > 0 for h in found for n in h.confirmed) <= 2


def test_groups_can_be_two_runs_whose_texts_are_compared_with_themselves(tmp_path: Path) -> None:
    """The same families in both runs; in the second one latent fires more often."""
    rng = np.random.default_rng(0)
    runs = []
    for name, rate in (("before", 0.1), ("after", 0.6)):
        texts, rows = {}, {}
        for i in range(24):
            z = (rng.random((LENGTH, LATENTS)) < 0.1) * rng.uniform(2, 6, (LENGTH, LATENTS))
            z[:, 7] = (rng.random(LENGTH) < rate) * 4.0
            texts[f"r{i}"] = Text([350, *rng.integers(300, 340, LENGTH - 1).tolist()], family=f"f{i}")
            rows[f"r{i}"] = torch.from_numpy((z @ directions() + MEAN).astype(np.float32))
        runs.append(write_run(tmp_path / name, texts, {POINT: rows}, model=FOLDER).path)
    told = diff(planted_sae(tmp_path / "sae"), runs, by="run", a="before", b="after", permutations=2000, splits=0)
    assert told.paired
    assert told.units == (24, 24)
    assert told.runs == ["before", "after"]
    assert told.shortlist["latent"].tolist() == [7]
    assert told.shortlist["difference"].iloc[0] == pytest.approx(0.5, abs=0.1)


def test_texts_with_rows_of_both_groups_are_compared_with_themselves() -> None:
    rng = np.random.default_rng(3)
    text, group = np.repeat(np.arange(20), 40), np.tile(np.repeat([0, 1], 20), 20)
    fires = rng.random((800, 5)) < np.where((group == 1)[:, None] & (np.arange(5) == 0), 0.4, 0.1)
    units = units_of(sparse.csr_array(fires.astype(float)), np.ones(800), text, group)
    assert units.paired
    assert len(units.names) == 20
    found = compare(units, permutations=2000, nulls=0).frame
    assert found["latent"][found["confirmed"]].tolist() == [0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of 32 texts whose workload labelled them, in half of which latent 7 fires often, and its SAE."""
    place = tmp_path_factory.mktemp("diff")
    rng = np.random.default_rng(0)
    texts, rows = {}, {}
    for i in range(32):
        z = (rng.random((LENGTH, LATENTS)) < 0.1) * rng.uniform(2, 6, (LENGTH, LATENTS))
        z[:, 7] = (rng.random(LENGTH) < (0.6 if i % 2 else 0.1)) * 4.0
        label = [("tone", "rude" if i % 2 else "polite")]
        family = f"{'b' if i % 2 else 'a'}/{i}"
        texts[f"r{i}"] = Text([350, *rng.integers(300, 340, LENGTH - 1).tolist()], family=family, labels=label)
        rows[f"r{i}"] = torch.from_numpy((z @ directions() + MEAN).astype(np.float32))
    return write_run(place / "run", texts, {POINT: rows}, model=FOLDER).path, planted_sae(place / "sae")


def test_groups_are_named_by_label_or_family(made: tuple[Path, Path]) -> None:
    from sglang_probe.run.run import load_run

    run = load_run(made[0])
    coded = code_run(run, read_sae(made[1]))
    by_label = groups([run], coded, "tone", "polite", "rude")
    assert (by_label == groups([run], coded, "family", "a/*", "b/*")).all()
    assert (by_label == coded.rows["rid"].str[1:].astype(int).to_numpy() % 2).all()
    for given, said in (
        (("mood", "x", "y"), "no labels along `mood`"),
        (("tone", "kind", "rude"), "called `kind`"),
        (("tone", "*", "rude"), "both name"),
    ):
        with pytest.raises(ConfigError, match=said):
            groups([run], coded, *given)


def test_the_shortlist_of_a_run_is_what_was_planted(cli: Callable, made: tuple[Path, Path], tmp_path: Path) -> None:
    run, sae = made
    given = ("--by", "tone", "--a", "polite", "--b", "rude", "--permutations", "2000")
    done = cli("diff", sae, run, *given, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [s["latent"] for s in told["shortlist"]] == [7]
    assert told["beyond_tokens"] == 1
    assert told["units"] == [16, 16]
    assert told["rows"] == [16 * (LENGTH - 1)] * 2
    assert {"report.html", "summary.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_differences_are_printed_in_percentage_points(made: tuple[Path, Path]) -> None:
    result = diff(made[1], made[0], by="tone", a="polite", b="rude", permutations=2000)
    cells = {c.header: c.cells for c in shortlist_table(result).printed()}
    said = float(cells["rate, B minus A, points"][0].replace("−", "-"))
    assert said == pytest.approx(100 * result.shortlist["difference"].iloc[0], abs=0.06)
    assert said > 40


def test_too_few_texts_are_refused(made: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="at least four"):
        diff(made[1], made[0], by="family", a="a/0", b="b/1")

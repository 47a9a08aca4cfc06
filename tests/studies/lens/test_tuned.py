"""The tuned lens: a planted map is recovered, it is chosen by other texts than those held out, and damaged or
foreign ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.eviction.likelihood import load_unembedding
from sglang_probe.paths import shipped
from sglang_probe.run.run import Run
from sglang_probe.studies.lens import tune as tune_module
from sglang_probe.studies.lens.study import lens
from sglang_probe.studies.lens.translators import (
    MANIFEST,
    Translator,
    TunedLens,
    fit,
    least_squares,
    log_probabilities,
    mean_kl,
)
from sglang_probe.studies.lens.tune import TuneResult, tune
from tests.rows_run import Text, write_run

FOLDER = shipped("models/probe-text/checkpoint")
HEAD = load_unembedding(FOLDER)
D = len(HEAD.norm_M)


def final_rows(n: int, seed: int) -> torch.Tensor:
    """Rows as the last layer's: unembeddings of a few tokens each, and noise."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(HEAD.weight_VM), (n, 3), generator=rng)
    return HEAD.weight_VM[tokens].sum(1) * 8 + 0.5 * torch.randn((n, D), generator=rng)


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """An affine map: a rotation with other lengths, and a shift. A layer has the last one's rows before it."""
    rng = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn((D, D), generator=rng))[0]
    return rotation * (0.5 + torch.rand((1, D), generator=rng)), torch.randn(D, generator=rng)


def scrambled(final_ND: torch.Tensor, planted: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    weight, bias = planted
    return (final_ND - bias) @ torch.linalg.inv(weight)


def test_a_planted_affine_map_is_recovered(planted: tuple[torch.Tensor, torch.Tensor]) -> None:
    fitted, judging, held = (final_rows(n, seed) for n, seed in ((1500, 1), (100, 2), (100, 3)))
    judge_log, held_log = log_probabilities(judging, HEAD), log_probabilities(held, HEAD)
    found = fit(scrambled(fitted, planted), fitted, scrambled(judging, planted), judge_log, HEAD, steps=0)
    plain = float(mean_kl(scrambled(held, planted), held_log, Translator.identity(D), HEAD).mean())
    tuned = float(mean_kl(scrambled(held, planted), held_log, found, HEAD).mean())
    assert found.how == "least squares"
    assert plain > 0.5
    assert tuned < 0.02 * plain
    weight, bias = planted
    torch.testing.assert_close(found.weight_DD, weight, rtol=0, atol=0.01 * float(weight.abs().max()))
    torch.testing.assert_close(found.bias_D, bias, rtol=0, atol=0.05)


def test_least_squares_weighs_relative_errors() -> None:
    """Two kinds of rows that no one map fits: those whose last row is short count as much as those whose is long."""
    x = torch.tensor([[1.0], [1.0], [2.0], [2.0]])
    final = torch.tensor([[9.0], [11.0], [0.9], [1.1]])
    found = least_squares(x, final, 0.0, 0.0)
    by_weights = [np.average(y, weights=1 / np.square(y)) for y in ([9.0, 11.0], [0.9, 1.1])]
    assert float(found(x)[0]) == pytest.approx(by_weights[0], rel=1e-5)
    assert float(found(x)[2]) == pytest.approx(by_weights[1], rel=1e-5)


def test_descent_takes_up_where_least_squares_ends(planted: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With few and noisy rows least squares is poor, and steps on the KL better it."""
    fitted, judging = final_rows(400, 1), final_rows(100, 2)
    log = log_probabilities(judging, HEAD)
    x, judge = scrambled(fitted, planted), scrambled(judging, planted)
    rng = torch.Generator().manual_seed(4)
    x, judge = (r + 0.3 * r.std() * torch.randn(r.shape, generator=rng) for r in (x, judge))
    scores = [float(mean_kl(judge, log, fit(x, fitted, judge, log, HEAD, steps=s), HEAD).mean()) for s in (0, 40)]
    assert scores[1] < 0.95 * scores[0]


def test_rows_that_say_nothing_leave_the_plain_lens() -> None:
    """The layer is the last one itself but for noise, and the rows to fit to are of no use."""
    rng = torch.Generator().manual_seed(0)
    fitted, judging = torch.randn((30, D), generator=rng), final_rows(100, 2)
    useless = torch.randn((30, D), generator=rng)
    found = fit(useless, fitted, judging, log_probabilities(judging, HEAD), HEAD, steps=0)
    assert found.how == "identity"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, planted: tuple[torch.Tensor, torch.Tensor]) -> Run:
    """Layer 1 is the last one, scrambled; layer 2 is noise, which no map can help."""
    rows: dict[str, dict[str, torch.Tensor]] = {f"blocks.{i}.hook_resid_post": {} for i in (1, 2, 3)}
    texts = {}
    for i in range(14):
        rid = f"r{i:02}"
        final = final_rows(70, 10 + i)
        rows["blocks.3.hook_resid_post"][rid] = final
        rows["blocks.1.hook_resid_post"][rid] = scrambled(final, planted)
        rows["blocks.2.hook_resid_post"][rid] = torch.randn((70, D), generator=torch.Generator().manual_seed(i))
        ids = np.random.default_rng(i).integers(20, 900, 70).tolist()
        texts[rid] = Text(ids, (7,), family=f"f{i}")
    place = tmp_path_factory.mktemp("tuned") / "run"
    return write_run(place, texts, rows, model=FOLDER, model_config={"num_hidden_layers": 4})


@pytest.fixture(scope="module")
def tuned(run: Run) -> TuneResult:
    return tune(run.path, steps=0)


def test_what_is_held_out_chooses_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # Better on what it is chosen by, for all that `tune` knows.
    upside_down = Translator(-torch.eye(D), torch.zeros(D), "descent")
    monkeypatch.setattr(tune_module, "fit", lambda *_, **__: upside_down)
    found = tune(run.path, steps=0)
    layers = found.layers.set_index("layer")
    assert (layers["how"] == "descent").all()
    assert found.lens.translators[1] is upside_down
    assert layers.loc[1, "tuned"] > layers.loc[1, "plain"]
    # By family, and families have as many rows each.
    assert layers.loc[1, "saved"] == pytest.approx(layers.loc[1, "plain"] - layers.loc[1, "tuned"], rel=1e-5)
    assert any("is worse than the plain lens on held-out texts" in note for note in found.notes)


def test_a_planted_map_is_found_and_noise_gets_none_that_is_worse(tuned: TuneResult) -> None:
    layers = tuned.layers.set_index("layer")
    assert (layers["tuned"] <= layers["plain"]).all()
    assert layers.loc[1, "tuned"] < 0.5 * layers.loc[1, "plain"]
    assert layers.loc[1, "tuned_agreement"] > layers.loc[1, "plain_agreement"] + 0.2
    assert set(tuned.lens.translators) == {1, 2}
    by_use = tuned.lens.manifest["families"]
    assert not set(by_use["fit"]) & set(by_use["held out"])
    assert sum(map(len, by_use.values())) == 14


def test_the_lens_reads_through_it_and_shows_the_plain_one_beside(run: Run, tuned: TuneResult, tmp_path: Path) -> None:
    tuned.lens.write(tmp_path)
    plain, read = lens(run.path), lens(run.path, tuned=tmp_path)
    keys = ["rid", "position", "layer"]
    both = plain.readings.set_index(keys).join(read.readings.set_index(keys), rsuffix="_tuned")
    first = both.xs(1, level="layer")
    assert first["plain_kl"].to_numpy() == pytest.approx(first["kl"].to_numpy(), rel=1e-4, abs=1e-5)
    assert first["kl_tuned"].mean() < 0.5 * first["kl"].mean()
    last = both.xs(3, level="layer")
    assert (last["top_token"] == last["top_token_tuned"]).all()
    assert any("trained on texts of this run" in n for n in read.notes)
    assert read.to_json()["tuned_lens"] == tmp_path.name


def test_a_tuned_lens_comes_back_as_it_was_written(tuned: TuneResult, tmp_path: Path) -> None:
    tuned.lens.write(tmp_path)
    again = TunedLens.read(tmp_path, width=D, weights_sha256=None)
    for layer, t in tuned.lens.translators.items():
        assert torch.equal(again.translators[layer].weight_DD, t.weight_DD)
        assert again.translators[layer].how == t.how


def test_damaged_and_foreign_lenses_are_refused(tuned: TuneResult, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tuned lens"):
        TunedLens.read(tmp_path / "nothing", width=D, weights_sha256=None)
    tuned.lens.write(tmp_path)
    with pytest.raises(ConfigError, match="with other weights"):
        TunedLens.read(tmp_path, width=D, weights_sha256={"model.safetensors": "0" * 64})
    with pytest.raises(ConfigError, match="for rows of width 8"):
        TunedLens.read(tmp_path, width=8, weights_sha256=None)
    told = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**told, "translators_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match="does not belong"):
        TunedLens.read(tmp_path, width=D, weights_sha256=None)


def test_what_cannot_be_tuned_is_said(run: Run, tmp_path: Path) -> None:
    rows = {"blocks.1.hook_resid_post": {"a": torch.randn(6, D)}}
    bare = write_run(tmp_path / "bare", {"a": Text([1] * 6)}, rows, model=FOLDER, model_config={"num_hidden_layers": 4})
    with pytest.raises(ConfigError, match="lacks rows after the model's last layer"):
        tune(bare.path)
    with pytest.raises(ConfigError, match="families of texts are too few"):
        tune(run.path, where="rid < 'r04'")


def test_the_command_writes_what_lens_reads(cli: Callable, run: Run, tmp_path: Path) -> None:
    done = cli("tune-lens", run.path, "--steps", "0", "--most", "600", "--output", tmp_path / "lens", "--json")
    assert done.returncode == 0, done.stderr
    assert [r["layer"] for r in json.loads(done.stdout)["layers"]] == [1, 2]
    assert lens(run.path, tuned=tmp_path / "lens").tuned == "lens"
    assert "<script" not in (tmp_path / "lens" / "report.html").read_text()

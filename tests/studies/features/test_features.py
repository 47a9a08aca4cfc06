"""Planted features are found and named; labels of others and of random directions are at chance; the page is safe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae import labels, neighbours
from sglang_probe.sae.folder import read_sae
from sglang_probe.sae.manifest import KEY, refuse_other_model
from sglang_probe.studies.features.dashboard import collect, render, write_dashboard
from sglang_probe.studies.features.study import FeaturesResult, study
from tests.studies.features.planted import FOLDER, LATENTS, SETS, directions, planted_run, planted_sae


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> FeaturesResult:
    place = tmp_path_factory.mktemp("planted")
    run = planted_run(place / "run")
    return study(run.path, planted_sae(place / "sae"))


def test_planted_features_are_named_by_the_token_set_rule(found: FeaturesResult) -> None:
    for latent, tokens in enumerate(SETS):
        assert set(found.rules.tokens[latent].tolist()) == set(tokens)
    planted = found.latents.iloc[: len(SETS)]
    assert (planted[["f1", "precision", "recall"]] == 1).all(axis=None)
    # Windows without a firing of the latent have none of its tokens.
    assert (planted["detection"] == 1).all()
    assert (planted["fuzzing"] == 1).all()


def test_the_rule_takes_a_frequent_token_that_fires_now_and_then_before_a_rare_one_that_fired_once() -> None:
    token = np.concatenate([np.full(300, 1), np.full(50, 2), np.arange(100, 140), np.full(1000, 3)])
    fires = np.zeros((len(token), 1), dtype=np.float32)
    fires[:120] = 1  # two in five of a frequent token
    fires[300:345] = 1  # nearly always on another
    fires[350:352] = 1  # once each on two that are there once
    fires[390:400] = 1  # hardly ever on what is most frequent
    found = labels.token_rules(sparse.csr_array(fires), token)
    assert found.tokens[0].tolist() == [1, 2]
    assert found.precision[0] == pytest.approx(165 / 350)
    assert found.recall[0] == pytest.approx(165 / 177)
    assert found.f1[0] == pytest.approx(2 * 165 / (350 + 177))


def test_what_fires_at_random_has_no_label_that_holds_on_other_texts(found: FeaturesResult) -> None:
    at_random = found.latents.iloc[[6, 7, 8, 9, 11]]
    assert at_random["f1"].max() < 0.5
    assert at_random["fuzzing"].mean() == pytest.approx(0.5, abs=0.1)
    assert found.latents.loc[10, "label"] == "never fires here"
    assert np.isnan(found.latents.loc[10, "detection"])


def test_labels_of_other_latents_are_at_chance(found: FeaturesResult) -> None:
    assert found.latents.loc[: len(SETS) - 1, "detection_shuffled"].mean() == pytest.approx(0.5, abs=0.1)
    assert found.latents.loc[: len(SETS) - 1, "fuzzing_shuffled"].mean() == pytest.approx(0.5, abs=0.1)


def test_random_directions_have_no_label_where_rows_are_noise() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 16)).astype(np.float32)
    fires = labels.random_directions(x, np.full(20, 0.05))
    assert np.diff(fires.tocsc().indptr).tolist() == [200] * 20  # as often as they were told
    rules = labels.token_rules(labels.fired(fires), rng.integers(0, 50, 4000))
    assert rules.f1.max() < 0.3


def test_rates_are_counted_by_class_on_computed_rows_alone(found: FeaturesResult) -> None:
    rows, fires = found.coded.rows, found.coded.codes[:, [7]].toarray()[:, 0] > 0
    assert len(rows) == 40 * 40 + 1 - 40 - 9  # with one decoded; no first positions, and no reused ones
    rates = found.rates.set_index(["latent", "axis", "class"])["rate"]
    inside = rows["position"].between(16, 31).to_numpy()
    assert rates[7, "position", "16 to 31"] == pytest.approx(fires[inside].mean())
    prefill = (rows["phase"] == "prefill").to_numpy()
    assert rates[7, "phase", "prefill"] == pytest.approx(fires[prefill].mean())
    assert found.latents.loc[7, "rate"] == pytest.approx(fires.mean())


def test_examples_are_the_strongest_rows_and_name_request_and_position(found: FeaturesResult) -> None:
    coded = found.coded
    top = found.examples[(found.examples["latent"] == 0) & (found.examples["bin"] == "top")]
    assert top["rid"].is_unique  # one of a text while there are others
    values = coded.codes[:, [0]].toarray()[:, 0]
    assert top["activation"].iloc[0] == values.max()
    for e in top.itertuples():
        row = coded.rows[(coded.rows["rid"] == e.rid) & (coded.rows["position"] == e.position)].iloc[0]
        assert row["token_id"] in SETS[0]
        assert values[row.name] == pytest.approx(e.activation)
    weak = found.examples[(found.examples["latent"] == 0) & (found.examples["bin"] == "1")]
    assert weak["activation"].max() <= np.quantile(values[values > 0], 0.3)


def test_what_fires_together_is_a_cluster_and_a_neighbour(found: FeaturesResult) -> None:
    cluster = found.latents["cluster"]
    assert cluster[6] == cluster[9] == 0
    assert (cluster.drop([6, 9]) == -1).all()
    near = found.near[(found.near["by"] == "firing") & (found.near["latent"] == 6)].iloc[0]
    assert (near["neighbour"], near["value"]) == (9, 1)


def test_neighbours_by_decoder_leave_dead_latents_out() -> None:
    d = np.array([[1, 0], [0.8, 0.6], [0, 1], [1, 0.01]])
    near = neighbours.by_decoder(d, np.array([True, True, True, False]), k=2)
    assert near.latent[0].tolist() == [1, 2]
    assert near.value[0, 0] == pytest.approx(0.8)
    assert near.latent[3].tolist() == [-1, -1]


def test_clusters_do_not_link_latents_that_fire_at_the_same_rate_apart() -> None:
    rng = np.random.default_rng(0)
    fires = rng.random((5000, 30)) < 0.02
    fires[:, 1] = fires[:, 0]
    # Dense ones fire in the same rows by chance alone: two in three of either's rows are the other's.
    fires[:, 2:6] = rng.random((5000, 4)) < 0.7
    found = neighbours.clusters(sparse.csr_array(fires.astype(np.float32)))
    assert found[:2].tolist() == [0, 0]
    assert (found[2:] == -1).all()


def test_planted_clusters_of_several_sizes_are_recovered_whole_and_largest_first() -> None:
    """Members fire in four of five rows in which their cluster is on, and now and then alone."""
    rng = np.random.default_rng(0)
    planted = np.repeat([2, 0, 1, -1], [3, 6, 4, 40])
    on = rng.random((8000, 3)) < 0.03
    fires = rng.random((8000, len(planted))) < 0.004
    for k in range(3):
        fires[:, planted == k] |= on[:, [k]] & (rng.random((8000, int((planted == k).sum()))) < 0.8)
    fires[:, planted < 0] |= rng.random((8000, 40)) < 0.03  # as frequent, and each by itself
    matrix = sparse.csr_array(fires.astype(np.float32))
    assert neighbours.clusters(matrix).tolist() == planted.tolist()
    near = neighbours.by_firing(matrix, k=2)
    members = np.flatnonzero(planted >= 0)
    assert (planted[near.latent[members]] == planted[members][:, None]).all()


def test_tokens_that_a_direction_promotes_are_those_of_the_head(found: FeaturesResult) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    logits = model.lm_head(torch.from_numpy(directions()) * model.model.norm.weight)
    assert found.promoted is not None
    assert found.promoted.top[3].tolist() == logits[3].topk(8).indices.tolist()
    assert found.promoted.bottom[3, 0] == int(logits[3].argmin())


def test_a_window_tells_which_rows_were_gathered(found: FeaturesResult) -> None:
    data = collect(found, 5, 10)
    ids, coded = found.coded.ids, found.coded
    second = coded.texts["rid"].tolist().index("r1")
    reused = coded.gathered & (coded.text == second)
    assert coded.position[reused].tolist() == list(range(1, 10))  # position 0 is a sink
    # What was gathered has the code of the row that it was gathered from.
    assert (coded.rows["position"].to_numpy()[coded.row_of[reused]] == np.arange(1, 10)).all()
    assert set(coded.rows["rid"].to_numpy()[coded.row_of[reused]]) == {"r0"}
    assert coded.rows.loc[coded.rows["rid"] == "r0", "reused"].tolist() == [1] * 9 + [0] * 31
    lines = [e for c in data["cards"] for e in c["e"]]
    assert len(data["flat"]) <= len(ids)
    for bin_, rid, position, start, length, at, _reused, pairs in lines[:50]:
        words = [data["words"][w] for w in data["flat"][start : start + length]]
        place = int(np.flatnonzero((coded.text == rid) & (coded.position == position))[0])
        assert words[at] == Vocabulary.load(FOLDER).text(int(ids[place])).replace(" ", "·")[:12]
        assert at in pairs[::2], bin_


def test_examples_of_two_runs_say_which_they_come_from(tmp_path: Path) -> None:
    runs = [planted_run(tmp_path / name, texts=6, seed=i).path for i, name in enumerate(("one", "two"))]
    both = study(runs, planted_sae(tmp_path / "sae"))
    assert both.to_json()["runs"] == ["one", "two"]
    data = collect(both, 5, 10)
    top = both.examples[(both.examples["latent"] == 0) & (both.examples["bin"] == "top")]
    shown = [e for e in next(c for c in data["cards"] if c["i"] == 0)["e"] if e[0] == "top"]
    assert [(data["runs"][data["texts"][e[1]][0]], data["texts"][e[1]][1]) for e in shown] == [
        *zip(top["run"], top["rid"], strict=True)
    ]
    assert set(top["run"]) == {"one", "two"}
    for e in top.itertuples():
        tokens = load_run(tmp_path / e.run).tokens().set_index(["rid", "position"])
        assert tokens.loc[(e.rid, e.position), "token_id"] in SETS[0]


def test_the_page_is_one_file_whose_only_script_is_named_by_its_hash(found: FeaturesResult) -> None:
    import base64
    import hashlib

    hostile = found.latents.assign(label="</script><img src=x onerror=alert(1)>")
    page = render(replace(found, latents=hostile))
    assert "<img" not in page
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "innerHTML" not in page
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)


def test_a_page_that_would_be_too_large_says_what_it_leaves_out(found: FeaturesResult, tmp_path: Path) -> None:
    assert write_dashboard(found, tmp_path) == []
    small = (tmp_path / "dashboard.html").stat().st_size
    told = write_dashboard(found, tmp_path, most_bytes=small - 10_000)
    assert (tmp_path / "dashboard.html").stat().st_size <= small - 10_000
    assert "fewer examples" in told[0]


def test_an_sae_of_other_weights_is_refused(found: FeaturesResult, tmp_path: Path) -> None:
    run = planted_run(tmp_path / "run", texts=3)
    sae = read_sae(planted_sae(tmp_path / "sae"))
    told = {KEY: {"model": {"weights_sha256": {"model.safetensors": "0" * 64}}}}
    with pytest.raises(ConfigError, match="other weights"):
        refuse_other_model(sae.with_metadata(**told), [run], str(tmp_path))


def test_a_model_that_was_not_trained_stands_beside_the_labels(found: FeaturesResult, tmp_path: Path) -> None:
    """Of the planted features nothing is left in it: its rows are noise, and its dictionary is another."""
    run = planted_run(tmp_path / "run")
    (noise, place), sae = made_random(tmp_path, run), planted_sae(tmp_path / "sae")
    beside = study(run.path, sae, random_runs=[noise], random_sae=place)
    assert beside.random_model is not None
    scores = beside.scores.set_index("score")
    assert scores.loc["detection", "random_model"] < 0.65 < scores.loc["detection", "labels"]
    assert scores["random_model"].to_dict() == beside.random_model[["detection", "fuzzing"]].mean().to_dict()
    pd.testing.assert_series_equal(scores["labels"], found.scores.set_index("score")["labels"])
    assert "the random model read other texts" not in " ".join(beside.notes)
    with pytest.raises(ConfigError, match="of the same weights"):
        study(run.path, sae, random_runs=[run.path], random_sae=sae)
    with pytest.raises(ConfigError, match="needs its runs and its SAE"):
        study(run.path, sae, random_runs=[noise])


def made_random(place: Path, of: Run) -> tuple[Path, Path]:
    """The same texts with rows of noise, of other weights, and an SAE for them."""
    noise = planted_run(place / "noise")
    generator = torch.Generator().manual_seed(0)
    for file in noise.path.glob("rows/*/*.safetensors"):
        tensors = load_file(file)
        save_file({k: torch.randn(v.shape, generator=generator) for k, v in tensors.items()}, file)
    manifest = json.loads((noise.path / "manifest.json").read_text())
    manifest["model"]["weights_sha256"] = {"model.safetensors": "f" * 64}
    (noise.path / "manifest.json").write_text(json.dumps(manifest))
    return noise.path, planted_sae(place / "noise-sae")


def test_the_command_leaves_its_pages(cli: Callable, tmp_path: Path) -> None:
    run = planted_run(tmp_path / "run", texts=6)
    done = cli("features", run.path, "--sae", planted_sae(tmp_path / "sae"), "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["latents"], told["alive"]) == (LATENTS, LATENTS - 1)
    assert told["left_out"]["first position"] == 5  # the second text reused its own
    assert {"report.html", "dashboard.html", "summary.json"} <= {p.name for p in (tmp_path / "out").iterdir()}

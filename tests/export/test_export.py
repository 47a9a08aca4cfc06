"""What is exported is what was recorded, read by the tools themselves or as they document their formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.export.contexts import cut
from sglang_probe.export.delphi import export_delphi
from sglang_probe.export.folder import new_folder
from sglang_probe.export.hf import export_hf
from sglang_probe.export.neuronpedia import cut_float, export_neuronpedia
from sglang_probe.export.saelens import export_saelens
from sglang_probe.run.run import Run
from sglang_probe.sae.coded_run import code_run
from sglang_probe.sae.folder import read_sae
from sglang_probe.studies.endpoint import Endpoint
from sglang_probe.studies.features.asked import Asking
from sglang_probe.studies.features.command import Features
from sglang_probe.studies.features.labelled import read_labelled
from sglang_probe.studies.features.study import study
from tests.export.readers import delphi_latents, neuronpedia
from tests.sae.lens import needs_sae_lens
from tests.studies.features.planted import FOLDER, LENGTH, POINT, WIDTH, planted_run, planted_sae
from tests.studies.features.stub_judge import StubJudge

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six texts; the second reuses ten positions of the first."""
    return planted_run(tmp_path_factory.mktemp("export") / "run", texts=6)


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_sae(tmp_path_factory.mktemp("export") / "sae")


def test_a_run_is_opened_by_datasets(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert export_hf(run, tmp_path / "out", rows_per_file=100) == 6 * LENGTH + 1 - 10
    opened = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(opened) == 231
    assert len(list((tmp_path / "out" / "data").iterdir())) == 3
    tokens = run.tokens().set_index(["rid", "position"])
    for i in (0, 45, 230):
        row = opened[i]
        there = tokens.loc[row["rid"], row["position"]]
        assert row["token_id"] == there["token_id"]
        assert row["family"] == f"f{row['rid'][1:]}"
        assert torch.equal(torch.tensor(row[POINT]), run.rows(POINT, [there["row"]])[0])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nconfigs:")
    assert "10 further positions were served from the prefix cache" in card


def test_bfloat16_is_kept_exactly_and_positions_can_be_chosen(tmp_path: Path) -> None:
    from tests.rows_run import Text, write_run

    rows = torch.randn((6, 8), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    run = write_run(tmp_path / "run", {"a": Text([1, 2, 3, 4, 5, 6])}, {POINT: {"a": rows}})
    export_hf(run, tmp_path / "out", where="position >= 2")
    table = pq.read_table(next((tmp_path / "out" / "data").iterdir()))
    held = np.stack(table[POINT].to_numpy(zero_copy_only=False))
    assert torch.equal(torch.from_numpy(held).to(torch.bfloat16), rows[2:])
    with pytest.raises(ConfigError, match="no computed position"):
        export_hf(run, tmp_path / "none", where="position > 99")
    assert not (tmp_path / "none").exists()


def test_contexts_are_whole_and_none_is_a_repeat() -> None:
    text = np.array([0] * 7 + [1] * 6)
    has = np.ones(13, dtype=bool)
    has[9] = False
    own = has.copy()
    own[7:9] = False
    found = cut(text, has, own, 2)
    assert found.places.tolist() == [[0, 1], [2, 3], [4, 5], [10, 11]]
    assert (found.repeated, found.rest) == (1, 3)
    assert cut(text, has, own, 8).places.shape == (0, 8)


def test_a_cache_of_sae_lens_has_the_rows_of_each_context(run: Run, tmp_path: Path) -> None:
    found = export_saelens(run, tmp_path / "out", POINT, context=10)
    # The second text begins with what the first one has; its first context is no row of its own.
    assert (found.contexts, found.repeated, found.rest) == (23, 1, 1)
    # As `ActivationsStore.load_cached_activation_dataset` opens it and checks its shape.
    opened = datasets.load_from_disk(str(tmp_path / "out"))
    assert opened.features[POINT].shape == (10, WIDTH)
    opened.set_format(type="torch", columns=[POINT, "token_ids"])
    x, ids = opened[4:6][POINT], opened[4:6]["token_ids"]
    assert x.shape == (2, 10, WIDTH)
    assert torch.equal(x[0], run.activations("r1", POINT)[10:20])
    prompt = run.requests().set_index("rid").loc["r1", "prompt_ids"]
    assert ids[0].tolist() == list(prompt[10:20])


def test_contexts_with_a_reused_beginning_are_gathered(run: Run, tmp_path: Path) -> None:
    found = export_saelens(run, tmp_path / "out", POINT, context=20)
    assert found.repeated == 0
    x = torch.tensor(datasets.load_from_disk(str(tmp_path / "out"))[2][POINT])
    assert torch.equal(x, run.activations("r1", POINT)[:20])


@needs_sae_lens
@pytest.mark.slow
def test_the_store_of_sae_lens_reads_it(run: Run, tmp_path: Path) -> None:
    from sae_lens.training.activations_store import ActivationsStore

    export_saelens(run, tmp_path / "out", POINT, context=10)
    store = ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=POINT,
        hook_head_index=None,
        context_size=10,
        d_in=WIDTH,
        n_batches_in_buffer=2,
        total_training_tokens=1000,
        store_batch_size_prompts=4,
        train_batch_size_tokens=20,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(tmp_path / "out"),
    )
    x, ids = store.get_raw_llm_batch()
    assert torch.equal(x.reshape(4, 10, WIDTH)[1], run.activations("r0", POINT)[10:20])
    assert ids.shape == (40,)


def test_delphi_gets_the_codes_of_every_context(run: Run, sae: Path, tmp_path: Path) -> None:
    coded = code_run(run, read_sae(sae))
    found = export_delphi(coded, tmp_path / "out", hook_point=POINT, model="m", context=16, splits=5)
    latents, tokens, config = delphi_latents(tmp_path / "out", POINT)
    assert tokens.shape == (len(found.places), 16) == (12, 16)
    assert config["cache_ctx_len"] == config["ctx_len"] == 16
    assert 10 not in latents  # it never fires
    total = 0
    for latent, (locations, activations) in latents.items():
        for (context, position, _), value in zip(locations[:20].tolist(), activations[:20].tolist(), strict=True):
            place = found.places[context, position]
            assert tokens[context, position] == coded.ids[place]
            assert coded.codes[coded.row_of[place], latent] == pytest.approx(value, rel=1e-3)
        total += len(locations)
    rows = coded.row_of[found.places].ravel()
    assert total == coded.codes[rows[rows >= 0]].nnz  # reused positions have the codes of their origins


def test_neuronpedia_gets_features_examples_and_labels(run: Run, sae: Path, tmp_path: Path) -> None:
    result = study(run.path, sae)
    vectors = read_sae(sae).W_dec.numpy()
    how = {"name": "planted", "creator": "me", "per_file": 4}
    place = export_neuronpedia(result, sae, tmp_path / "out", **how)  # type: ignore[arg-type]
    found = neuronpedia(place)
    assert place.relative_to(tmp_path / "out").parts == ("made-up", "2-planted")
    assert [f["index"] for f in found["features"]] == [i for i in range(12) if i != 10]
    first = found["features"][3]
    assert first["vector"] == pytest.approx(vectors[3].tolist())
    assert first["frac_nonzero"] == pytest.approx(result.latents.loc[3, "rate"])
    assert len(first["pos_str"]) == len(first["pos_values"]) == 8
    assert {e["explanationModelName"] for e in found["explanations"]} == {"heuristic (no model)"}
    top = result.examples[(result.examples["latent"] == 3) & (result.examples["bin"] == "top")].iloc[0]
    example = next(a for a in found["activations"] if a["index"] == 3)
    assert example["maxValue"] == cut_float(float(top["activation"])) == first["maxActApprox"]
    assert example["tokens"][example["maxValueTokenIndex"]] == result.vocabulary.text(
        int(result.coded.ids[int(top["flat"])])
    )


def test_labels_of_a_model_go_along_with_their_scores_and_the_nulls(run: Run, sae: Path, tmp_path: Path) -> None:
    with StubJudge() as judge:
        endpoint = Endpoint(judge.url, None, tmp_path / "answers.jsonl")
        asked = study(run.path, sae, asking=Asking(endpoint, latents=[0, 3, 5], nulls=2, windows=5))
    Features().write(asked, tmp_path / "features")
    labelled = read_labelled(tmp_path / "features", asked.weights, POINT)
    how = {"name": "planted", "creator": "me", "labelled": labelled}
    place = export_neuronpedia(study(run.path, sae), sae, tmp_path / "out", **how)  # type: ignore[arg-type]
    told = {e["id"]: e for e in neuronpedia(place)["explanations"]}
    own = asked.asked[asked.asked["arm"] == "labels"].set_index("latent")  # type: ignore[index]
    given = {e["index"]: e for e in told.values() if e["explanationModelName"] == "stub"}
    assert {m: e["description"] for m, e in given.items()} == own["label"].to_dict()
    lines = [json.loads(line) for line in place.with_name("2-planted.scores.jsonl").read_text().splitlines()]
    by_model = {
        (told[s["explanationId"]]["index"], s["explanationScoreTypeName"]): s
        for s in lines
        if s["explanationScoreModelName"] == "stub"
    }
    assert {k: s["value"] for k, s in by_model.items()} == {
        (m, name): own.loc[m, score]
        for score, name in (("detection", "eleuther_recall"), ("fuzzing", "eleuther_fuzz"))
        for m in own.index
    }
    details = json.loads(by_model[3, "eleuther_fuzz"]["jsonDetails"])
    assert details["by_the_label_of_another_feature"] == own.loc[3, "fuzzing_shuffled"]
    means = asked.scores.set_index(["label", "score"]).loc[("stub", "fuzzing")]
    assert details["means"]["random_directions"] == pytest.approx(means["random_directions"])
    rule = next(
        s
        for s in lines
        if told[s["explanationId"]]["index"] == 7 and s["explanationScoreTypeName"] == "eleuther_recall"
    )
    assert (rule["explanationScoreModelName"], rule["value"]) == (
        "heuristic (no model)",
        asked.latents.loc[7, "detection"],
    )
    with pytest.raises(ConfigError, match="of another SAE"):
        read_labelled(tmp_path / "features", "0" * 64, POINT)
    Features().write(replace(asked, asked=None, asked_of={}), tmp_path / "plain")
    with pytest.raises(ConfigError, match="no labels by a model"):
        read_labelled(tmp_path / "plain", asked.weights, POINT)


@pytest.mark.parametrize("model", ["/models/mine", "../mine", "org/mine"])
def test_nothing_is_written_outside_the_folder_and_no_path_is_published(
    run: Run, sae: Path, tmp_path: Path, model: str
) -> None:
    result = replace(study(run.path, sae), model=model)
    place = export_neuronpedia(result, sae, tmp_path / "out", name="res", creator="me")
    assert place.is_relative_to(tmp_path / "out")
    assert (place / "model.jsonl").is_file()
    told = json.loads((place / "model.jsonl").read_text())
    assert told["id"] == told["displayName"] == "mine"


def test_floats_are_cut_towards_zero() -> None:
    assert (cut_float(1.99999), cut_float(-1.99999)) == (1.9999, -1.9999)


def test_a_folder_is_whole_or_not_there_and_nobody_elses_is_touched(tmp_path: Path) -> None:

    def fail() -> None:
        with new_folder(tmp_path / "a") as made:
            (made / "part").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "a") as made:
        (made / "whole").touch()
    with pytest.raises(ConfigError, match="--overwrite"), new_folder(tmp_path / "a"):
        pass
    with new_folder(tmp_path / "a", overwrite=True) as made:
        (made / "again").touch()
    assert not (tmp_path / "a" / "whole").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    with pytest.raises(ConfigError, match="no export"), new_folder(tmp_path / "mine", overwrite=True):
        pass
    assert (tmp_path / "mine" / "thesis").exists()


def test_the_commands_say_how_to_open_what_they_made(cli: Callable, run: Run, tmp_path: Path) -> None:
    done = cli("export", "saelens", run.path, "--hook-point", POINT, "--context", "10", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "23 contexts of 10" in done.stdout
    assert "cached_activations_path" in done.stdout
    sae = planted_sae(tmp_path / "sae")
    done = cli("export", "delphi", run.path, "--sae", sae, "--context", "16", "--output", tmp_path / "latents")
    assert done.returncode == 0, done.stderr
    assert delphi_latents(tmp_path / "latents", POINT)[2]["model_name"] == str(FOLDER)
    again = cli("export", "hf", run.path, "--output", tmp_path / "out")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr

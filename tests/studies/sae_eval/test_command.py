"""`sglang-probe sae eval` on a recorded run: its numbers are the library's, and another model's SAE is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import evaluate
from sglang_probe.sae.folder import write_sae
from sglang_probe.sae.harvested import harvested
from sglang_probe.sae.manifest import KEY, manifest
from sglang_probe.sae.sae import SAE
from sglang_probe.studies.sae_eval.study import judge
from tests.sae.small import random_sae
from tests.verify.good_run import RESID, make_good_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_good_run(tmp_path_factory.mktemp("good"))


def sae_of(run: Run, **model: object) -> SAE:
    rows = harvested([run], RESID)
    told = manifest([run], rows, training={"training_variance": 3.0}, evaluation={})
    told["model"] |= model
    return random_sae("jumprelu", width=8, metadata={"hook_name": RESID, KEY: told})


def test_its_numbers_are_those_of_the_library(cli: Callable, run: Run, tmp_path: Path) -> None:
    sae = sae_of(run)
    write_sae(sae, tmp_path / "sae")
    done = cli("sae", "eval", tmp_path / "sae", run.path, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    rows = harvested([run], RESID)
    found = evaluate(sae, rows.batches())
    assert told["explained_variance"] == pytest.approx(found.explained_variance)
    assert told["l0"] == found.l0
    assert told["training_variance"] == 3.0
    assert {g["axis"] for g in told["groups"]} == {"segment", "phase", "position"}
    assert sum(g["rows"] for g in told["groups"] if g["axis"] == "phase") == len(rows) == told["rows"]
    assert "not of rows held out" in told["notes"][0]
    assert (tmp_path / "out" / "report.html").exists()
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["left_out"]) > 0


def test_an_sae_of_other_weights_is_refused(run: Run, tmp_path: Path) -> None:
    write_sae(sae_of(run, weights_sha256={"model.safetensors": "0" * 64}), tmp_path)
    with pytest.raises(ConfigError, match="other weights"):
        judge(tmp_path, [run.path])


def test_a_folder_that_does_not_say_where_its_rows_come_from_needs_to_be_told(run: Run, tmp_path: Path) -> None:
    write_sae(random_sae("standard", width=8), tmp_path)
    with pytest.raises(ConfigError, match="where its rows come from"):
        judge(tmp_path, [run.path])
    found = judge(tmp_path, [run.path], hook_point=RESID)
    assert "not known" in found.notes[0]


def test_fewer_rows_are_a_sample_of_all(run: Run, tmp_path: Path) -> None:
    write_sae(sae_of(run), tmp_path)
    assert len(judge(tmp_path, [run.path], most=7).found.rows) == 7


def test_latents_have_their_rates_and_means(run: Run, tmp_path: Path) -> None:
    one = torch.zeros(8, 1)
    constant = SAE("standard", one, one.T, torch.ones(1) * 2, torch.zeros(8), metadata={"hook_name": RESID})
    write_sae(constant, tmp_path)
    latents = judge(tmp_path, [run.path]).latents
    assert latents.loc[0].tolist() == [0, 1, 2]

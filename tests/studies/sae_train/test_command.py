"""`sglang-probe sae train` on a recorded run: folders that SAELens opens, a report, and exact refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from sglang_probe.config import load_config
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.report.page import render
from sglang_probe.sae import train as training
from sglang_probe.sae.evaluation import evaluate
from sglang_probe.sae.folder import read_sae
from sglang_probe.sae.manifest import of
from sglang_probe.sae.threshold import shared_threshold
from sglang_probe.studies.sae_train import command
from sglang_probe.studies.sae_train.config import SaeTrainConfig
from sglang_probe.studies.sae_train.page import train_page
from sglang_probe.studies.sae_train.study import TrainResult, open_folder, prepare, train_all
from tests.sae.lens import needs_sae_lens
from tests.verify.good_run import RESID, make_good_run


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("sae")
    make_good_run(folder)

    def write(name: str = "train", **keys: Any) -> Path:
        given = {
            "runs": ["run"],
            "hook_point": RESID,
            "latents": [12],
            "k": 2,
            "samples": 320,
            "batch_size": 16,
            "lr_warm_up_steps": 2,
            "held_out": 0.5,
            "checkpoint_every": 5,
            **keys,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
        return path

    return write


@needs_sae_lens
@pytest.mark.slow
def test_a_training_from_rows_to_report(cli: Callable, config_file: Callable[..., Path], tmp_path: Path) -> None:
    out, config = tmp_path / "out", config_file(latents=[12, 20], store="bfloat16")
    done = cli("sae", "train", config, "--output", out, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    names = [d["dictionary"] for d in told["dictionaries"]]
    assert names == ["batchtopk-12-seed0", "batchtopk-20-seed0"]
    assert {p.name for p in out.iterdir()} >= {"report.html", "summary.json", "tables", *names}
    assert not (out / names[0] / "checkpoint").exists()
    # What is stored is what was judged.
    held_out = prepare(load_config(config, SaeTrainConfig), "x").held_out
    sae = read_sae(out / names[0])
    assert evaluate(sae, held_out.batches()).explained_variance == pytest.approx(
        told["dictionaries"][0]["explained_variance"], rel=1e-6
    )
    assert shared_threshold(sae) == pytest.approx(told["dictionaries"][0]["threshold"])
    manifest = of(sae)
    assert manifest is not None
    assert manifest["runs"][0]["manifest_sha256"] == told["of"]["runs"][0]
    assert manifest["evaluation"]["as_trained"]["l0"] >= manifest["evaluation"]["l0"]
    assert sae.hook_point == RESID
    from sae_lens import SAE as Theirs

    theirs = Theirs.load_from_disk(out / names[0])
    with torch.no_grad():
        made = theirs(held_out.x_ND.float())
    torch.testing.assert_close(sae.reconstruct(held_out.x_ND.float()), made, rtol=1e-5, atol=1e-5)

    # Again: nothing without a flag; nothing new with --resume; another configuration is named.
    assert cli("sae", "train", config, "--output", out).returncode == 2
    before = (out / names[0] / "sae_weights.safetensors").stat().st_mtime_ns
    assert cli("sae", "train", config, "--output", out, "--resume").returncode == 0
    assert (out / names[0] / "sae_weights.safetensors").stat().st_mtime_ns == before
    other = cli("sae", "train", config_file("other", lr=0.01), "--output", out, "--resume")
    assert other.returncode == 2
    assert "config.lr" in other.stderr
    assert cli("sae", "train", config, "--output", out, "--report-only").returncode == 0


def test_a_folder_of_another_training_is_not_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sglang_probe.studies.sae_train.study.require_sae_lens", lambda: "6.54.12")
    first = {"config": {"lr": 1, "k": 2}, "runs": ["a"]}
    open_folder(tmp_path / "x", first, overwrite=False, resume=False)
    open_folder(tmp_path / "x", first, overwrite=False, resume=True)
    with pytest.raises(RunDirectoryError, match="exists already"):
        open_folder(tmp_path / "x", first, overwrite=False, resume=False)
    for other, key in (({**first, "config": {"lr": 2, "k": 2}}, "config.lr"), ({**first, "runs": ["b"]}, "runs")):
        with pytest.raises(RunDirectoryError, match=f"another `{key}`"):
            open_folder(tmp_path / "x", other, overwrite=False, resume=True)
    monkeypatch.setattr("sglang_probe.studies.sae_train.study.require_sae_lens", lambda: "6.60.0")
    with pytest.raises(RunDirectoryError, match=r"versions\.sae-lens"):
        open_folder(tmp_path / "x", first, overwrite=False, resume=True)


def test_overwriting_deletes_dictionaries_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sglang_probe.studies.sae_train.study.require_sae_lens", lambda: "6.54.12")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep")
    with pytest.raises(RunDirectoryError, match="holds no training"):
        open_folder(foreign, {}, overwrite=True, resume=False)
    folder = tmp_path / "x"
    open_folder(folder, {"a": 1}, overwrite=False, resume=False)
    for name, file in (("trained", "result.json"), ("notes", "mine.txt")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    for name in ("checkpoint", ".checkpoint.old", "held-out"):  # of a training whose rows are not kept
        (folder / name).mkdir()
        (folder / name / "stream.json").write_text("{}")
    open_folder(folder, {"a": 2}, overwrite=True, resume=False)
    assert {p.name for p in folder.iterdir()} == {"training.json", "notes"}


def test_the_plan_says_how_many_rows_there_are(cli: Callable, config_file: Callable[..., Path]) -> None:
    done = cli("sae", "train", config_file(), "--plan", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["plan"] == [{"dictionary": "batchtopk-12-seed0", "latents": 12, "seed": 0}]
    assert "held out" in plan["notes"][0]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"latents": [12, 12]}, "names one twice"),
        ({"k": 12}, "not less than"),
        ({"hook_point": "blocks.1.hook_resid_pots"}, "hook_resid_pots"),
        ({"mix": {"prefil": 1.0}}, "mix"),
        ({"samples": 3}, "less than one batch"),
        ({"ks": 3}, "unknown key"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(
    config_file: Callable[..., Path], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(config_file("bad", **keys), SaeTrainConfig)


def test_the_plan_says_what_is_in_memory_and_another_buffer_is_another_training_where_it_matters(
    config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = load_config(config_file(), SaeTrainConfig)
    whole = prepare(of, "x")
    assert whole.order.together is None
    assert prepare(of.model_copy(update={"buffer_mib": 7}), "x").identity == whole.identity
    monkeypatch.setattr("sglang_probe.sae.harvested.Listed.row_bytes", 1 << 16)  # 1 MiB holds 16 rows
    small = prepare(of.model_copy(update={"buffer_mib": 1}), "x")
    assert small.identity["rows"]["shuffled_together"] == small.order.together == 16 < len(small.train)
    assert command._memory(
        small, of
    ) == f"16 of them in memory (1 MiB): an epoch is {len(small.order.ends)} fills, " + ("shuffled one by one")


@needs_sae_lens
@pytest.mark.slow
def test_a_training_that_reads_as_it_goes_is_interrupted_and_ends_like_one_that_was_not(
    config_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_probe.sae.harvested.Listed.row_bytes", 1 << 16)
    of = load_config(config_file(buffer_mib=1), SaeTrainConfig)
    prepared = prepare(of, "x")

    class Ended(Exception):
        pass

    def end(at: dict[str, float]) -> None:
        if at["step"] >= 10:
            raise Ended

    def nothing(_: dict[str, float]) -> None:
        pass

    name = "batchtopk-12-seed0"
    train_all(of, prepared, tmp_path / "whole", lambda _: nothing)
    with pytest.raises(Ended):
        train_all(of, prepared, tmp_path / "parts", lambda _: end)
    train_all(of, prepare(of, "x"), tmp_path / "parts", lambda _: nothing)
    for file in ("sae_weights.safetensors", "cfg.json"):
        assert (tmp_path / "parts" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()


def test_too_few_rows_are_refused(config_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="too few"):
        prepare(load_config(config_file("few", batch_size=100, samples=1000), SaeTrainConfig), "few")


def test_fewer_rows_to_train_on_leave_those_to_judge_by(config_file: Callable[..., Path]) -> None:
    whole, part = (
        prepare(load_config(config_file(name, **more), SaeTrainConfig), name)
        for name, more in (("whole", {}), ("part", {"most_rows": 17}))
    )
    assert len(whole.train) > len(part.train) == 17
    assert torch.equal(whole.held_out.x_ND, part.held_out.x_ND)
    assert (part.identity["rows"]["train"], part.order.epoch_length) == (17, 17)


def test_the_report_shows_both_thresholds_and_what_was_left_out() -> None:
    curve = pd.DataFrame(
        {"dictionary": "d", "samples": [10, 20], "held_out": [-9.9, 0.2], "recalibrated": [0.3, 0.4], "loss": [2.0, 1]}
    )
    dictionary = {"dictionary": "d", "latents": 12, "seed": 0, "explained_variance": 0.4, "l0": 2.0, "dead_share": 0.1}
    dictionary |= {"explained_variance_as_trained": 0.2, "l0_as_trained": 9.5, "rows": 50, "relative_error": 0.3}
    dictionary |= {"threshold": 1.5, "seconds": 3.0}
    group = {"dictionary": "d", "axis": "phase", "group": "decode", "rows": 9, "fvu": 0.6, "fvu_own": 0.7, "l0": 2.0}
    rows = {"train": 90, "shuffled_together": 1234}
    rows |= {"resumed": [{"step": 14, "rows_recorded_again": 20, "rows_lost": 3}]}
    result = TrainResult(
        "x",
        {"hook_point": RESID, "model": "probe-text", "rows": rows, "config": {"k": 2}, "versions": {}},
        pd.DataFrame([dictionary]),
        pd.DataFrame([{**group, "relative_error": 0.3}]),
        curve,
        pd.DataFrame({"reason": ["norm"], "segment": ["user"], "rows": [7]}),
    )
    html = render(train_page(result))
    assert "40.0 % (20.0 %)" in html.replace("\u202f", " ").replace("%", " %").replace("  ", " ")
    assert "2.0 (9.5)" in html
    assert "phase: decode" in html
    assert "1,234" in html
    assert "20 rows recorded again, 3 not there any more" in html
    assert "norm" in html
    assert training.NEEDS not in html

"""Queries, keys and values from a live engine: whose they are, in what order, and what is built on them.

Whether they are the model's is asked of every architecture in test_models.py and, for Llama, test_harvest.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_probe.attention.run_telemetry import TelemetryOptions, write_telemetry
from sglang_probe.attention.weights import attention_weights
from sglang_probe.eviction import parse_method
from sglang_probe.eviction.from_run import layer_from_run
from sglang_probe.paths import shipped
from sglang_probe.report.page import render
from sglang_probe.run.hook_points import ATTENTION
from sglang_probe.run.run import Run, load_run
from sglang_probe.stats.distance import row_distance
from sglang_probe.studies.query_drift import by_layer
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.page import drift_page
from sglang_probe.studies.query_drift.study import study_drift
from sglang_probe.verify.reference import check_against_transformers, reference_errors
from sglang_probe.verify.verify import verify
from tests.declared import run_commands
from tests.end_to_end.telemetry_parity import SHARE, telemetry_differences

pytestmark = pytest.mark.engine
MODEL = shipped("models/probe-text/checkpoint")
LAYERS = (0, 3)
POINTS = [f"blocks.{i}.{site}" for i in LAYERS for site in ATTENTION]
QUERIES, KEYS = "blocks.3.attn.hook_rot_q", "blocks.3.attn.hook_rot_k"


@pytest.fixture(scope="module")
def recorded(
    cli: Callable, write_yaml: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """Cache on and off, twice each, in fp32, with chunks that are mixed with decode steps."""
    folder = tmp_path_factory.mktemp("queries") / "experiment"
    config = write_yaml(
        "queries",
        dtype="float32",
        hook_points=["hook_embed", *POINTS],
        telemetry={"layers": list(LAYERS), "every": 2, "memory": 3},
        sampling={"max_new_tokens": 24, "temperature": 1.0},
        server={"chunked_prefill_size": 128, "enable_mixed_chunk": True},
    )
    done = cli("ab", config, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return {p.parent.name: load_run(p.parent) for p in folder.glob("*/manifest.json")}


def test_rows_in_mixed_batches_and_chunks_are_the_models(recorded: dict[str, Run]) -> None:
    for name in ("cache_on", "cache_off"):
        run = recorded[name]
        assert (run.forwards()["mode"] == "mixed").any()
        assert [str(c) for c in verify(run) if not c.holds] == []
        errors = reference_errors(run, str(MODEL), requests=10)
        assert set(errors) == {"hook_embed", *POINTS}
        assert sum(len(e) for e in errors.values()) == run.row_count() * (1 + len(POINTS))
        assert max(float(e.max()) for e in errors.values()) < 1e-4


def test_the_manifest_tells_heads_apart(recorded: dict[str, Run]) -> None:
    run = recorded["cache_off"]
    assert run.heads(QUERIES) == (8, 32)
    assert run.heads(KEYS) == (4, 32)
    split = run.rows(QUERIES, [5, 7], split_heads=True)
    assert split.shape == (2, 8, 32)
    assert torch.equal(split.flatten(1), run.rows(QUERIES, [5, 7]))


def test_rotating_captured_queries_gives_the_captured_rotated_ones(recorded: dict[str, Run]) -> None:
    """Neither tap took the other's tensor, and positions are those of the ledger."""
    run = recorded["cache_on"]
    rid = run.requests()["rid"].iloc[-1]
    for i in LAYERS:
        layer = layer_from_run(run, rid, i)
        before, rotary = layer.q_pre_NHD, layer.rotary
        assert before is not None
        assert rotary is not None
        at = torch.arange(layer.length)
        assert torch.allclose(rotary.rotate(before, at), layer.q_NHD, atol=1e-5)
        assert not torch.allclose(rotary.rotate(before, at + 1), layer.q_NHD, atol=1e-1)


@pytest.mark.parametrize("point", [QUERIES, "blocks.0.attn.hook_q", KEYS, "blocks.0.attn.hook_v"])
def test_rows_rolled_by_one_position_are_noticed(point: str, recorded: dict[str, Run], tmp_path: Path) -> None:
    wrong = _with_rows(recorded["cache_off"], tmp_path, point, lambda rows: torch.roll(rows, 1, dims=0))
    check = check_against_transformers(wrong, str(MODEL), requests=2)
    assert check.violation is not None
    assert check.violation.startswith(point)


def test_queries_of_another_request_are_noticed(recorded: dict[str, Run], tmp_path: Path) -> None:
    run = recorded["cache_off"]
    a, b = (_question_rows(run, index) for index in (0, 1))

    def exchange(rows: torch.Tensor) -> torch.Tensor:
        rows[torch.cat([a, b])] = rows[torch.cat([b, a])]
        return rows

    wrong = _with_rows(run, tmp_path, QUERIES, exchange)
    errors = reference_errors(wrong, str(MODEL), requests=2)
    assert (errors[QUERIES] > 0.05).sum() >= len(a)
    assert max(float(e.max()) for name, e in errors.items() if name != QUERIES) < 1e-4


def test_keys_of_a_cached_run_are_those_of_a_full_one_up_to_the_floor(recorded: dict[str, Run]) -> None:
    cached, full, again = (recorded[n] for n in ("cache_on", "cache_off", "cache_off.repeat"))
    assert cached.row_count() < 0.6 * full.row_count()
    effect, floor = [], []
    for rid in cached.requests()["rid"]:
        keys = cached.activations(rid, KEYS)
        reused = cached.tokens_of(rid)["status"].to_numpy()[: len(keys)] == "reused"
        expected = full.activations(rid, KEYS)
        assert keys.shape == expected.shape
        effect.append(row_distance(keys, expected)[0][reused])
        floor.append(row_distance(again.activations(rid, KEYS), expected)[0][reused])
    assert sum(map(len, effect)) > 1000
    # Arms differ in how they batch, which the floor (two runs of one arm) has less of; fp32 rounding bounds both.
    assert np.concatenate(floor).max() < 1e-5
    assert np.concatenate(effect).max() < 1e-5


def test_a_layer_of_a_run_attends_as_the_model_does(recorded: dict[str, Run]) -> None:
    """Weights from captured rows against `transformers`' own, for prompt window and decode steps."""
    from transformers import AutoModelForCausalLM

    run = recorded["cache_on"]
    r = run.requests().iloc[-1]
    layer = layer_from_run(run, r["rid"], 3, window=16, model=MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ids = [*r["prompt_ids"], *r["output_ids"][:-1]]
        weights_HNJ = model(torch.tensor([ids]), output_attentions=True).attentions[3][0]
    ours = attention_weights(layer.q_NHD, layer.k_LGD, layer.spec, first=layer.length - 16)
    theirs = weights_HNJ[:, layer.length - 16 : layer.length, : layer.length]
    assert (ours.flatten(0, 1) - theirs).abs().max() < 1e-5
    assert (layer.future_attention.flatten(0, 1) - weights_HNJ[:, layer.length :]).abs().max() < 1e-5
    keep = parse_method({"method": "snapkv", "window": 8}).select(layer, budget=64).keep_TGL
    assert (keep.sum(-1) == 64).all()


def test_telemetry_of_a_run_is_what_its_attention_says(recorded: dict[str, Run], tmp_path: Path) -> None:
    """A few numbers from `transformers`' own weights, one entry at a time."""
    from transformers import AutoModelForCausalLM

    run = recorded["cache_on"]
    requests = run.requests()
    rows = write_telemetry(run, tmp_path / "telemetry.parquet", TelemetryOptions(sinks=2, window=16, top_k=3))
    assert rows == ((requests["output_len"] - 1) * 8 * len(LAYERS)).sum()
    frame = pd.read_parquet(tmp_path / "telemetry.parquet")
    r = requests.iloc[-1]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ids = [*r["prompt_ids"], *r["output_ids"][:-1]]
        weights_HNJ = model(torch.tensor([ids]), output_attentions=True).attentions[3][0]
    step, head = 6, 5
    p = weights_HNJ[head, r["prompt_len"] + step, : r["prompt_len"] + step + 1].double().numpy()
    found = frame.query("rid == @r.rid and layer == 3 and head == @head and step == @step").iloc[0]
    assert found["support"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert found["entropy"] == pytest.approx(-(p * np.log(p)).sum() / np.log(len(p)), rel=1e-4)
    assert found["mass_sinks"] == pytest.approx(p[:2].sum(), abs=1e-5)
    assert found["mass_window"] == pytest.approx(p[r["prompt_len"] - 16 : r["prompt_len"]].sum(), abs=1e-5)
    assert found["mass_generated"] == pytest.approx(p[r["prompt_len"] :].sum(), abs=1e-5)
    assert set(found["top_positions"]) == set(np.argsort(p)[-3:])
    assert frame.loc[frame["step"] < 4, "jump"].isna().all()
    assert frame.loc[frame["step"] >= 4, "jump"].between(0, 1).all()


def test_telemetry_while_serving_is_that_of_captured_rows(recorded: dict[str, Run], tmp_path: Path) -> None:
    """Two ways: in the step, from the KV pool and batched over requests; and afterwards, from captured rows."""
    differences = telemetry_differences(recorded["cache_on"], tmp_path / "telemetry.parquet")
    print(differences.to_string())
    assert differences["values"].min() > 1000
    assert differences["max"].drop(SHARE).max() < 2e-5


def test_the_drift_study_sees_the_same_with_and_without_the_cache(
    recorded: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of a cached window come through lineage; the study says how many, and finds what the full run shows."""
    options = DriftOptions(window=32, permutations=1)
    cached, full = (study_drift(recorded[n], options, layers=[3]) for n in ("cache_on", "cache_off"))
    assert cached.ok
    assert cached.requests == full.requests == len(recorded["cache_on"].requests())
    assert float(full.found.coverage["window_coverage"].iloc[0]) == 1
    steps = [r.rows["steps"].set_index(["rid", "layer", "head", "step"]) for r in (cached, full)]
    for metric in ("pre", "post", "pre_centred_nearest", "functional", "js"):
        assert np.allclose(*(s[metric] for s in steps), atol=1e-3), metric
    page = render(drift_page(cached))
    assert "Is it decoding, or is it distance?" in page
    assert len(cached.tables()["steps"]) == len(steps[0])
    json.dumps(cached.to_json(), allow_nan=False)
    read = ["query-drift", str(recorded["cache_on"].path), "--output", str(tmp_path / "study")]
    assert list(run_commands([read]).values()) == [0]
    monkeypatch.setattr(by_layer, "measure", lambda *_: pytest.fail("a layer is measured"))
    kept = study_drift(recorded["cache_on"], output=tmp_path / "study", resume=True)
    written = pd.read_parquet(tmp_path / "study" / "tables" / "steps.parquet")
    pd.testing.assert_frame_equal(kept.tables()["steps"], written)
    for name, run, other in (
        ("run", recorded["cache_off"], DriftOptions()),
        ("options", recorded["cache_on"], DriftOptions(permutations=1)),
    ):
        copy = shutil.copytree(tmp_path / "study", tmp_path / f"other {name}")
        with pytest.raises(pytest.fail.Exception, match="a layer is measured"):
            study_drift(run, other, output=copy, resume=True)


def _question_rows(run: Run, index: int) -> torch.Tensor:
    """Rows of the 16 positions that end the prompt of a request."""
    r = run.requests().iloc[index]
    tokens = run.tokens_of(r["rid"])
    at = tokens[(tokens["position"] < r["prompt_len"]) & (tokens["position"] >= r["prompt_len"] - 16)]
    return torch.tensor(at["row"].tolist())


def _with_rows(run: Run, folder: Path, point: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    """A copy of a run whose rows at one hook point were changed; it is small enough for one shard."""
    copy = folder / "run"
    shutil.copytree(run.path, copy)
    (shard,) = (copy / "rows" / point).iterdir()
    rows = load_file(shard)["rows"]
    save_file({"rows": change(rows.clone()).contiguous()}, shard)
    return load_run(copy)

"""The dose study on the engine, where every dose-response is known: at the last layer a steered row is the plain one
plus the change, so that each number follows from the rows of the plain model. In the same engine, audit replays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sglang_probe.config import load_config
from sglang_probe.errors import ConfigError
from sglang_probe.eviction.likelihood import Unembedding, load_unembedding
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.run.run import Run
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steering.features import FeatureManifest
from sglang_probe.steering.library import MadeBy, write
from sglang_probe.studies.replay import runs as replaying
from sglang_probe.studies.replay.command import Replay
from sglang_probe.studies.replay.study import ReplayResult, study_replay
from sglang_probe.studies.steer_decay.target import log_odds
from sglang_probe.studies.steer_dose import runs as recording
from sglang_probe.studies.steer_dose.command import SteerDose
from sglang_probe.studies.steer_dose.config import SteerDoseConfig
from sglang_probe.studies.steer_dose.names import FORCED, PLAIN
from sglang_probe.studies.steer_dose.steps import places
from sglang_probe.studies.steer_dose.study import SteerDoseResult, study_dose
from tests.end_to_end.steering import MODEL, WIDTH

pytestmark = [pytest.mark.engine, pytest.mark.reviewed("steering")]
POSITIVE, NEGATIVE, LAYER_NORM = [300, 301, 302], [400, 401], 10.0
ADDED, CLAMPED = [5.0, 20.0, 80.0], [2.0, 8.0]
LAST = "blocks.3.hook_resid_post"


SAE = "a" * 64


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SteerDoseResult, dict, Unembedding, dict]]:
    """A library whose direction, and whose feature's decoder row, are the target's own, after the last layer."""
    folder = tmp_path_factory.mktemp("dose")
    unembedding = load_unembedding(MODEL)
    weight = unembedding.weight_VM
    towards = unembedding.norm_M * (weight[POSITIVE].mean(0) - weight[NEGATIVE].mean(0))
    generator = torch.Generator().manual_seed(3)
    encoder = torch.randn(WIDTH, generator=generator) / 16
    tensors = {
        "planted": {"vector": towards},
        "chance": {"vector": torch.randn(WIDTH, generator=generator)},
        "feature": {
            "vector": towards,
            "encoder": encoder,
            "encoder_bias": torch.tensor(0.2),
            "threshold": torch.tensor(0.1),
        },
    }
    # Probes whose gates open for everybody and for nobody, whatever the prompt.
    probes = {n: {"vector": towards, "threshold": torch.tensor(t)} for n, t in (("anybody", -1e6), ("nobody", 1e6))}
    for name, t in {**tensors, **probes}.items():
        write(
            folder / "vectors",
            t,
            name=name,
            kind="feature" if "encoder" in t else "probe" if "threshold" in t else "direction",
            hook_point=LAST,
            model="probe-text",
            model_weight_hash=weight_hash_of_folder(MODEL),
            layer_mean_norm=LAYER_NORM,
            percentile99=1.5 if "encoder" in t else None,
            made_by=MadeBy(command="test", inputs={"sae": {"weights_sha256": SAE, "feature": 7}}),
        )
    add = {"op": "add", "unit": "absolute", "doses": ADDED}
    fields = {
        "dtype": "float32",
        "server": {"max_total_tokens": 8192},  # so that one engine serves all of this
        "workload": {"source": "documents", "count": 7, "chars": 300},
        "neutral": {"source": "documents", "count": 7, "chars": 300, "seed": 9},
        "steer": {"library": "vectors"},
        "target": {"positive": POSITIVE, "negative": NEGATIVE},
        "arms": {
            "planted": {"vectors": ["planted"], **add},
            "chance": {"vectors": ["chance"], **add},
            "clamped": {"vectors": ["feature"], "op": "clamp", "doses": CLAMPED},
            "ablated": {"vectors": ["feature"], "op": "ablate_feature", "doses": [1.0]},
            "prompting": {"prefixes": ["import sys\n"]},
        },
        "registered": [
            {"arm": "planted", "against": "chance", "at": 0.005},
            {"arm": "clamped"},
            {"arm": "prompting", "against": "planted"},
        ],
        "side_effects": [0.005],
        "prompt_tokens": 16,
        "steps": 6,
        "free_steps": 10,
    }
    path = folder / "dose.yaml"
    path.write_text(yaml.safe_dump(fields))
    config = load_config(path, SteerDoseConfig)
    prepared = recording.prepare(config)
    with EngineHost() as host:
        specs, recorded_with = recording.specs_of(prepared, config, folder / "study")
        runs = record(specs, recorded_with, folder / "study", asks=recording.ASKS, host=host)
        result = study_dose(runs, config, "planted")
        SteerDose().write(result, folder / "study")
        yield result, runs, unembedding, {**tensors, "folder": folder, "host": host, "prepared": prepared}


def test_every_dose_does_what_the_rows_of_the_plain_model_say(planted: tuple) -> None:
    result, runs, unembedding, tensors = planted
    assert result.ok
    forced = runs[FORCED]
    at = places(forced, 6)
    v = tensors["planted"]["vector"]
    unit = v / v.norm()
    f = tensors["feature"]

    def activation(x: torch.Tensor) -> torch.Tensor:
        pre = x @ f["encoder"] + f["encoder_bias"]
        return pre.clamp(min=0) * (pre > f["threshold"])

    known = {
        ("planted", 1): lambda x: x + ADDED[0] * unit,
        ("planted", 3): lambda x: x + ADDED[2] * unit,
        ("clamped", 2): lambda x: x + (CLAMPED[1] * 1.5 - activation(x))[:, None] * f["vector"],
        ("ablated", 1): lambda x: x - activation(x)[:, None] * f["vector"],
    }
    for (arm, dose), changed in known.items():
        mine = at[(at["arm"] == arm) & (at["dose"] == dose)]
        x = forced.rows(LAST, mine["plain"].to_numpy()).float()
        p, q = (torch.log_softmax(unembedding.logits(r), -1) for r in (x, changed(x)))
        by = mine.assign(
            kl=(p.exp() * (p - q)).sum(-1).numpy(),
            shift=(log_odds(q, POSITIVE, NEGATIVE) - log_odds(p, POSITIVE, NEGATIVE)).numpy(),
            nll=(p - q).gather(-1, torch.from_numpy(mine["token"].to_numpy(np.int64))[:, None])[:, 0].numpy(),
        )
        means = by.groupby(["scope", "family"])[["kl", "shift", "nll"]].mean().groupby("scope").mean()
        told = result.doses[(result.doses["arm"] == arm) & (result.doses["dose"] == dose)].iloc[0]
        assert told["shift"] == pytest.approx(means.loc["text", "shift"], rel=1e-3, abs=1e-5), arm
        assert told["kl"] == pytest.approx(means.loc["neutral", "kl"], rel=1e-3, abs=1e-6), arm
        assert told["nll"] == pytest.approx(means.loc["neutral", "nll"], rel=1e-3, abs=1e-5), arm
    active = activation(forced.rows(LAST, at["plain"].to_numpy()).float())
    assert (active > 0).any(), "the ablation is of nothing"


def test_the_planted_direction_gains_more_than_chance_and_the_report_says_so(planted: tuple) -> None:
    result, runs, _, tensors = planted
    registered = result.registered.set_index("comparison")
    first = registered.iloc[0]
    assert first["difference"] > 0
    assert first["low"] > 0
    by = result.doses[result.doses["arm"] == "planted"]["shift"].to_numpy()
    assert (np.diff(by) > 0).all()
    asked = runs[FORCED].requests()
    assert len(asked) == 14 * (1 + 3 + 3 + 2 + 1 + 1)
    assert set(result.free["arm"]) == set(result.config.arms)
    assert PLAIN not in set(result.doses["arm"])
    page = (tensors["folder"] / "study" / "report.html").read_text()
    assert "What each arm gains for what it costs" in page


CLAMP = 3.0


@pytest.fixture(scope="module")
def served(planted: tuple) -> Run:
    """Sampled requests: six that ask for a clamp of generated tokens, of which one waits for a gate that opens and one
    for a gate that stays closed; and a plain one."""
    _, _, _, made = planted
    prepared = made["prepared"]
    entry = {"vector": "feature", "op": "clamp", "strength": CLAMP, "phases": ["decode"]}
    requests = []
    for i, r in enumerate(prepared.workload.requests[:7]):
        params: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "ignore_eos": True}
        gate = {5: {"gate": {"by": "probe", "probe": "nobody"}}, 6: {"gate": {"by": "probe", "probe": "anybody"}}}
        if i != 3:
            params["custom_params"] = {"probe": {"steer": [{**entry, **gate.get(i, {})}]}}
        requests.append(replace(r, index=i, sampling_params=params))
    spec = RunSpec("served", requests, hook_points=["hook_embed", LAST])
    return record([spec], prepared, made["folder"], asks=("force", "steer"), host=made["host"])["served"]


def manifest(run: Run, value: float, **fields: Any) -> FeatureManifest:
    """One deployed feature."""
    evidence = {
        "run": "dose",
        "manifest_sha256": "b" * 64,
        "measure": "log-odds of the target, nats",
        "dose": 2.0,
        "unit": "p99",
        "effect": 1.0,
        "low": 0.5,
        "high": 1.5,
        "control": 0.1,
        "side_effect": 0.01,
        "n": 7,
        "of": {"feature": 7, "sae_sha256": SAE, "mode": "clamp", "value": value},
    }
    feature = {
        "index": 7,
        "label": "planted",
        "labelled": {"by": "human", "name": "a test"},
        "owner": "tests",
        "evidence": [evidence],
        "clamp": {"mode": "clamp", "value": value},
        "status": "deployed",
    }
    told = {
        "model": "probe-text",
        "model_weight_hash": weight_hash_of_folder(MODEL),
        "hook_point": LAST,
        "sae_sha256": SAE,
        "features": [feature],
    }
    return FeatureManifest.model_validate({**told, **fields})


def replayed(planted: tuple, served: Run, value: float, name: str) -> ReplayResult:
    made = planted[3]
    prepared = replaying.prepare(manifest(served, value), served, made["folder"] / "vectors", made["folder"] / name)
    found = replaying.run(prepared, made["folder"] / name, host=made["host"])
    result = study_replay(prepared, found)
    Replay().write(result, made["folder"] / name)
    return result


def test_a_run_under_its_manifest_passes_the_audit(planted: tuple, served: Run) -> None:
    result = replayed(planted, served, CLAMP, "passes")
    assert result.ok, result.checks["replay"]
    assert (result.requests, result.under) == (7, 5)
    assert set(result.rows["interventions"]) == {True, False}
    told = result.activations.iloc[0]
    assert told["positions"] == 5 * 7
    gates = next(c for c in result.checks["replay"] if c.name == "gates")
    assert (gates.covered, gates.holds) == (2, True)
    assert told["stored"] == pytest.approx(told["replayed"], rel=1e-4)
    assert planted[3]["host"].starts == 1


def test_a_changed_strength_is_found_in_the_rows_and_in_the_ledger(planted: tuple, served: Run) -> None:
    result = replayed(planted, served, CLAMP * 1.01, "changed")
    checks = {c.name: c for c in result.checks["replay"]}
    assert not result.ok
    assert "feature 7: `clamp` 3 was done, and the manifest states `clamp` 3.03 (6 requests)" in (
        checks["as the manifest states"].violation or ""
    )
    # By one hundredth, which only the rows under the intervention show.
    assert "positions under interventions" in (checks["rows"].violation or "")
    plain = result.rows[~result.rows["interventions"]]
    assert (plain["largest"] <= plain["limit"]).all()


def test_other_weights_are_refused_before_an_engine_is_asked(planted: tuple, served: Run) -> None:
    wrong = manifest(served, CLAMP, model_weight_hash="c" * 64)
    with pytest.raises(ConfigError, match="with weights cccccccccccc, and those of"):
        replaying.prepare(wrong, served, planted[3]["folder"] / "vectors", planted[3]["folder"] / "refused")

"""What a vector is made of: exact rows, planted directions recovered, nothing found where nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.run.weights import weight_hash
from sglang_probe.stats.intervals import LEAST_CLUSTERS
from sglang_probe.steering import contrast, library, make
from sglang_probe.steering.contrast import Rows
from sglang_probe.steering.make import Target
from tests.steering.conftest import POINT, WEIGHTS, MakeRun

D = 6


def simple(rid: str, position: int) -> torch.Tensor:
    """Row `[request, position, 1, 0, 0, 0]`; position 0 is a sink in a direction of its own."""
    if position == 0:
        return torch.tensor([0.0, 0, 0, 0, 0, 5.0])
    return torch.tensor([float(rid[1:]), position, 1.0, 0, 0, 0])


@pytest.fixture
def run(rows_run: MakeRun) -> Run:
    return rows_run("run", {"r2": (3, 3), "r4": (4, 2), "r6": (1, 1)}, simple)


@pytest.mark.parametrize(
    ("phase", "place", "expected", "positions"),
    [
        ("prefill", "last", {"r2": [2, 2], "r4": [4, 3]}, 2),
        ("prefill", "mean", {"r2": [2, 1.5], "r4": [4, 2]}, 5),
        ("decode", "last", {"r2": [2, 4], "r4": [4, 4]}, 2),
        ("decode", "mean", {"r2": [2, 3.5], "r4": [4, 4]}, 3),
    ],
)
def test_a_request_gives_the_row_of_its_last_position_or_the_mean_of_all(
    run: Run, phase: contrast.Phase, place: contrast.Place, expected: dict[str, list[float]], positions: int
) -> None:
    """Step 1 is the position after the prompt; a prompt of one token has position 0 alone, and that is left out."""
    found = contrast.rows_of(run, POINT, phase=phase, place=place)
    assert dict(zip(found.rids, found.x_ND[:, :2].tolist(), strict=True)) == expected
    assert found.positions == positions
    assert found.sinks == (3 if phase == "prefill" else 0)


def test_long_rows_are_sinks_wherever_they_are(rows_run: MakeRun) -> None:
    def row(rid: str, position: int) -> torch.Tensor:
        return simple(rid, position) * (100 if (rid, position) == ("r1", 2) else 1)

    found = contrast.rows_of(rows_run("long", {"r1": (4, 1), "r2": (4, 1)}, row), POINT, phase="prefill", place="mean")
    assert found.x_ND[0, :3].tolist() == [1, 2, 1]  # positions 1 and 3
    assert found.sinks == 3


def test_a_last_row_that_is_not_held_is_not_replaced_by_another(rows_run: MakeRun) -> None:
    """The last row of r1 is a sink: the row before it is no last row."""

    def row(rid: str, position: int) -> torch.Tensor:
        return simple(rid, position) * (100 if (rid, position) == ("r1", 3) else 1)

    found = contrast.rows_of(rows_run("long", {"r1": (4, 1), "r2": (4, 1)}, row), POINT, phase="prefill", place="last")
    assert found.rids == ("r2",)


def test_rows_of_intervened_positions_are_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = run.tokens()
    steered = (tokens["rid"] == "r4") & (tokens["position"] == 2)
    monkeypatch.setattr(Run, "tokens", lambda _self: tokens.assign(intervention=np.where(steered, "abc", None)))
    found = contrast.rows_of(run, POINT, phase="prefill", place="mean")
    assert found.x_ND[:, 1].tolist() == [1.5, 2.0]  # of r4 positions 1 and 3
    assert found.intervened == 1


def test_a_mean_difference_is_written_with_what_it_was_made_from(rows_run: MakeRun, tmp_path: Path) -> None:
    a = rows_run("a", {"r1": (3, 1), "r3": (3, 1)}, simple)
    b = rows_run("b", {"r7": (5, 1), "r9": (5, 1)}, simple)
    vector = make.mean_difference(Target(tmp_path / "lib", "v"), a, b, POINT, phase="prefill", place="last")
    assert vector.vector.tolist() == [-6, -2, 0, 0, 0, 0]
    card = library.Library.open(tmp_path / "lib")["v"].card
    assert card == vector.card
    assert card.norm == pytest.approx(40**0.5)
    assert card.model_weight_hash == weight_hash(WEIGHTS)
    assert card.made_by.inputs["positive"]["requests"] == 2
    assert card.made_by.phase == "prefill"
    assert card.evidence["held_out_auc"]["low"] is None  # one prompt of each kind is no interval
    norms = [
        np.linalg.norm([i, p, 1])
        for i, ps in ((1, (1, 2)), (3, (1, 2)), (7, range(1, 5)), (9, range(1, 5)))
        for p in ps
    ]
    assert card.layer_mean_norm == pytest.approx(np.mean(norms))


@pytest.mark.parametrize(
    ("named", "told"), [("tiny", "tiny"), ("org/tiny", "org/tiny"), ("/srv/models/tiny", "tiny"), ("./tiny", "tiny")]
)
def test_a_card_does_not_say_where_the_model_lies(named: str, told: str) -> None:
    assert contrast.without_path(named) == told


def test_runs_of_two_models_are_refused(rows_run: MakeRun) -> None:
    lengths = {"r1": (3, 1)}
    a = rows_run("a", lengths, simple)
    with pytest.raises(ConfigError, match="of 2 models"):
        contrast.model_of([a, rows_run("b", lengths, simple, weights={"x": "d" * 64})])
    with pytest.raises(ConfigError, match="does not say which weights"):
        contrast.model_of([a, rows_run("c", lengths, simple, weights=None)])


def test_a_run_without_such_rows_is_refused(run: Run, rows_run: MakeRun) -> None:
    one = rows_run("one", {"r1": (3, 1)}, simple)
    with pytest.raises(ConfigError, match=r"holds no row .* generated tokens"):
        contrast.rows_of(one, POINT, phase="decode", place="mean")


def rows(x: np.ndarray, families: list[str] | None = None) -> Rows:
    names = tuple(f"{id(x)} {i}" for i in range(len(x)))
    return Rows(x, names, tuple(families) if families else names, len(x), 0, 0, np.ones(1))


def test_families_are_never_on_both_sides() -> None:
    a = rows(np.zeros((30, 2)), [f"f{i % 10}" for i in range(30)])
    b = rows(np.zeros((40, 2)), [f"f{i % 20}" for i in range(40)])
    for seed in range(20):
        found = contrast.split([a, b], share=0.5, seed=seed)
        train, held = (
            {s.family[i] for s, parts in zip((a, b), found, strict=True) for i in getattr(parts, side)}
            for side in ("train", "held_out")
        )
        assert train
        assert held
        assert not train & held
        assert len(held) == 10  # half of the twenty families of both
        for s, parts in zip((a, b), found, strict=True):
            assert len({s.family[i] for i in parts.held_out}) == len(parts.held_out)  # one of a family


def test_a_planted_direction_is_found_and_noise_is_not() -> None:
    """Separation of 3 standard deviations along one of 50 axes, in sets of 60; and of 0."""
    rng = np.random.default_rng(0)
    missed, covered = [], []
    for seed in range(200):
        a, b = rng.normal(size=(2, 60, 50))
        covered.append(_covers(contrast.separation(rows(a), rows(b), seed=seed).auc, 0.5))
        a[:, 3] += 3
        found = contrast.separation(rows(a), rows(b), seed=seed)
        v = contrast.mean_difference(a, b)
        missed.append(float(found.auc.low) < 0.5 or v[3] / np.linalg.norm(v) < 0.8)
    assert sum(missed) == 0
    assert np.mean(covered) > 0.92


def _covers(interval: object, value: float) -> bool:
    return float(interval.low) <= value <= float(interval.high)  # type: ignore[attr-defined]


def test_no_interval_from_few_prompts() -> None:
    rng = np.random.default_rng(0)
    few, enough = 2 * LEAST_CLUSTERS - 2, 2 * LEAST_CLUSTERS
    assert np.isnan(contrast.separation(*(rows(rng.normal(size=(few, 3))) for _ in "ab"), seed=0).auc.low)
    assert not np.isnan(contrast.separation(*(rows(rng.normal(size=(enough, 3))) for _ in "ab"), seed=0).auc.low)


def test_a_random_control_has_the_covariance_of_the_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(500, 3, generator=generator, dtype=torch.float64) * scale @ mix + 10
    drawn = torch.stack([make.random_direction(x, seed=s) for s in range(4000)])
    sample = torch.cov(x.T)
    found = drawn.T @ drawn / len(drawn)
    assert float((found - sample).norm() / sample.norm()) < 0.06
    assert torch.equal(make.random_direction(x, seed=5), make.random_direction(x, seed=5))
    assert not torch.equal(make.random_direction(x, seed=5), make.random_direction(x, seed=6))


def test_a_random_control_has_the_norm_of_what_it_is_a_control_for(rows_run: MakeRun, tmp_path: Path) -> None:
    run = rows_run("a", {"r1": (9, 1), "r3": (9, 1)}, simple)
    other = rows_run("b", {"r5": (9, 1)}, simple)
    target = tmp_path / "lib"
    v = make.mean_difference(Target(target, "v"), run, other, POINT, phase="prefill", place="mean")
    r = make.random_control(Target(target, "r"), run, POINT, seed=3, like=v)
    assert r.card.norm == pytest.approx(v.card.norm, rel=1e-6)
    assert r.card.layer_mean_norm == v.card.layer_mean_norm  # equal strengths in `mean_norm` are equal doses
    assert r.vector[3:].abs().max() == 0  # rows have no variance there, and sinks are left out
    assert r.card.made_by.inputs["like"] == {"name": "v", "hash": v.hash}


CFG = {
    "architecture": "jumprelu",
    "d_in": D,
    "d_sae": 3,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {"hook_name": POINT, "model_name": "tiny"},
}


def sae(folder: Path, **cfg: object) -> Path:
    folder.mkdir()
    told = {**CFG, **cfg}
    (folder / "cfg.json").write_text(json.dumps(told))
    g = torch.Generator().manual_seed(0)
    tensors = {"W_enc": torch.randn(D, 3, generator=g), "W_dec": torch.randn(3, D, generator=g)}
    tensors |= {"b_enc": torch.randn(3, generator=g), "b_dec": torch.randn(D, generator=g)}
    if told["architecture"] == "jumprelu":
        tensors["threshold"] = torch.tensor([0.5, 0.1, 0.7])
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def test_a_feature_reads_as_its_sae_does(tmp_path: Path) -> None:
    """Against the formula over all features at once (SAELens 6, JumpReLU)."""
    from safetensors.torch import load_file

    folder = sae(tmp_path / "sae")
    w = load_file(folder / "sae_weights.safetensors")
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(2))
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    z = torch.relu(pre) * (pre > w["threshold"])
    for i in range(3):
        found = make.read_sae_feature(folder, i)
        assert torch.equal(found.tensors["vector"], w["W_dec"][i])
        np.testing.assert_allclose(make.activations(x, found.tensors), z[:, i].numpy(), atol=1e-5)
    assert 0 < float((z > 0).float().mean()) < 1


def test_a_feature_is_written_with_its_rate_and_percentile(rows_run: MakeRun, tmp_path: Path) -> None:
    run = rows_run("a", {f"r{i}": (6, 1) for i in range(1, 9)}, simple)
    folder = sae(tmp_path / "sae")
    vector = make.sae_feature(Target(tmp_path / "lib", "f"), folder, 1, run)
    x = torch.tensor([[i, p, 1, 0, 0, 0] for i in range(1, 9) for p in range(1, 6)]).double()
    z = make.activations(x, vector.tensors)
    assert 0 < (z > 0).sum() < len(z)
    assert vector.card.percentile99 == pytest.approx(np.quantile(z[z > 0], 0.99))
    assert vector.card.evidence["rate"] == pytest.approx((z > 0).mean())
    direction = make.sae_feature(Target(tmp_path / "lib", "d"), folder, 1, run, direction=True)
    assert direction.card.kind == "direction"
    assert direction.vector.equal(vector.vector)


@pytest.mark.parametrize(
    ("cfg", "index", "says"),
    [
        ({"architecture": "topk", "k": 2}, 0, "does not follow from its own weights"),
        ({"normalize_activations": "layer_norm"}, 0, "does not follow from its own weights"),
        ({}, 3, "features 0 to 2, and no feature 3"),
        ({}, -1, "no feature -1"),
        ({"metadata": {}}, 0, "does not say where its rows come from"),
        ({"architecture": "gated"}, 0, "architecture `gated` cannot be read"),
    ],
)
def test_a_feature_that_cannot_be_had_is_refused(cfg: dict, index: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        make.read_sae_feature(sae(tmp_path / "sae", **cfg), index)


def test_an_sae_of_another_model_is_refused(rows_run: MakeRun, tmp_path: Path) -> None:
    run = rows_run("a", {"r1": (6, 1)}, simple)
    folder = sae(tmp_path / "sae", metadata={"hook_name": POINT, "model_name": "other"})
    with pytest.raises(ConfigError, match="is of model `other`"):
        make.sae_feature(Target(tmp_path / "lib", "f"), folder, 1, run)
    assert make.sae_feature(Target(tmp_path / "lib", "f"), folder, 1, run, trust=True).card.model == "tiny"

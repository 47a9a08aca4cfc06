"""`sae eval --against saelens`: two programs that judge the same weights agree where they mean the same."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError, RunDirectoryError, UnsupportedError
from sglang_probe.paths import shipped
from sglang_probe.sae import saelens
from sglang_probe.sae.evaluation import Sinks, evaluate
from sglang_probe.sae.folder import read_sae, weights_sha256, write_sae
from sglang_probe.sae.sae import ARCHITECTURES
from sglang_probe.studies.sae_eval import against
from sglang_probe.studies.sae_eval.against import _whole, compared, recovered
from tests.sae.lens import needs_sae_lens
from tests.sae.made_rows import POINT, Text, make_run_of
from tests.sae.small import random_sae

SHIPPED, CHECKPOINT = shipped("models/sae-probe-text/seed-0"), shipped("models/probe-text/checkpoint")


@needs_sae_lens
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_the_same_rows_both_say_the_same(tmp_path: Path, architecture: str) -> None:
    rng = np.random.default_rng(0)
    # A mean far from zero: the variance is a difference of large numbers. More rows than SAELens is given at a time.
    x = torch.from_numpy(rng.normal(size=(9000, 6)) * 2 + 30).float()
    write_sae(random_sae(architecture), tmp_path)
    ours, theirs = evaluate(read_sae(tmp_path), x), saelens.of_rows(tmp_path, x)
    assert theirs["explained_variance"] == pytest.approx(ours.explained_variance, rel=1e-4)
    assert theirs["mse"] == pytest.approx(float(ours.rows["error"].mean()), rel=1e-5)
    assert theirs["l0"] == pytest.approx(ours.l0, rel=1e-6)
    assert theirs["dead_share"] == ours.dead_share
    assert abs(theirs["explained_variance_legacy"] / ours.explained_variance - 1) > 0.01  # another definition


@needs_sae_lens
@pytest.mark.slow
def test_in_its_own_forward_pass_rows_and_losses_are_those_of_transformers() -> None:
    """Nothing of SAELens but `of_texts`: its wrapper of the checkpoint, our name of the block, the cut at `start`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(10, 3000, (3, 24)))
    sae, start = read_sae(SHIPPED), 7

    def losses(change: Callable[[torch.Tensor], torch.Tensor] | None, start: int) -> float:
        def hook(_module: object, _given: object, x: torch.Tensor) -> torch.Tensor:
            return x if change is None else torch.cat([x[:, :start], change(x[:, start:])], dim=1)

        handle = model.model.layers[2].register_forward_hook(hook)
        with torch.no_grad():
            logp = model(ids).logits[:, start:-1].log_softmax(-1)
        handle.remove()
        return -float(logp.gather(2, ids[:, start + 1 :, None]).mean())

    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[3]
    for where in (start, None):
        theirs = saelens.of_texts(SHIPPED, CHECKPOINT, "blocks.2.hook_resid_post", ids, start=where)
        at = where or 0
        assert theirs["ce_loss_without_sae"] == pytest.approx(losses(None, at), rel=1e-5)
        assert theirs["ce_loss_with_sae"] == pytest.approx(losses(sae.reconstruct, at), rel=1e-5)
        assert theirs["ce_loss_with_ablation"] == pytest.approx(losses(torch.zeros_like, at), rel=1e-5)
    assert theirs["explained_variance"] == pytest.approx(evaluate(sae, x.flatten(0, 1)).explained_variance, rel=1e-5)


@needs_sae_lens
@pytest.mark.slow
def test_the_table_says_what_was_compared_and_what_could_not_be(cli: Callable, tmp_path: Path) -> None:
    texts = [Text([*range(12)], [1], np.random.default_rng(i).normal(size=(12, 6))) for i in range(4)]
    run = make_run_of(tmp_path / "run", texts)
    write_sae(random_sae("jumprelu", metadata={"hook_name": POINT}), tmp_path / "sae")
    done = cli("sae", "eval", tmp_path / "sae", run.path, "--against", "saelens", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    table = pd.DataFrame(told["against"]).set_index("quantity")
    assert table.loc["explained variance", "ours"] == pytest.approx(told["explained_variance"])
    assert abs(table.loc["explained variance", "difference"]) < 1e-5
    assert table["measured_on"].str.startswith("44 rows").all()
    assert any("--model" in note for note in told["notes"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--against", "sae-bench"], "`--against` is `saelens`"),
        (["--against", "saelens", "--texts", "0"], "`--texts` at least 1"),
        (["--gap", "x"], "no meaning without"),
    ],
)
def test_options_that_mean_nothing_are_refused(cli: Callable, tmp_path: Path, options: list[str], said: str) -> None:
    done = cli("sae", "eval", tmp_path, tmp_path, *options)
    assert done.returncode == 2
    assert said in done.stderr


def test_results_of_another_sae_are_refused(tmp_path: Path) -> None:
    write_sae(random_sae("jumprelu"), tmp_path / "sae")
    gap = tmp_path / "gap"
    (gap / "tables").mkdir(parents=True)
    points = pd.DataFrame({"kind": ["human"], "nll_sae": [float("nan")]})
    nothing = {"sinks": Sinks(), "gap": gap, "model": None, "texts": 1}

    def say() -> str:
        with pytest.raises(ConfigError) as e:
            compared(tmp_path / "sae", [], None, None, **nothing)  # type: ignore[arg-type]
        return str(e.value)

    assert "holds no results" in say()
    points.to_parquet(gap / "tables" / "points.parquet")
    (gap / "summary.json").write_text(json.dumps({"sae": {"weights_sha256": "0"}}))
    assert "of another SAE" in say()
    (gap / "summary.json").write_text(json.dumps({"sae": {"weights_sha256": weights_sha256(tmp_path / "sae")}}))
    assert "no human text whose rows were replaced" in say()


def test_what_saelens_cannot_do_costs_a_note_and_not_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object, **__: object) -> None:
        raise UnsupportedError("SAELens has no such hook point")

    monkeypatch.setattr(against, "same_rows", lambda *_: pd.DataFrame([[1.0] * 6], columns=against.COLUMNS))
    monkeypatch.setattr(against, "checkpoint_of", lambda *_: tmp_path)
    monkeypatch.setattr(against, "by_default", cannot)
    given = {"sinks": Sinks(), "gap": None, "model": None, "texts": 1}
    table, notes = compared(tmp_path, [None], None, None, **given)  # type: ignore[arg-type,list-item]
    assert len(table) == 1
    assert notes == ["not all was compared: SAELens has no such hook point"]


def test_prompts_whose_ids_were_not_recorded_are_passed_over() -> None:
    rows = torch.ones(3, 2)
    frame = pd.DataFrame({"rid": ["a", "b"], "prompt_ids": [None, [1, 2, 3]]})
    run: Any = SimpleNamespace(path="run", requests=lambda: frame, activations=lambda *_, **__: rows)
    ids, x = _whole(run, POINT, 5)
    assert ids.tolist() == [[1, 2, 3]]
    assert torch.equal(x, rows[None])
    frame = frame.iloc[:1]
    with pytest.raises(RunDirectoryError, match="run has no token ids of prompts"):
        _whole(run, POINT, 5)


@pytest.mark.parametrize("prompt", [None, [1, -1, 3]])
def test_a_gap_without_token_ids_is_refused(
    prompt: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sae(random_sae("jumprelu", metadata={"hook_name": POINT}), tmp_path)
    monkeypatch.setattr(against, "where_of", lambda *_, **__: ([0], None))
    run: Any = SimpleNamespace(
        path="run", requests=lambda: pd.DataFrame({"index": [0], "prompt_ids": pd.Series([prompt], dtype=object)})
    )
    with pytest.raises(RunDirectoryError, match="run lacks token ids"):
        recovered(tmp_path, run, pd.DataFrame({"position": [1, 2], "nll": [1.0, 1.0]}), tmp_path, 1)


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="SAELens is installed")
def test_without_saelens_it_says_what_to_install(tmp_path: Path) -> None:
    write_sae(random_sae("jumprelu"), tmp_path)
    with pytest.raises(ConfigError, match="evaluation by SAELens needs SAELens"):
        saelens.of_rows(tmp_path, torch.ones(3, 6))

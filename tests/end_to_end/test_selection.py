"""A run that keeps some positions and heads, with the cache on and chunks that are mixed with decode steps, in bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_probe.errors import RunDirectoryError
from sglang_probe.eviction.from_run import layer_from_run
from sglang_probe.paths import shipped
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.reference import reference_errors
from sglang_probe.verify.verify import verify
from tests.end_to_end.telemetry_parity import SHARE, telemetry_differences

pytestmark = [pytest.mark.engine, pytest.mark.reviewed("telemetry")]
MODEL = shipped("models/probe-text/checkpoint")
QUERIES, KEYS, VALUES = (f"blocks.3.attn.{site}" for site in ("hook_rot_q", "hook_rot_k", "hook_v"))
RESID = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def run(cli: Callable, write_yaml: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("selection") / "run"
    config = write_yaml(
        "selection",
        dtype="bfloat16",
        hook_points=["hook_embed", RESID, QUERIES, KEYS, VALUES],
        rows={
            "window": 16,
            "at": {
                "attn.hook_rot_k": {},
                VALUES: {"kv_heads": [1, 3]},
                "hook_resid_post": {"prefill": "none", "decode": {"steps": [1, 9, 99]}},
            },
        },
        telemetry={"layers": [3], "every": 1},
        sampling={"max_new_tokens": 24, "temperature": 1.0},
        server={"chunked_prefill_size": 128, "enable_mixed_chunk": True},
    )
    done = cli("harvest", config, "--output", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_run(path)


def test_every_invariant_holds_and_kept_rows_are_the_models(run: Run) -> None:
    assert (run.forwards()["mode"] == "mixed").any()
    checks = {c.name: c for c in verify(run)}
    assert [str(c) for c in checks.values() if not c.holds] == []
    assert checks["selection"].covered > run.row_count()
    overshoot = (run.spans()["phase"] == "overshoot").sum()  # a step too many, on releases that compute one
    assert checks["telemetry"].covered == (run.requests()["output_len"] - 1).sum() + overshoot
    errors = reference_errors(run, str(MODEL), requests=10)
    assert max(float(e.max()) for e in errors.values()) < 5e-2
    assert len(errors[KEYS]) == run.row_count() > len(errors[QUERIES]) > 10 * len(errors[RESID]) > 0


def test_what_was_not_selected_is_said_to_be_that(run: Run) -> None:
    r = run.requests().iloc[-1]
    with pytest.raises(RunDirectoryError, match=r"no row of `blocks\.3\.attn\.hook_rot_q`: .*not selected"):
        run.activations(r["rid"], QUERIES)
    window = run.activations(r["rid"], QUERIES, first=r["prompt_len"] - 16)
    assert len(window) == 16 + r["output_len"] - 1
    tokens = run.tokens_of(r["rid"])
    held = tokens[run.holds(RESID, tokens["row"].to_numpy())]
    assert held["position"].tolist() == [r["prompt_len"], r["prompt_len"] + 8]


def test_a_layer_is_read_with_the_window_that_was_kept(run: Run) -> None:
    layer = layer_from_run(run, run.requests()["rid"].iloc[-1], 3, window=16)
    assert layer.q_NHD.shape == (16, 8, 32)
    assert layer.future is not None
    assert run.head_numbers(VALUES) == [1, 3]
    assert run.heads(VALUES) == (2, 32)


def test_telemetry_in_bf16_is_that_of_captured_rows(run: Run, tmp_path: Path) -> None:
    """Reused keys come from the row of their origin here and from the KV slot there: the same bits."""
    differences = telemetry_differences(run, tmp_path / "telemetry.parquet")
    print(differences.to_string())
    assert differences["values"].min() > 500
    assert differences.loc["mass_system", "values"] > 500
    assert differences["max"].drop(SHARE).max() < 2e-5
    assert np.isfinite(differences["max"]).all()
    assert torch.bfloat16 == run.rows_dtype()

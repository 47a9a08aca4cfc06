"""An engine on an accelerator records rows, telemetry and interventions under a certificate that covers it, or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.hooks import policy
from sglang_probe.engine.hooks.certified import certified, kinds_needed, subject_in_force
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.errors import UnsupportedError
from sglang_probe.paths import shipped
from sglang_probe.run import certificate
from tests.engine.made_session import make_session

MODEL = shipped("models/probe-text/checkpoint")
RESOLVED = {
    "model_path": str(MODEL),
    "device_name": "NVIDIA H100",
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "cuda_graphs": {"decode": "full", "prefill": "breakable"},
    "tp_size": 1,
}
POINTS = ["hook_embed", "blocks.1.hook_resid_post"]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGLANG_PROBE_CACHE", str(tmp_path))


def prove(**of: Any) -> dict[str, Any]:
    """What a proof of this configuration, or of one that differs in `of`, leaves in the cache."""
    subject = {**subject_in_force({**RESOLVED, **of}), **certificate.model_facts(MODEL)}
    made = certificate.sealed(
        {
            "schema": certificate.SCHEMA,
            "time": "now",
            "passed": True,
            "subject": subject,
            "kinds": certificate.kinds_of(POINTS),
        }
    )
    certificate.write_certificate(certificate.default_path(subject), made)
    return made


def ask(device: str = "cuda", resolved: dict[str, Any] = RESOLVED, **fields: Any) -> dict[str, Any] | None:
    config = EngineProbeConfig.model_validate({"run": "run", "hook_points": POINTS, **fields})
    return certified(config, device, lambda: resolved)


def test_without_a_certificate_the_engine_is_refused_and_the_command_is_named() -> None:
    with pytest.raises(UnsupportedError, match="no certificate covers it") as refused:
        ask()
    assert f"sglang-probe prove --model {MODEL} --dtype bfloat16 --server" in str(refused.value)
    assert '{"attention_backend": "triton"}' in str(refused.value)


@pytest.mark.parametrize(
    ("backend", "named"),
    [
        ("flashinfer", '"attention_backend": "flashinfer"'),
        ("fa3", '"attention_backend": "fa3"'),
        ("fa3 (prefill), flashinfer (decode)", '"decode_attention_backend": "flashinfer"'),
    ],
)
def test_a_certificate_is_of_one_attention_backend(backend: str, named: str) -> None:
    """Rows, telemetry by either way, interventions and kept sets: each refusal names the command."""
    there = {**RESOLVED, "attention_backend": backend}
    prove()  # of Triton
    for asked in ({}, {"telemetry": {}}, {"telemetry": {"by": "lists"}}, {"hook_points": [], "asks": ["evict"]}):
        with pytest.raises(UnsupportedError, match="no certificate covers it") as refused:
            ask(resolved=there, **asked)
        assert named in str(refused.value)
        assert ("--kept-sets" in str(refused.value)) == ("asks" in asked)
    made = prove(attention_backend=backend)
    assert made["subject"]["attention_backend"] == backend
    assert ask(resolved=there) is not None
    with pytest.raises(UnsupportedError, match="it is not of kept sets"):
        ask(resolved=there, asks=["evict"])


def test_the_certificate_is_cited_by_its_hash() -> None:
    made = prove()
    found = ask()
    assert found is not None
    assert (found["sha256"], found["time"]) == (made["sha256"], "now")
    named = str(next(certificate.cache_dir().glob("certificates/*.json")))
    assert ask(certificate=named) == found


@pytest.mark.parametrize(
    ("field", "value"),
    [("device_name", "NVIDIA H200"), ("dtype", "float16"), ("attention_backend", "fa3"), ("tp_size", 2)],
)
def test_a_proof_of_something_else_is_none(field: str, value: Any) -> None:
    prove(**{field: value})
    with pytest.raises(UnsupportedError, match="this is"):
        ask()


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_proof_without_graphs_is_none_of_graphs_and_one_with_them_is_one_of_eager_forwards(phase: str) -> None:
    eager = {"cuda_graphs": {**RESOLVED["cuda_graphs"], phase: "disabled"}}
    prove(**eager)
    with pytest.raises(UnsupportedError, match="graphs"):
        ask()
    prove()
    assert ask(resolved={**RESOLVED, **eager}) is not None


def test_a_cpu_the_ledger_alone_and_the_proof_itself_need_none() -> None:
    assert ask("cpu") is None
    assert ask(hook_points=[]) is None
    assert ask(proving=True) is None


def test_telemetry_and_interventions_need_the_rows_that_they_are_of() -> None:
    assert kinds_needed([], telemetry=False, steer=False) == set()
    assert kinds_needed([], telemetry=True, steer=False) == {"attn.hook_rot_q", "attn.hook_rot_k"}
    assert kinds_needed([], telemetry=False, steer=True) == {"hook_resid_post"}
    assert kinds_needed(["blocks.2.hook_scores"], telemetry=False, steer=False) == {"hook_resid_post"}
    prove()
    with pytest.raises(UnsupportedError, match=r"not of rows of attn.hook_rot_k, attn.hook_rot_q"):
        ask(telemetry={})


def test_a_model_whose_files_are_not_known_is_covered_by_none() -> None:
    prove()
    with pytest.raises(UnsupportedError, match="config_sha256"):
        ask(resolved={**RESOLVED, "model_path": "nobody/has-this-model"})


def test_an_engine_asks_when_its_scheduler_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before a live recording begins, whose manifest cites it, and not again when it begins anew."""
    running = make_session(monkeypatch, EngineProbeConfig(run=tmp_path, hook_points=POINTS), Rows, opened=False)
    monkeypatch.setattr(running, "in_force", lambda: RESOLVED)
    monkeypatch.setattr(policy, "started_with", lambda _scheduler: None)
    running.of_model(None, "cuda")
    assert running.in_graphs
    with pytest.raises(UnsupportedError, match="no certificate covers it"):
        running.attach(None, None, dp_rank=0, tp_size=1, records=True)
    made = prove()
    running.attach(None, None, dp_rank=0, tp_size=1, records=True)
    assert running.certificate is not None
    assert running.certificate["sha256"] == made["sha256"]

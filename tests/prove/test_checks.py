"""What is asked of a recording of a proof, and what the whole proof makes of the answers; no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_probe.errors import ProbeError
from sglang_probe.prove import checks
from sglang_probe.prove import prove as module
from sglang_probe.prove.config import ProofConfig
from sglang_probe.prove.overhead import Overhead
from sglang_probe.prove.owners import Owners, compare, read_owners
from sglang_probe.run import certificate
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from sglang_probe.verify.check import Check
from sglang_probe.verify.ownership import write_oracle
from tests.amended import amend
from tests.made_run import EMBEDDING, OUTPUTS, PROMPTS, make_run  # noqa: F401

MakeRun = Callable[..., Run]
A, B = ("a", 0), ("b", 0)
TRUE = Owners(5, 0, 0, 3, None, {B: dict.fromkeys(range(4), A)}, {A: (1, [A] * 6), B: (2, [A] * 4 + [B] * 2)})
"""Of `make_run`: `b` reuses four positions of `a`."""


def with_oracle(run: Run, embedding: torch.Tensor = EMBEDDING) -> Run:
    write_oracle(run, embedding, [t for of in (PROMPTS, OUTPUTS) for ids in of.values() for t in ids])
    amend(run.path)
    return Run(run.path)


def test_a_good_run_holds_and_its_owners_are_the_true_ones(make_run: MakeRun) -> None:  # noqa: F811
    run = with_oracle(make_run())
    found = checks.invariants(run, "x")
    assert found.violation is None
    assert found.covered > 5
    assert compare(run, TRUE)[1] is None
    assert checks.all_ended(run, ["a", "b"], "x").holds
    assert "1 never ended, the first c" in str(checks.all_ended(run, ["a", "b", "c"], "x").violation)


def test_rows_of_other_tokens_are_named(make_run: MakeRun) -> None:  # noqa: F811
    said = checks.invariants(with_oracle(make_run(), EMBEDDING.roll(1, 0)), "x").violation
    assert said is not None
    assert said.startswith("content: ")
    assert "the row is another token's" in said


def test_rows_that_nothing_is_compared_with_are_no_proof(make_run: MakeRun) -> None:  # noqa: F811
    assert "no row was compared" in str(checks.invariants(make_run(), "x").violation)


def test_owners_that_were_not_asked_are_no_proof() -> None:
    assert checks.owners_right(TRUE, "x").holds
    assert "nothing was compared" in str(checks.owners_right(Owners(), "x").violation)
    assert "2 wrong, 1 unknown; slot 3" in str(checks.owners_right(Owners(9, 2, 1, 3, "slot 3"), "x").violation)


def test_traffic_that_reused_nothing_is_no_proof_of_reuse(make_run: MakeRun) -> None:  # noqa: F811
    found = checks.reached([make_run()], cached=True)
    assert (found.holds, found.covered) == (True, 4)
    assert "reused 4 positions" in str(found.note)
    alone = make_run("alone", cache=False)
    assert "nothing is proved of reuse" in str(checks.reached([alone], cached=True).violation)
    assert checks.reached([alone], cached=False).holds


def test_prefill_graphs_of_which_none_was_replayed_are_not_proved(make_run: MakeRun) -> None:  # noqa: F811
    run = make_run()
    assert "no forward with a prompt was replayed" in str(
        checks.reached([run], cached=True, prefill_graphs=True).violation
    )
    forwards = run.forwards().assign(graph=True)
    replayed = SimpleNamespace(
        spans=run.spans, forwards=lambda: forwards, engine_requests=run.engine_requests, rebinds=run.rebinds
    )
    assert checks.reached([replayed], cached=True, prefill_graphs=True).holds  # type: ignore[list-item]


def test_graphs_that_were_captured_and_not_checked_are_no_proof() -> None:
    told = {"sizes": [1, 2, 8], "prefill_sizes": [64], "worst": {"p": 1e-3, "q": 2e-2}}
    told |= {"equal": {"p": 1.0, "q": 0.5}, "seconds": 0.3}
    found = checks.graphs(told, decode=True, prefill=True)
    assert (found.level, found.check.holds, found.check.covered, found.seconds) == ("P1", True, 4, 0.3)
    assert "decode: 1 to 8 tokens; prefill: 64 to 64 tokens; replay against eager: worst q, 2.0e-02" in str(
        found.check.note
    )
    assert "equal to the bit: 50%" in str(found.check.note)
    decode_alone = checks.graphs({**told, "prefill_sizes": []}, decode=True, prefill=True).check
    assert decode_alone.violation == "prefill graphs are in force, and none was checked"
    assert not checks.graphs(None, decode=True, prefill=False).check.holds
    assert checks.graphs(None, decode=False, prefill=False).check.holds


@pytest.fixture
def engine(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:  # noqa: F811
    """A proof whose engine records `make_run` each time; what it does may be changed."""
    does: dict[str, Any] = {"owner": 0, "fault": None, "reference": None}

    def harvest(job: Any, path: Path, _host: Any, **_: Any) -> Run:
        job.requests[:] = [r for r in job.requests if r.index < 2]
        run = with_oracle(make_run(f"{path.name}"))
        told = {"server_resolved": {"dtype": "bfloat16", "attention_backend": "x"}, "fault": does["fault"]}
        amend(run.path, lambda manifest: manifest.update(versions={"torch": "2"}, **told))
        path.mkdir(parents=True, exist_ok=True)
        if does["fault"]:
            (path / MANIFEST).write_text((run.path / MANIFEST).read_text())
            raise ProbeError("the recording is incomplete")
        if job.slot_truth is not None:
            counts = {"compared": 5, "wrong": does["owner"], "unknown": 0, "forwards": 3, "first": "slot 3"}
            reused = [[1, [0, 1, 2, 3], [0, 0, 0, 0]]]
            last = [[0, 1, [0] * 6], [1, 2, [0] * 4 + [1] * 2]]
            truth = {**counts, "attempts": [A, B], "reused": reused, "last": last}
            Path(f"{job.slot_truth}.0.json").write_text(json.dumps(truth))
        return Run(run.path)

    monkeypatch.setattr(module, "harvest", harvest)
    monkeypatch.setattr(checks, "unended", lambda run, rids: [])
    monkeypatch.setattr(module, "measure", lambda *_, **__: Overhead([(2.0, 2.0)], [(1.0, 1.0)], 8))
    monkeypatch.setattr(
        module, "check_against_transformers", lambda *_, **__: Check("reference", "", 9, "rows", does["reference"])
    )
    return does


def proved(tmp_path: Path) -> tuple[module.Proof, dict[str, Any]]:
    config = ProofConfig(requests=8)
    found = module.prove(config, folder=tmp_path / "proof")
    return found, found.certificate(config)


def test_a_proof_in_which_everything_holds_passes(engine: dict[str, Any], tmp_path: Path) -> None:
    found, made = proved(tmp_path)
    assert [str(a.check.violation) for a in found.asked if a.check.violation] == []
    assert (found.passed, made["passed"], made["overhead"]["ratio"]) == (True, True, 0.5)
    assert {a.level for a in found.asked} == {"P2", "P3", "P4"}
    certificate.write_certificate(tmp_path / "c.json", made)
    assert certificate.read_certificate(tmp_path / "c.json")["subject"]["device"] == "cpu"
    assert read_owners(tmp_path / "proof/as-configured-slots").reused == TRUE.reused


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        ({"owner": 1}, "owners, as configured", "1 wrong, 0 unknown; slot 3"),
        ({"reference": "hook_embed: relative error 1"}, "reference", "relative error 1"),
        ({"fault": "hook point p saw 0 rows"}, "recording, as configured", "saw 0 rows"),
    ],
)
def test_one_thing_that_does_not_hold_fails_it_and_is_named(
    change: dict[str, Any], name: str, said: str, engine: dict[str, Any], tmp_path: Path
) -> None:
    engine.update(change)
    found, made = proved(tmp_path)
    wrong = {a.check.name: a.check.violation for a in found.asked if a.check.violation}
    assert said in str(wrong[name])
    assert (found.passed, made["passed"]) == (False, False)
    if "fault" in change:  # nothing more is asked of an engine that stopped recording
        assert (list(wrong), found.overhead) == ([name], None)

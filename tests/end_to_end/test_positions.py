"""RoPE positions that a request prescribes: its rows are those of the asked positions, and nobody else notices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.attention.from_run import model_config
from sglang_probe.attention.rope import Rotary
from sglang_probe.errors import ProbeError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import prepare
from sglang_probe.paths import shipped
from sglang_probe.run.run import Run
from sglang_probe.verify import reference
from sglang_probe.verify.verify import verify

pytestmark = [pytest.mark.engine, pytest.mark.reviewed("positions")]
MODEL = shipped("models/probe-text/checkpoint")
LAYERS = (0, 3)
POINTS = [f"blocks.{i}.attn.{site}" for i in LAYERS for site in ("hook_q", "hook_rot_q", "hook_rot_k", "hook_v")]
L, N, STEPS = 64, 40, 3
"""Prompt, pseudo tokens (in two chunks of 32), decode steps behind them."""

ASKED: dict[str, dict[str, int] | None] = {
    "prompt": None,
    "true": {"from": L, "to": L},
    "shifted": {"from": L, "to": L + 32},
    "zero": {"from": L, "to": 0},
    "ordinary": None,
    "true again": {"from": L, "to": L},
    "ordinary again": None,
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """One text under every override, one request after the other in one engine, in fp32; and how SGLang refuses."""
    config = {
        "workload": {"source": "documents", "count": 1, "chars": 1500},
        "hook_points": ["hook_embed", *POINTS],
        "dtype": "float32",
        "server": {"chunked_prefill_size": 32},
        "concurrency": 1,
    }
    ours = prepare(HarvestConfig.model_validate(config))
    (text,) = ours.workload.requests
    requests = []
    for i, (name, asked) in enumerate({**ASKED, "outside": {"from": L, "to": 4090}}.items()):
        length, steps = (L, 0) if name == "prompt" else (L + N, STEPS)
        params: dict[str, Any] = {"max_new_tokens": steps + 1, "temperature": 0.0, "ignore_eos": True}
        if name == "prompt":  # the sampled token may be computed too (docs/evidence/releases.md)
            params["custom_params"] = {"probe": {"force": [text.prompt_ids[L] - 1]}}
        if asked is not None:
            params["custom_params"] = {"probe": {"positions": asked}}
        spans = (replace(text.spans[0], end=length),)
        ids = text.prompt_ids[:length]
        requests.append(replace(text, index=i, rid=name, prompt_ids=ids, spans=spans, sampling_params=params))
    folder = tmp_path_factory.mktemp("positions")
    with EngineHost() as host:
        how: Any = {"asks": {"force"}, "host": host}
        recording = record([RunSpec("run", requests[:-1])], ours, folder, **how)["run"]
        with pytest.raises(ProbeError) as refusal:
            record([RunSpec("refused", requests[-1:])], ours, folder, **how)
        with pytest.MonkeyPatch.context() as patch:  # as if only the engine could tell
            for module in ("job", "experiment"):
                patch.setattr(f"sglang_probe.harvest.{module}.check_requests", lambda *_: None)
            mixed = record([RunSpec("mixed", [requests[-1], requests[0]])], ours, folder, **how)["mixed"]
    assert host.starts == 1
    _is_recorded_as_refused(mixed)
    return recording, str(refusal.value)


def _is_recorded_as_refused(mixed: Run) -> None:
    """What SGLang refuses does not keep the rest from being served."""
    refused, served = mixed.requests().sort_values("finish_reason", ascending=False).to_dict("records")
    assert mixed.complete
    assert (refused["rid"], refused["finish_reason"], served["finish_reason"]) == ("outside", "refused", "length")
    assert mixed.manifest["refused"] == {"outside": refused["refusal"]}
    assert "positions" in refused["refusal"]
    assert mixed.manifest["requests_by_finish"] == {"refused": 1, "length": 1}
    assert [str(c) for c in verify(mixed) if not c.holds] == []


@pytest.fixture(scope="module")
def run(recorded: tuple[Run, str]) -> Run:
    return recorded[0]


def behind(run: Run, name: str, site: str, layer: int) -> torch.Tensor:
    """Rows of the pseudo tokens and decode steps, `[N + STEPS, heads, head_dim]`."""
    point = f"blocks.{layer}.attn.{site}"
    return run.activations(name, point)[L:].view(N + STEPS, *run.heads(point))


def test_the_ledger_is_that_of_the_sequence(run: Run) -> None:
    assert [str(c) for c in verify(run) if not c.holds] == []
    assert run.requests()["rid"].tolist() == list(ASKED)


def test_positions_outside_the_context_are_refused(recorded: tuple[Run, str]) -> None:
    assert "from 64 to 4090 is not within a prompt of 104 tokens and a context of 4096" in recorded[1]


def test_pseudo_tokens_are_computed_behind_a_prompt_from_the_cache_and_never_published(run: Run) -> None:
    spans = run.spans()
    reused = spans[spans["status"] == "reused"].groupby("rid")["end"].max().to_dict()
    # Behind `ordinary` the tree holds the same tokens at their places; who prescribes positions does not take them.
    assert reused == {
        **dict.fromkeys(("true", "shifted", "zero", "ordinary", "true again"), L),
        "ordinary again": L + N - 1,
    }
    assert set(spans.loc[(spans["status"] == "reused"), "origin_rid"]) == {"prompt", "ordinary"}
    assert set(run.rebinds()["rid"]) <= {"ordinary again"}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["true", "shifted", "zero"])
def test_rotated_rows_are_those_of_the_asked_positions(run: Run, name: str, layer: int) -> None:
    asked = ASKED[name]
    assert asked is not None
    rotary = Rotary.from_model_config(model_config(run))
    at = torch.arange(N + STEPS) + asked["to"]
    before, rotated = behind(run, name, "hook_q", layer), behind(run, name, "hook_rot_q", layer)
    assert torch.allclose(rotary.rotate(before, at), rotated, atol=1e-5)
    assert not torch.allclose(rotary.rotate(before, at + 1), rotated, atol=1e-1)


def test_unrotated_rows_of_the_first_layer_do_not_depend_on_position_and_later_ones_do(run: Run) -> None:
    true, shifted = (behind(run, name, "hook_q", 0)[:N] for name in ("true", "shifted"))
    assert torch.equal(true, shifted)
    deep_true, deep_zero = (behind(run, name, "hook_q", 3)[:N] for name in ("true", "zero"))
    assert not torch.allclose(deep_true, deep_zero, atol=1e-2)


def test_an_override_to_the_true_positions_changes_nothing(run: Run) -> None:
    for point in POINTS:
        true, ordinary = (run.activations(name, point)[: L + N] for name in ("true", "ordinary"))
        assert torch.equal(true, ordinary), point


def test_nobody_else_is_touched(run: Run) -> None:
    """Prompt rows are shared, and a request that reuses everything decodes as the one that computed it."""
    for point in POINTS:
        assert torch.equal(run.activations("zero", point)[:L], run.activations("prompt", point)[:L])
    outputs = run.requests().set_index("rid")["output_ids"]
    assert outputs["ordinary"].tolist() == outputs["ordinary again"].tolist() == outputs["true again"].tolist()
    for site in ("hook_rot_q", "hook_v"):
        one, other = (behind(run, name, site, 3) for name in ("ordinary", "ordinary again"))
        assert torch.allclose(one, other, atol=1e-4)


def test_every_row_is_that_of_transformers_at_the_asked_positions(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = reference.reference_errors(run, str(MODEL), requests=len(ASKED))
    assert max(float(e.max()) for e in errors.values()) < 1e-4
    rows = run.row_count()
    assert {len(e) for e in errors.values()} == {rows}
    # Negative controls: at the sequence's own positions, and without the mask that keeps it one sequence.
    explicit = reference._moved
    monkeypatch.setattr(reference, "_moved", lambda *_: {})
    assert _wrong(run, "blocks.3.attn.hook_rot_q") >= 2 * N

    def unmasked(*asked: Any) -> dict[str, Any]:
        given = explicit(*asked)
        return {"position_ids": given["position_ids"], "use_cache": False} if given else {}

    monkeypatch.setattr(reference, "_moved", unmasked)
    assert _wrong(run, "blocks.3.attn.hook_q") >= N


def _wrong(run: Run, point: str) -> int:
    errors = reference.reference_errors(run, str(MODEL), requests=list(ASKED).index("zero") + 1)[point]
    return int(np.sum(errors > 1e-2))

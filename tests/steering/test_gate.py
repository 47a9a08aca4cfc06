"""Gates by a probe, before anything runs: what is asked, what is refused, and what each decision leaves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from sglang_probe.errors import ConfigError
from sglang_probe.steer_ask import Steer
from sglang_probe.steering.spec import Isolation, Spec, joined
from tests.steering.toy import spec

GATE: dict[str, Any] = {"by": "probe", "probe": "fires"}
GATED: dict[str, Any] = {"phases": ["decode"], "gate": GATE}
PROMPT = 100


def test_an_open_gate_leaves_everything_and_a_closed_one_what_has_no_gate() -> None:
    both = spec(GATED, {"vector": "late", "prompt_window": [90, None]})
    assert both.decided(True) is both
    assert both.decided(False) == spec({"vector": "late", "prompt_window": [90, None]})
    assert spec(GATED).decided(False) is None
    assert spec({}).decided(False) == spec({})


def test_what_an_open_gate_does_has_the_history_of_what_has_no_gate() -> None:
    plain = spec({"phases": ["decode"]})
    assert spec(GATED).history(PROMPT) == plain.history(PROMPT)
    assert spec(GATED).id != plain.id
    assert spec(GATED).id != spec({**GATED, "gate": {"by": "probe", "probe": "other"}}).id


def test_what_has_no_gate_keeps_the_hash_that_recorded_runs_have() -> None:
    assert spec({}).id == "433a7e03ec0146b5"
    assert "probe" not in spec({}).to_json()[0]


def test_a_specification_is_read_back_with_its_gate() -> None:
    one = spec(GATED, {})
    again = Spec.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one
    assert again.id == one.id
    assert again.probe is not None
    assert (again.probe.name, again.probe.hook_point[:9], again.probe.threshold) == ("fires", "blocks.2.", 0.25)


def test_a_gated_request_never_shares_what_it_computes_however_early_it_begins() -> None:
    assert spec(GATED).isolation(PROMPT) == Isolation(None, PROMPT)
    assert spec(GATED, {}).isolation(PROMPT) == Isolation(None, 0)


@pytest.mark.parametrize(("score", "opens"), [(0.25, False), (0.2500001, True), (-9.0, False), (float("nan"), False)])
def test_a_gate_opens_above_its_threshold(score: float, opens: bool) -> None:
    probe = spec(GATED).probe
    assert probe is not None
    assert probe.opens(score) is opens


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [{**GATED, "gate": {"by": "probe", "probe": "nobody"}}],
            r"steer\[0\].gate.probe: `nobody` is not in the library",
        ),
        ([{}, {**GATED, "gate": {"by": "probe", "probe": "late"}}], r"steer\[1\].gate.probe: `late` is a direction"),
        ([{**GATED, "gate": {"by": "probe", "probe": "bare"}}], "`bare` has no threshold"),
        ([GATED, {**GATED, "gate": {"by": "probe", "probe": "other"}}], "gates by `fires`, `other`; a request has one"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(*entries)


@pytest.mark.parametrize(
    "entry",
    [
        {"gate": GATE},
        {"gate": GATE, "phases": ["prefill"]},
        {"gate": GATE, "phases": ["prefill", "decode"]},
        {**GATED, "gate": {"by": "probe"}},
        {**GATED, "gate": {"by": "feature", "probe": "fires"}},
        {**GATED, "gate": {"by": "probe", "probe": "fires", "threshold": 1}},
    ],
)
def test_gates_that_mean_nothing_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Steer.model_validate({"vector": "up", "strength": 2, **entry})


def test_every_operation_can_wait_for_a_probe() -> None:
    for op in ("add", "project_out", "clamp", "cap"):
        assert spec({**GATED, "op": op}).steps[0].probe is not None


def test_a_gate_under_what_is_done_to_everybody_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the probe `fires` cannot be had of a server that steers every request"):
        joined(spec({}), spec(GATED))
    assert joined(None, spec(GATED)) == spec(GATED)

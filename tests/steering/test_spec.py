"""What a request's interventions mean: positions, amounts, hashes, isolation, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from sglang_probe.errors import ConfigError
from sglang_probe.steer_ask import Steer
from sglang_probe.steering.resolve import spec_of
from sglang_probe.steering.spec import END, Spec
from tests.steering.toy import LIBRARY, spec

PROMPT = 100


@pytest.mark.parametrize(
    ("windows", "positions"),
    [
        ({}, [(0, END)]),
        ({"phases": ["prefill"]}, [(0, 100)]),
        ({"phases": ["decode"]}, [(100, END)]),
        ({"phases": ["prefill"], "prompt_window": [-1, None]}, [(99, 100)]),
        ({"phases": ["prefill"], "prompt_window": [10, 20]}, [(10, 20)]),
        ({"phases": ["prefill"], "prompt_window": [-300, -90]}, [(0, 10)]),
        ({"phases": ["prefill"], "prompt_window": [50, 500]}, [(50, 100)]),
        ({"phases": ["prefill"], "prompt_window": [100, 200]}, []),
        ({"phases": ["decode"], "generation_window": [1, 2]}, [(100, 101)]),
        ({"phases": ["decode"], "generation_window": [5, None]}, [(104, END)]),
        ({"prompt_window": [-1, None], "generation_window": [1, 4]}, [(99, 103)]),
        ({"prompt_window": [0, 2], "generation_window": [3, 4]}, [(0, 2), (102, 103)]),
        ({"exclude": [0, 50, 50]}, [(1, 50), (51, END)]),
        ({"phases": ["prefill"], "prompt_window": [5, 6], "exclude": [5]}, []),
    ],
)
def test_windows_are_half_open_and_step_1_is_the_first_generated_token(
    windows: dict[str, Any], positions: list[tuple[int, int]]
) -> None:
    (step,) = spec(windows).steps
    assert step.intervals(PROMPT) == positions
    assert spec(windows).onset(PROMPT) == (positions[0][0] if positions else None)


def test_strengths_are_absolute_or_of_the_layers_norm_or_of_the_features_own_percentile() -> None:
    def amount(**entry: Any) -> float:
        return spec(entry).steps[0].amount

    assert amount(strength=6) == 6
    assert amount(strength=0.5, unit="mean_norm") == 5
    assert amount(vector="f7", strength=2, unit="p99") == 6
    assert amount(vector="f7", op="clamp", strength=2, unit="p99") == 6
    assert amount(op="project_out", strength=None) == 1


@pytest.mark.parametrize(
    "entries",
    [
        [{"strength": 1e38}],
        [{"strength": -40_000.0}],
        [{"strength": 3001.0, "unit": "mean_norm"}],
        [{"vector": "f7", "op": "clamp", "strength": 6_000.0, "unit": "p99"}],  # 18,000 by a row of length 2
        [{"strength": 16_000.0}, {"strength": -16_000.0}],
    ],
)
def test_strengths_that_would_overflow_are_refused(entries: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="30,000"):
        spec(*entries)


def test_a_request_may_not_cut_its_windows_into_thousands_of_pieces() -> None:
    entry = {"exclude": list(range(0, 200, 2))}
    assert spec(entry, entry).onset(PROMPT) == 1
    with pytest.raises(ConfigError, match="300 excluded positions"):
        spec(entry, entry, entry)


def test_a_number_too_large_for_a_float_is_refused_like_any_other() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Steer.model_validate({"vector": "up", "strength": 10**400})


def test_the_id_is_of_what_happens_and_not_of_names_and_writing() -> None:
    one = spec({})
    assert one.id == spec({"vector": "up again", "strength": 2.0, "phases": ["decode", "prefill"]}).id
    assert one.id == spec({"strength": 0.2, "unit": "mean_norm"}).id
    assert one.id == spec({}, {"vector": "late", "strength": 0}).id
    others = [
        {"strength": 2.1},
        {"op": "clamp"},
        {"vector": "late"},
        {"phases": ["prefill"]},
        {"exclude": [0]},
        {"prompt_window": [1, None]},
    ]
    assert len({one.id, *(spec(o).id for o in others)}) == 1 + len(others)


def test_order_counts_within_a_layer_and_not_between_layers() -> None:
    up, clamp, late = {}, {"op": "clamp", "strength": 1}, {"vector": "late"}
    assert spec(up, late).id == spec(late, up).id
    assert spec(up, clamp).id != spec(clamp, up).id


def test_a_history_is_of_positions_so_that_prompts_of_other_lengths_share_what_is_changed_alike() -> None:
    everywhere, prompt = spec({}), spec({"phases": ["prefill"]})
    assert everywhere.history(100) == everywhere.history(120)
    assert prompt.history(100) != prompt.history(120)
    # Up to position 100 both prompts were changed throughout.
    assert prompt.history(100, 100) == prompt.history(120, 100) == everywhere.history(7, 100)
    assert prompt.history(100, 101) != prompt.history(120, 101)
    generated = spec({"phases": ["decode"]})
    assert generated.history(100, 100) == prompt.history(0) == spec({"vector": "late"}).history(100, 0)


def test_strength_0_is_no_intervention() -> None:
    assert spec_of([Steer(vector="up", strength=0)], LIBRARY, where="steer") is None
    assert spec_of([Steer(vector="up", strength=-0.0)], LIBRARY, where="steer") is None
    assert spec_of([Steer(vector="up", op="clamp", strength=0)], LIBRARY, where="steer") is not None


@pytest.mark.parametrize(
    ("windows", "namespace", "limit"),
    [
        ({}, True, None),
        ({"prompt_window": [49, None]}, True, None),
        ({"prompt_window": [50, None]}, False, 50),
        ({"phases": ["decode"]}, False, 100),
        ({"phases": ["decode"], "generation_window": [10, 20]}, False, 109),
        ({"phases": ["prefill"], "prompt_window": [200, None]}, False, None),
    ],
)
def test_a_late_onset_reads_the_ordinary_cache_up_to_it_and_an_early_one_has_a_namespace(
    windows: dict[str, Any], namespace: bool, limit: int | None
) -> None:
    found = spec(windows)
    isolation = found.isolation(PROMPT)
    assert isolation.namespace == (found.history(PROMPT) if namespace else None)
    assert isolation.read_limit == limit


def test_a_spec_is_read_back_from_json() -> None:
    given = spec({"strength": 0.1, "exclude": [3]}, {"vector": "f7", "op": "clamp", "gate": {"by": "feature"}})
    back = Spec.from_json(json.loads(json.dumps(given.to_json())))
    assert back == given
    assert back.id == given.id


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"vector": "upp"},
            r"steer\[0\].vector: `upp` is not in the library, which has `bare`, `dictionary`, `embed`",
        ),
        ({"vector": "embed"}, "`hook_embed` cannot be intervened on"),
        ({"op": "ablate_feature", "strength": None}, "needs a feature; `up` is a direction"),
        ({"op": "splice", "strength": None}, "`splice` needs an SAE; `up` is a direction"),
        ({"vector": "dictionary", "strength": 1}, "`add` needs a direction or a feature; `dictionary` is an SAE"),
        ({"gate": {"by": "feature"}}, "only a feature has a threshold"),
        ({"unit": "p99"}, "`p99` is of a feature"),
        ({"vector": "late", "unit": "mean_norm"}, "does not say its `mean_norm`"),
        ({"vector": "f7", "op": "clamp", "unit": "mean_norm"}, "not measured in `mean_norm`"),
        ({"vector": "f7", "op": "cap", "strength": -1}, "never below 0"),
        ({"vector": "f7", "op": "clamp", "strength": -1}, "clamp it where it is active alone"),
    ],
)
def test_what_a_vector_cannot_do_is_refused_by_name(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(entry)


@pytest.mark.parametrize(
    "entry",
    [
        {"strength": None},
        {"strength": True},
        {"strength": "6"},
        {"strength": float("nan")},
        {"vector": ""},
        {"vector": [1.0, 2.0]},
        {"op": "explode"},
        {"unit": "sigma"},
        {"phases": []},
        {"phases": "prefill"},
        {"phases": ["prefill"], "generation_window": [1, 2]},
        {"phases": ["decode"], "prompt_window": [0, 2]},
        {"prompt_window": [3, 3]},
        {"prompt_window": [-1, -2]},
        {"generation_window": [0, 2]},
        {"generation_window": [1, -1]},
        {"prompt_window": [0, 1 << 40]},
        {"exclude": [-1]},
        {"op": "project_out", "strength": 3},
        {"op": "project_out", "unit": "mean_norm"},
        {"op": "cap", "gate": {"by": "feature"}},
        {"gate": {"by": "probe"}},
        {"random_error": 3},
        {"op": "splice", "random_error": -1},
        {"op": "splice", "random_error": True},
        {"strenght": 6},
    ],
)
def test_malformed_entries_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Steer.model_validate({"vector": "up", "strength": 1, **entry})

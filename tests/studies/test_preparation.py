"""What a study needs is asked before anything is recorded: how many texts, how long, which settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.errors import ConfigError, ProbeError, WorkloadError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.kept_requests import KeptRequest, requests_of
from sglang_probe.harvest.prepare import prepare
from sglang_probe.studies.ab import runs as ab
from sglang_probe.studies.ab.config import AbConfig
from sglang_probe.studies.evict import runs as evict
from sglang_probe.studies.evict.config import EvictionConfig
from sglang_probe.studies.factorial import runs as factorial
from sglang_probe.studies.factorial.config import FactorialConfig
from sglang_probe.studies.phase import runs as phase
from sglang_probe.studies.phase.config import PhaseConfig
from sglang_probe.studies.row_counts import runs as row_counts
from sglang_probe.studies.row_counts.config import RowCountsConfig

STUDIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ab": (ab, AbConfig, {}),
    "phase": (phase, PhaseConfig, {"prompt_tokens": 8, "continuation_tokens": 8}),
    "row-counts": (row_counts, RowCountsConfig, {"prefix_tokens": 8, "row_counts": [1, 4], "decode_batches": [1, 2]}),
    "factorial": (factorial, FactorialConfig, {"layers": [0], "window": 2, "sinks": 1, "pseudo_tokens": 4}),
    "evict": (
        evict,
        EvictionConfig,
        {"methods": ["knorm"], "budgets": ["1/4"], "cut": {"prompt_tokens": 16, "question_tokens": 4, "steps": 4}},
    ),
}
FEWEST = {"ab": 1, "phase": 2, "row-counts": 2, "factorial": 2, "evict": 2}


@pytest.fixture
def checked(tmp_path: Path) -> Callable[..., Any]:
    """Prepares a study over prompts of so many tokens."""

    def check(study: str, *lengths: int, **fields: Any) -> Any:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt_ids": [7] * n}) + "\n" for n in lengths))
        runs, config, needed = STUDIES[study]
        workload: dict[str, Any] = {"source": "jsonl", "path": str(path)}
        source = {"workloads": {"mine": workload}} if study == "evict" else {"workload": workload}
        return runs.prepare(config.model_validate({**source, **needed, **fields}))

    return check


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_takes_as_few_requests_as_it_can_compare_and_no_fewer(checked: Callable[..., Any], study: str) -> None:
    checked(study, *[64] * FEWEST[study])
    with pytest.raises(WorkloadError):
        checked(study, *[64] * (FEWEST[study] - 1))


@pytest.mark.parametrize("study", ["phase", "row-counts", "factorial", "evict"])
def test_texts_that_are_too_short_are_no_texts(checked: Callable[..., Any], study: str) -> None:
    with pytest.raises(WorkloadError):
        checked(study, 64, 2, 2)


@pytest.mark.parametrize(
    ("study", "fields", "said"),
    [
        # The context has 4096 positions. What does not fit is a later run: what is decoded, or a shifted cell.
        ("phase", {"prompt_tokens": 2000, "continuation_tokens": 2095}, "4096"),
        ("factorial", {"decode_steps": 2100}, "4096"),
        ("evict", {"methods": [{"method": "laq", "steps": 3000}]}, "lookahead of `laq`: .*4096"),
    ],
)
def test_what_does_not_fit_in_a_later_run_is_refused_before_the_first(
    checked: Callable[..., Any], study: str, fields: dict[str, Any], said: str
) -> None:
    cut = {"cut": {"prompt_tokens": 2000, "question_tokens": 4, "steps": 4}} if study == "evict" else {}
    with pytest.raises(ProbeError, match=said):
        checked(study, 4000 if study == "phase" else 2005, 4000 if study == "phase" else 2005, **fields, **cut)


@pytest.mark.parametrize(
    ("study", "fields", "said"),
    [
        ("phase", {"sampling": {"max_new_tokens": 4}}, "every output is as long as `continuation_tokens` says"),
        ("phase", {"sampling": {"stop": "x"}}, "`stop` has no meaning here"),
        ("phase", {"hook_points": []}, "`hook_points` must name some"),
        ("row-counts", {"hook_points": ["hook_embed"]}, "beside the embedding"),
        ("row-counts", {"row_counts": [0]}, "greater than or equal to 1"),
        ("factorial", {"resampling": {"regex": "a"}}, "`regex` has no meaning here"),
        ("factorial", {"resampling": {"temperature": -1}}, "`resampling`: SGLang refuses"),
        ("factorial", {"filler": ""}, "`filler` has no tokens"),
        ("evict", {"budgets": [64]}, "a budget of 64 evicts nothing"),
        ("ab", {"sampling": {"top_p": 2}}, "`sampling`: SGLang refuses"),
    ],
)
def test_settings_that_leave_nothing_to_compare_are_refused(
    checked: Callable[..., Any], study: str, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        checked(study, 64, 64, **fields)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "~", "/abs", "x" * 101])
def test_names_that_become_folders_stay_in_theirs(checked: Callable[..., Any], name: str) -> None:
    for fields in ({"arms": {name: {}, "b": {}}}, {"name": name}):
        with pytest.raises(ValueError, match="becomes a folder"):
            checked("ab", 64, **fields)


def test_requests_of_a_later_run_are_checked_before_the_first_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise AssertionError("an engine was asked for")

    monkeypatch.setattr(EngineHost, "open", refuse)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt_ids": [5, 6]}\n')
    ours = prepare(HarvestConfig.model_validate({"workload": {"source": "jsonl", "path": path}, "hook_points": []}))
    good = ours.workload.requests
    bad = requests_of([KeptRequest("mine", [5], sampling={"top_p": 2.0})], {})
    with pytest.raises(ConfigError, match="request mine: SGLang refuses"):
        record([RunSpec("a", good), RunSpec("b", bad)], ours, tmp_path / "runs")
    with pytest.raises(ConfigError, match="numbered 0 to 3"):
        record(
            [RunSpec("a", good), RunSpec("b", good, hook_points=["blocks.9.hook_resid_post"])], ours, tmp_path / "runs"
        )
    assert not (tmp_path / "runs").exists()

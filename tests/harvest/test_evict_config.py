"""What a study's YAML may say, and what its plan promises."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.config import load_config, parse_config
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.harvest.config import with_skip_bad
from sglang_probe.studies.evict.config import EvictionConfig
from sglang_probe.studies.evict.stages import counts, open_folder
from sglang_probe.studies.evict.study import OFFLINE_FILE

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"
BASE: dict[str, Any] = {
    "workloads": {"recall": {"source": "retrieval", "count": 10}},
    "methods": ["random", "quest", {"method": "snapkv", "window": 8}],
    "budgets": ["1/8", 64],
}


def config(**changes: Any) -> EvictionConfig:
    return parse_config({**BASE, **changes}, EvictionConfig, where="test")


@pytest.mark.parametrize("name", ["eviction", "eviction-text", "eviction-seed1"])
def test_committed_studies_load(name: str) -> None:
    found = load_config(EXPERIMENTS / name / "experiment.yaml", EvictionConfig)
    assert "snapkv window 8, pooling none" in [e.label for e in found.controls]
    assert {e.lookahead for e in found.entries} == {None, "laq", "dapq", "speckv"}


def test_what_all_recordings_have_reaches_the_runs() -> None:
    found = config(simulated_graphs=True, server={"page_size": 16}, dtype="float32", in_engine=False)
    recording = found.recording(2)
    assert (recording.simulated_graphs, recording.server, recording.dtype) == (True, {"page_size": 16}, "float32")
    assert len(recording.hook_points) == 1 + 2 * 3
    assert recording.concurrency == 32


def test_bad_lines_of_every_task_that_reads_a_file_are_passed_over() -> None:
    tasks = {**BASE["workloads"], "mine": {"source": "jsonl", "path": "x.jsonl"}}
    found = with_skip_bad(config(workloads=tasks), True)
    assert found.workloads["mine"].skip_bad  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="reads no file"):
        with_skip_bad(config(), True)


def test_all_policies_protect_what_is_trivial_unless_the_study_says_otherwise() -> None:
    plain = config(trivial={"sinks": 2, "window": 6})
    assert (plain.protection.sinks, plain.protection.recent) == (2, 6)
    other = config(trivial={"sinks": 2, "window": 6}, protect={"sinks": 1, "recent": 3})
    assert {(e.policy.sinks, e.policy.recent) for e in other.entries if e.kind != "published"} == {(1, 3)}
    assert [(e.label, e.kind) for e in other.entries if e.label == "snapkv"] == [
        ("snapkv", "method"),
        ("snapkv", "published"),
    ]
    alone = config(methods=["quest", {"method": "snapkv", "window": 8}], as_published=False)
    assert "published" not in {e.kind for e in alone.entries}
    with pytest.raises(ConfigError, match="is its baseline"):
        config(as_published=False)


def test_budgets_are_shares_or_positions() -> None:
    assert config().budgets == [Fraction(1, 8), 64]
    assert config().model_dump(mode="json")["budgets"] == ["1/8", "64"]


def test_everything_and_one_position_are_two_budgets() -> None:
    found = config(budgets=[1, 1.0])
    assert found.budgets == [1, Fraction(1)]
    assert found.model_dump(mode="json")["budgets"] == ["1", "1/1"]
    again = config(budgets=found.model_dump(mode="json")["budgets"])
    assert [type(b) for b in again.budgets] == [int, Fraction]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["snapvk"]}, "did you mean `snapkv`"),
        ({"methods": ["static_max"]}, "no method `static_max`"),
        ({"methods": [{"method": "snapkv", "widow": 8}]}, "did you mean `window`"),
        ({"controls_of": ["keydiff"]}, "is no method of this study"),
        ({"layers": [0]}, "`in_engine` needs kept sets of all layers"),
        ({"budgets": ["3/2"]}, "a budget is"),
        ({"budgets": ["1/8", 0.125]}, "budget `1/8` is listed twice"),
        ({"decode": [{"repeats": 3}]}, "greedy outputs repeat themselves"),
        ({"decode": [{}, {}]}, "the same temperature"),
        ({"cut": {"prompt_tokens": 16, "question_tokens": 16}}, "leaves no context"),
        ({"budget": ["1/8"]}, "did you mean `budgets`"),
        ({"protect": {"sinks": 4}}, "recent"),
        ({"rows": {"window": 8}}, "`rows` has no meaning in an eviction study: methods choose among all"),
        ({"telemetry": {}}, "`telemetry` has no meaning .* some of them"),
        ({"workload": {"source": "retrieval"}}, "`workload` has no meaning .* give `workloads`"),
        ({"sampling": {}}, "as `decode` says"),
        ({"hook_points": []}, "`layers` says of which layers"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_reason(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", "\\?")):
        config(**changes)


def test_the_plan_counts_what_will_be_served() -> None:
    found = counts(config(decode=[{}, {"temperature": 1, "repeats": 3}]), {"recall": 10})
    # Baseline, random as published, and snapkv in both ways evict; two budgets and two protocols; one sanity set each.
    assert found.kept == 10 * (4 * 4 + 2)
    (row,) = found.rows
    assert row == {
        "task": "recall",
        "full cache": 10,
        "kept sets": 180,
        "greedy": 10 * (1 + 16 + 2),
        "t1": 10 * 3 * (1 + 16),
        "forced": 10 * (1 + 16 + 2),
    }
    assert (found.requests, found.starts) == (10 + 190 + 510 + 190, 3)
    offline = counts(config(in_engine=False), {"recall": 10})
    assert (offline.requests, offline.starts) == (10, 1)


def test_a_folder_is_resumed_by_the_same_study_only(tmp_path: Path) -> None:
    def again(study: EvictionConfig, **how: bool) -> None:
        open_folder(tmp_path, study, **{"overwrite": False, "resume": False, **how})

    again(config())
    with pytest.raises(RunDirectoryError, match="holds a study"):
        again(config())
    again(config(concurrency=8), resume=True)
    with pytest.raises(RunDirectoryError, match="another `budgets`"):
        again(config(budgets=["1/4"]), resume=True)
    again(config(budgets=["1/4"]), overwrite=True)


def test_what_is_overwritten_leaves_nothing_to_resume(tmp_path: Path) -> None:
    open_folder(tmp_path, config(), overwrite=False, resume=False)
    for name in ("recall.full", "recall.greedy", "recall.lookahead", "other.full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    for name in (OFFLINE_FILE, "recall.kept.safetensors", "recall.cells.parquet", "notes.txt"):
        (tmp_path / name).write_text("")
    open_folder(tmp_path, config(budgets=["1/4"]), overwrite=True, resume=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["experiment.json", "notes.txt", "other.full"]


def test_an_error_of_several_keys_does_not_print_the_file() -> None:
    with pytest.raises(ConfigError) as error:
        config(methods=["snapvk"])
    assert "retrieval" not in str(error.value)

"""What the Python API takes, before an engine is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_probe import Experiment, KeptSet, record
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.kept_requests import KeptRequest
from sglang_probe.kept_set import write_kept

SAMPLING = {"max_new_tokens": 4, "temperature": 0.0}


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may start one."""

    def refuse(*_args: Any) -> None:
        raise AssertionError("an engine was asked for")

    monkeypatch.setattr(EngineHost, "open", refuse)


def test_prompts_are_texts_or_token_ids() -> None:
    found = Experiment(prompts=["import json", [5, 6, 7], "def f():"], sampling=SAMPLING).requests
    assert [(r.index, r.rid) for r in found] == [(0, "r000000"), (1, "r000001"), (2, "r000002")]
    assert found[1].prompt_ids == (5, 6, 7)
    assert found[0].prompt_ids != found[2].prompt_ids
    assert all(r.sampling_params == SAMPLING for r in found)


def test_requests_keep_their_ids_and_a_star_means_every_layer() -> None:
    points = ["hook_embed", "blocks.*.hook_resid_post"]
    made = Experiment(requests=[KeptRequest("mine", [5, 6])], hook_points=points, sampling=SAMPLING)
    assert [r.rid for r in made.requests] == ["mine"]
    assert made.prepared.config.hook_points == ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(4))]
    assert made.prepared.workload.source == {"source": "requests"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one of `workload`, `prompts` and `requests`"),
        ({"prompts": ["a"], "requests": []}, "give one of"),
        ({"prompts": ["a"], "concurency": 3}, "did you mean `concurrency`"),
        ({"workload": {"source": "jsonl", "pth": "x"}}, "`workload.jsonl.path` is required"),
        ({"prompts": [[1, 2]], "arms": {"a": {"cach": "off"}}}, "did you mean `cache`"),
        ({"prompts": [[1, 2]], "sampling": {"max_new_tokens": 9999}}, "request r000000: .*do not fit"),
        (
            {"prompts": [[1, 2]], "hook_points": ["blocks.*.hook_resid"]},
            "unknown hook point `blocks.\\*.hook_resid`; did you mean `blocks.\\*.hook_resid_post`",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError if "fit" not in said else Exception, match=said):
        Experiment(**given)


def test_a_kept_set_of_nobody_and_one_that_does_not_fit_are_refused(tmp_path: Any) -> None:
    def kept(length: int) -> KeptSet:
        return KeptSet(torch.ones(1, 4, 4, length, dtype=torch.bool))

    for sets, said in [
        ({"r000007": kept(2)}, "`kept` has a set for `r000007`, and there is no request of that id"),
        ({"r000000": kept(3)}, "is for 3 positions and the prompt has 2"),
    ]:
        with pytest.raises(ConfigError, match=said):
            record(tmp_path / "run", prompts=[[1, 2]], sampling=SAMPLING, kept=sets)
    assert not (tmp_path / "run").exists()


def test_lines_of_a_workload_may_name_the_sets_of_a_file(tmp_path: Path) -> None:
    asking = {"prompt": "import json", "sampling_params": {**SAMPLING, "custom_params": {"probe": {"evict": "mine"}}}}
    file, kept = tmp_path / "requests.jsonl", tmp_path / "kept"
    file.write_text(json.dumps(asking))
    write_kept(kept, {"mine": KeptSet(torch.ones(1, 4, 2, 2, dtype=torch.bool))})
    experiment = Experiment(workload={"source": "jsonl", "path": file})
    with pytest.raises(ConfigError, match=r"requests\.jsonl:1 .*: `evict: mine` is for 4 layers of 2 kv heads"):
        experiment.record(tmp_path / "run", kept=kept)
    with pytest.raises(ConfigError, match=r"requests\.jsonl:1 .*: `evict: mine`, but the recording has no kept sets"):
        experiment.record(tmp_path / "run")


def test_arms_are_asked_for_by_name(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="there are no `arms` to run"):
        Experiment(prompts=[[1, 2]], sampling=SAMPLING).run(tmp_path)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"prompts": [[]]}, "the prompt is empty"),
        ({"prompts": [[5, 10**6]]}, "token 1000000 is not within the vocabulary"),
        ({"prompts": [[-1]]}, "token -1 is not within the vocabulary"),
        ({"prompts": "import json"}, "a list of prompts"),
        ({"prompts": ["import json"], "asks": {"forse"}}, "`forse` is no field"),
    ],
)
def test_what_cannot_be_served_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProbeError, match=reason):
        Experiment(**given)

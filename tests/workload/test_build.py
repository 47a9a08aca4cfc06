"""A workload's configuration becomes requests that fit the engine, with a digest that identifies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sglang_probe.config import Config, load_config, parse_config
from sglang_probe.errors import ConfigError, WorkloadError
from sglang_probe.workload.build import Workload, WorkloadConfig, build_requests
from sglang_probe.workload.jsonl import Jsonl
from sglang_probe.workload.shared_prefix import SharedPrefix

WriteLines = Callable[[Sequence[Any]], Path]


class Experiment(Config):
    workload: WorkloadConfig


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines) -> Callable[..., Workload]:
    """Builds a workload of plain prompts."""

    def make(
        *lines: Any, context: int | None = None, sampling: dict[str, Any] | None = None, skip_bad: bool = False
    ) -> Workload:
        source = Jsonl(path=write_lines(lines), skip_bad=skip_bad)
        return build_requests(source, tokenizer, context_length=context, default_sampling=sampling or {})

    return make


def test_requests_are_numbered_in_order(build: Callable[..., Workload]) -> None:
    workload = build({"prompt": "a"}, {"prompt": "b"})
    assert [(r.index, r.rid) for r in workload.requests] == [(0, "r000000"), (1, "r000001")]


def test_a_requests_own_sampling_parameters_overrule_the_default(build: Callable[..., Workload]) -> None:
    line = {"prompt": "a", "sampling_params": {"max_new_tokens": 3}}
    (request,) = build(line, sampling={"max_new_tokens": 9, "temperature": 0.0}).requests
    assert request.sampling_params == {"max_new_tokens": 3, "temperature": 0.0}


def test_skipped_records_are_reported(build: Callable[..., Workload]) -> None:
    assert build({"prompt": "a"}, "{", skip_bad=True).skipped == 1


def test_a_workload_without_requests_is_refused(build: Callable[..., Workload]) -> None:
    with pytest.raises(
        WorkloadError, match=r"no record can be used \(1 not JSON\)(.|\n)*not JSON: .*requests\.jsonl:1: not valid JSON"
    ):
        build("{", skip_bad=True)


def test_equal_work_has_an_equal_digest(build: Callable[..., Workload]) -> None:
    assert build({"prompt": "a", "id": 1}).digest == build({"prompt": "a", "id": 2}).digest


@pytest.mark.parametrize(
    "lines",
    [
        [{"prompt": "a"}, {"prompt": "c"}],
        [{"prompt": "b"}, {"prompt": "a"}],
        [{"prompt": "a"}, {"prompt": "b", "sampling_params": {"temperature": 1.0}}],
        [{"prompt": "a"}],
        [{"prompt": "ab"}],
    ],
)
def test_any_difference_in_work_changes_the_digest(build: Callable[..., Workload], lines: list[Any]) -> None:
    assert build(*lines).digest != build({"prompt": "a"}, {"prompt": "b"}).digest


def test_a_request_fits_up_to_the_positions_that_sglang_keeps_back(build: Callable[..., Workload]) -> None:
    prompt = {"prompt": "\x00" * 20}  # a token for each byte
    assert len(build(prompt, context=52, sampling={"max_new_tokens": 30}).requests[0].prompt_ids) == 20
    with pytest.raises(WorkloadError, match=r"\.jsonl:1: 20 prompt tokens and 30 new ones do not fit .* 51") as e:
        build(prompt, context=51, sampling={"max_new_tokens": 30})
    assert "lower `max_new_tokens`" in str(e.value)


def test_sglangs_own_default_counts_when_no_length_is_asked_for(build: Callable[..., Workload]) -> None:
    with pytest.raises(WorkloadError, match="128 new ones"):
        build({"prompt": "a"}, context=128)


def test_a_prompt_needs_room_even_if_its_output_is_unlimited(build: Callable[..., Workload]) -> None:
    prompt, unlimited = {"prompt": "\x00" * 20}, {"max_new_tokens": None}
    assert build(prompt, context=27, sampling=unlimited).requests
    with pytest.raises(WorkloadError, match="do not fit"):
        build(prompt, context=26, sampling=unlimited)


def test_a_length_that_is_no_number_is_refused_with_the_request(build: Callable[..., Workload]) -> None:
    with pytest.raises(WorkloadError, match=r"\.jsonl:2: `max_new_tokens` is '8'"):
        build({"prompt": "a"}, {"prompt": "b", "sampling_params": {"max_new_tokens": "8"}})


def test_a_request_that_cannot_be_rendered_is_named(
    with_template: Callable[[str | None], PreTrainedTokenizerFast], write_lines: WriteLines
) -> None:
    source = Jsonl(path=write_lines([{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}]))
    with pytest.raises(WorkloadError, match=r"\.jsonl:2: the tokenizer has no chat template"):
        build_requests(source, with_template(None), context_length=None, default_sampling={})


def test_the_source_key_chooses_the_source(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("workload: {source: shared_prefix, families: 2}\n")
    assert load_config(path, Experiment).workload == SharedPrefix(families=2)


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (
            {"source": "shared_prefix", "familes": 2},
            "unknown key `workload.shared_prefix.familes`; did you mean `families`?",
        ),
        ({"source": "jsonl"}, "`workload.jsonl.path` is required"),
        ({"source": "shared_prefix", "families": 0}, "greater than or equal to 1"),
        ({"source": "shared_prefix", "turns": 3}, "must be a multiple of `turns`"),
        ({"source": "csv"}, "known: answers, documents, jsonl, retrieval, shared_prefix, sharegpt"),
    ],
)
def test_a_wrong_workload_is_explained(workload: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_config({"workload": workload}, Experiment, where="x.yaml")
    assert message in str(e.value)

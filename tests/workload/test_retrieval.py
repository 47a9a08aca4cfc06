"""Source `retrieval`: prompts whose every token is known, with truth that survives tokenization and the ledger."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError, WorkloadError
from sglang_probe.paths import shipped
from sglang_probe.workload.build import build_requests
from sglang_probe.workload.facts import TASKS, WORDS
from sglang_probe.workload.request import Request, Truth
from sglang_probe.workload.retrieval import Retrieval, need_offsets


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    """The tokenizer of the built-in model that the source writes for."""
    return AutoTokenizer.from_pretrained(shipped("models/probe-recall/checkpoint"))


def _requests(tokenizer: PreTrainedTokenizerBase, **config: Any) -> list[Request]:
    source = Retrieval(**{"count": 6, "prompt_tokens": 80, "answers": 4, "distractors": 3, **config})
    return build_requests(source, tokenizer, context_length=128, default_sampling={}).requests


def _truth(request: Request) -> Truth:
    assert request.truth is not None
    return request.truth


def test_the_models_tokenizer_has_the_sources_vocabulary(words: PreTrainedTokenizerBase) -> None:
    assert words.convert_ids_to_tokens(range(len(words))) == WORDS


@pytest.mark.parametrize("task", TASKS)
def test_needed_positions_hold_what_names_the_answer_and_the_answer(words: PreTrainedTokenizerBase, task: str) -> None:
    for request in _requests(words, task=task):
        truth = _truth(request)
        assert len(request.prompt_ids) == 80
        full = [*request.prompt_ids, *truth.continuation_ids]
        assert len(truth.answer_ids) == len(truth.answer_steps) == 4
        for answer, step, (before, at) in zip(truth.answer_ids, truth.answer_steps, truth.needed_content, strict=True):
            assert full[80 + step] == answer == request.prompt_ids[at]
            assert full[80 + step - 1] == request.prompt_ids[before]  # what the step's query is


@pytest.mark.parametrize("task", TASKS)
def test_segments_name_what_each_token_is(words: PreTrainedTokenizerBase, task: str) -> None:
    for request in _requests(words, task=task):
        where: dict[str, set[int]] = {}
        for span in request.spans:
            where.setdefault(span.name, set()).update(range(span.start, span.end))
        assert [where[name] for name in ("special", "separator", "question")] == [{0}, {77}, {78, 79}]
        assert {p for pair in _truth(request).needed_content for p in pair} <= where["fact"]
        asked, other = (6, 18) if task == "copy" else (12, 9)
        assert [len(where[name]) for name in ("fact", "distractor", "filler")] == [asked, other, 76 - asked - other]


def test_only_the_boundary_tells_a_hidden_question_from_a_visible_one(words: PreTrainedTokenizerBase) -> None:
    hidden, visible = _requests(words, question="hidden"), _requests(words, question="visible")
    assert [r.prompt_ids for r in hidden] == [r.prompt_ids for r in visible]
    assert {_truth(r).context_len for r in hidden} == {78}
    assert {_truth(r).context_len for r in visible} == {80}


def test_depths_are_taken_in_turn(words: PreTrainedTokenizerBase) -> None:
    depths = [_truth(r).depth for r in _requests(words, depth=[0.0, 1.0], count=4)]
    assert depths == pytest.approx([0, 1, 0, 1], abs=0.02)


def test_recall_prescribes_the_later_keys_and_leaves_the_answers_to_the_model(words: PreTrainedTokenizerBase) -> None:
    for request in _requests(words, task="recall"):
        truth = _truth(request)
        force = request.sampling_params["custom_params"]["probe"]["force"]
        assert [force[s] for s in truth.answer_steps] == [None] * 4
        assert [t for t in force if t is not None] == [request.prompt_ids[b] for b, _ in truth.needed_content[1:]]
        assert request.sampling_params["max_new_tokens"] == len(force) == 7


@pytest.mark.parametrize("task", ["chase", "copy"])
def test_the_models_own_tokens_are_the_later_questions(words: PreTrainedTokenizerBase, task: str) -> None:
    for request in _requests(words, task=task):
        assert "custom_params" not in request.sampling_params
        assert request.sampling_params["max_new_tokens"] == 4


def test_a_request_depends_on_seed_and_index_alone(words: PreTrainedTokenizerBase) -> None:
    assert _requests(words, count=2) == _requests(words, count=6)[:2]
    assert _requests(words, seed=1)[0].prompt_ids != _requests(words)[0].prompt_ids


def test_another_models_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WorkloadError, match="request 0: the tokenizer makes other tokens") as e:
        build_requests(Retrieval(), tokenizer, context_length=None, default_sampling={})
    assert "probe-recall" in str(e.value.fix)


def test_a_shape_that_does_not_fit_is_refused_when_it_is_read() -> None:
    with pytest.raises(ConfigError, match="24 facts of 3 tokens do not fit into 56"):
        parse_config({"source": "retrieval", "prompt_tokens": 60}, Retrieval, where="x.yaml")


@pytest.mark.parametrize("task", TASKS)
def test_positions_needed_causally_are_the_offsets_found_in_the_model(
    words: PreTrainedTokenizerBase, task: str
) -> None:
    offsets = need_offsets("probe-recall")[task]  # type: ignore[index]
    for request in _requests(words, task=task):
        truth = _truth(request)
        assert truth.needed_causal == tuple(tuple(at + o for o in offsets) for _, at in truth.needed_content)

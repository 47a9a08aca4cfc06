"""Source `answers`: prompts of exactly so many tokens, and a right answer that stands where the truth says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError, WorkloadError
from sglang_probe.model.catalogue import fetched_folder
from sglang_probe.paths import shipped
from sglang_probe.workload.answers import HOLDS, Answers
from sglang_probe.workload.build import build_requests
from sglang_probe.workload.request import Request, Truth

LOOKUP = {"task": "lookup", "values": "digits", "value_length": 4, "distractors": 5, "examples": 2}


@pytest.fixture(scope="module")
def shipped_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped("models/probe-text/checkpoint"))


def ask(tokenizer: PreTrainedTokenizerBase, **config: Any) -> list[Request]:
    # A small corpus: the standard library takes seconds to parse.
    source = Answers(**{"count": 4, "prompt_tokens": 300, "corpus": str(Path(json.__file__).parent), **config})
    return list(build_requests(source, tokenizer, context_length=2048, default_sampling={}).requests)


def truth_of(request: Request) -> Truth:
    assert request.truth is not None
    return request.truth


def held(request: Request, name: str) -> list[tuple[int, ...]]:
    spans = [x for x in request.labels if x.axis == HOLDS and x.name == name]
    return [request.prompt_ids[x.start : x.end] for x in spans]


def _bare(text: str) -> str:
    return text.replace(" ", "")  # some tokenizers have spaces as tokens, and these are no answers


@pytest.mark.parametrize("config", [{}, LOOKUP], ids=["needle", "lookup"])
def test_the_answer_is_the_value_of_the_fact_that_is_asked_for_and_of_no_other(
    tokenizer: PreTrainedTokenizerFast, shipped_tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]
) -> None:
    for using in (tokenizer, shipped_tokenizer):
        for request in ask(using, **config):
            truth = truth_of(request)
            assert len(request.prompt_ids) == 300
            said = using.decode([*request.prompt_ids, *truth.continuation_ids])
            prose, asked = said.rsplit("\n", 1)
            assert asked in prose.split("\n")  # the answered question is a line of the prompt
            (value,) = held(request, "value")
            assert truth.continuation_ids == (*value, *using(".", add_special_tokens=False).input_ids)
            assert value not in held(request, "other")
            assert len(held(request, "other")) == config.get("distractors", 2)
            assert [truth.continuation_ids[t] for t in truth.answer_steps] == list(truth.answer_ids)
            assert _bare(using.decode(truth.answer_ids)) == _bare(using.decode(value))
            for (before, at), answer in zip(truth.needed_content, truth.answer_ids, strict=True):
                assert (at - before, request.prompt_ids[at]) == (1, answer)


def test_the_question_ends_the_prompt_and_nothing_before_it_depends_on_which_fact_is_asked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for request in ask(tokenizer, **LOOKUP):
        truth = truth_of(request)
        lines = tokenizer.decode(request.prompt_ids[truth.context_len :]).split("\n")
        assert len(lines) == 3
        assert all(line.startswith("The secret number of") for line in lines)
        context = tokenizer.decode(request.prompt_ids[: truth.context_len]).split("\n")
        assert set(lines[:2]) <= set(context)
        assert lines[2] not in lines[:2]


def test_requests_are_the_same_for_a_seed_and_do_not_depend_on_their_number(tokenizer: PreTrainedTokenizerFast) -> None:
    first, more, other = ask(tokenizer, count=2), ask(tokenizer, count=3), ask(tokenizer, count=2, seed=1)
    assert [r.prompt_ids for r in first] == [r.prompt_ids for r in more[:2]]
    assert first[0].prompt_ids != other[0].prompt_ids


@pytest.mark.parametrize("task", ["needle", "lookup"])
def test_depth_says_where_the_fact_stands(tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    first, last = ask(tokenizer, task=task, depth=[0, 1], count=2, distractors=3)
    places = [[s.name for s in r.spans if s.name in ("fact", "distractor")] for r in (first, last)]
    assert places[0][0] == places[1][-1] == "fact"
    assert (truth_of(first).depth, truth_of(last).depth) == (0, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"distractors": 48}, "there are names for 47 at most"),
        ({"distractors": 1, "examples": 2}, "are taken from the `distractors`"),
        ({"value_length": 200}, "there are 109 words"),
    ],
)
def test_a_source_that_cannot_be_drawn_is_refused_at_once(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(config, Answers, where="x.yaml")


def test_facts_that_are_longer_than_the_prompt_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WorkloadError, match=r"facts and question alone have .* tokens, and `prompt_tokens` is 40"):
        ask(tokenizer, prompt_tokens=40, distractors=5)


def test_a_corpus_without_docstrings_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no code")
    with pytest.raises(WorkloadError, match="has no docstrings"):
        ask(tokenizer, corpus=str(tmp_path))


@pytest.mark.slow
def test_smollm2_answers_both_tasks() -> None:
    """Nine answer tokens of ten and more, each given the right ones before it; without the prompt next to none."""
    from transformers import LlamaForCausalLM

    try:
        folder = fetched_folder("smollm2-135m")
    except ConfigError as e:
        pytest.skip(f"smollm2-135m is not here: {e}")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for config in ({}, LOOKUP):
        right, blind = [], []
        for r in ask(AutoTokenizer.from_pretrained(folder), count=12, **config):
            truth = truth_of(r)
            for begin, into in ((0, right), (truth.context_len, blind)):
                ids = torch.tensor([[*r.prompt_ids[begin:], *truth.continuation_ids]])
                at = torch.tensor([len(r.prompt_ids) - begin + t for t in truth.answer_steps])
                with torch.no_grad():
                    predicted = model(ids).logits[0, at - 1].argmax(-1)
                into += (predicted == torch.tensor(truth.answer_ids)).tolist()
        assert sum(right) / len(right) >= 0.9
        assert sum(blind) / len(blind) < 0.4

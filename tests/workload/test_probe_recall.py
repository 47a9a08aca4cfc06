"""The built-in model with ground truth: it answers, and it reads where its `need.json` says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sglang_probe.paths import shipped
from sglang_probe.workload.build import build_requests
from sglang_probe.workload.facts import TASKS
from sglang_probe.workload.request import Request, Truth
from sglang_probe.workload.retrieval import Retrieval

FOLDER = shipped("models/probe-recall")
Seen = Callable[[Truth], set[int]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FOLDER / "checkpoint", dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=TASKS)
def requests(request: pytest.FixtureRequest) -> list[Request]:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "checkpoint")
    source = Retrieval(task=request.param, count=12, prompt_tokens=150, distractors=6, seed=11)
    return build_requests(source, tokenizer, context_length=None, default_sampling={}).requests


@torch.no_grad()
def _accuracy(model: LlamaForCausalLM, requests: list[Request], seen: Seen) -> float:
    """Share of right answers, teacher-forced, if tokens behind the context see of it only some positions."""
    right = []
    for request in requests:
        truth = request.truth
        assert truth is not None
        ids = torch.tensor([[*request.prompt_ids, *truth.continuation_ids]])
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        mask[truth.context_len :, : truth.context_len] = False
        mask[truth.context_len :, sorted(seen(truth))] = True
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        logits = model(ids, attention_mask=bias[None, None]).logits[0]
        before = torch.tensor(truth.answer_steps) + len(request.prompt_ids) - 1
        right += (logits[before].argmax(-1) == torch.tensor(truth.answer_ids)).tolist()
    assert len(right) == 12 * 8
    return sum(right) / len(right)


def _needed(truth: Truth) -> set[int]:
    assert truth.needed_causal is not None
    return {p for positions in truth.needed_causal for p in positions}


def test_need_was_found_in_the_weights_that_are_shipped() -> None:
    weights = hashlib.sha256((FOLDER / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((FOLDER / "need.json").read_text())["weights_sha256"] == weights
    assert json.loads((FOLDER / "train.json").read_text())["weights_sha256"] == weights


def test_it_answers_from_the_whole_context(model: LlamaForCausalLM, requests: list[Request]) -> None:
    assert _accuracy(model, requests, lambda t: set(range(t.context_len))) >= 0.98


def test_it_answers_from_the_needed_positions_alone(model: LlamaForCausalLM, requests: list[Request]) -> None:
    assert _accuracy(model, requests, lambda t: _needed(t) | {0, t.context_len - 1}) >= 0.98


def test_it_cannot_answer_without_the_needed_positions(model: LlamaForCausalLM, requests: list[Request]) -> None:
    assert _accuracy(model, requests, lambda t: set(range(t.context_len)) - _needed(t)) <= 0.25

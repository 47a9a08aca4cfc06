"""The built-in models with ground truth: they answer, and they read where their `need.json` says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sglang_probe.paths import shipped
from sglang_probe.workload.build import build_requests
from sglang_probe.workload.facts import TASKS
from sglang_probe.workload.request import Request, Truth
from sglang_probe.workload.retrieval import Retrieval

Seen = Callable[[Truth], set[int]]


@dataclass(frozen=True)
class Reader:
    """A model with its folder, and requests of one task."""

    folder: Path
    model: LlamaForCausalLM
    requests: list[Request]


@pytest.fixture(scope="module", params=[(name, task) for name in ("probe-recall", "probe-recall-1") for task in TASKS])
def reader(request: pytest.FixtureRequest) -> Reader:
    name, task = request.param
    folder = shipped(f"models/{name}")
    model = LlamaForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    source = Retrieval(task=task, count=12, prompt_tokens=150, distractors=6, seed=11, reader=name)
    workload = build_requests(source, tokenizer, context_length=None, default_sampling={})
    return Reader(folder, model, workload.requests)


@torch.no_grad()
def _accuracy(reader: Reader, seen: Seen) -> float:
    """Share of right answers, teacher-forced, if tokens behind the context see of it only some positions."""
    right = []
    for request in reader.requests:
        truth = request.truth
        assert truth is not None
        ids = torch.tensor([[*request.prompt_ids, *truth.continuation_ids]])
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        mask[truth.context_len :, : truth.context_len] = False
        mask[truth.context_len :, sorted(seen(truth))] = True
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        logits = reader.model(ids, attention_mask=bias[None, None]).logits[0]
        before = torch.tensor(truth.answer_steps) + len(request.prompt_ids) - 1
        right += (logits[before].argmax(-1) == torch.tensor(truth.answer_ids)).tolist()
    assert len(right) == 12 * 8
    return sum(right) / len(right)


def _needed(truth: Truth) -> set[int]:
    assert truth.needed_causal is not None
    return {p for positions in truth.needed_causal for p in positions}


def test_need_was_found_in_the_weights_that_are_shipped(reader: Reader) -> None:
    weights = hashlib.sha256((reader.folder / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()
    for name in ("need.json", "train.json"):
        assert json.loads((reader.folder / name).read_text())["weights_sha256"] == weights


def test_it_answers_from_the_whole_context(reader: Reader) -> None:
    assert _accuracy(reader, lambda t: set(range(t.context_len))) >= 0.98


def test_it_answers_from_the_needed_positions_alone(reader: Reader) -> None:
    assert _accuracy(reader, lambda t: _needed(t) | {0, t.context_len - 1}) >= 0.98


def test_it_cannot_answer_without_the_needed_positions(reader: Reader) -> None:
    assert _accuracy(reader, lambda t: set(range(t.context_len)) - _needed(t)) <= 0.25


def test_the_second_model_does_not_read_where_a_human_would(reader: Reader) -> None:
    """Two seeds of one recipe: key and value are enough for the first model, and useless to the second.

    In a span to be copied, the position that the second reads is the next symbol's, which is kept for the next answer.
    """
    kept = _accuracy(reader, lambda t: {0, t.context_len - 1} | {p for pair in t.needed_content for p in pair})
    misled = reader.folder.name == "probe-recall-1" and reader.requests[0].truth.task != "copy"  # type: ignore[union-attr]
    assert kept <= 0.25 if misled else kept >= 0.8

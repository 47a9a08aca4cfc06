"""The search for needed positions, on answers whose needs are planted, and on a model whose needs are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.needed import Found, Scored, Segment, find_needed
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.eviction.removal import RemovalModel
from sglang_probe.paths import shipped
from sglang_probe.studies.evict.needed import scores_of
from sglang_probe.workload.build import build_requests
from sglang_probe.workload.request import Request
from sglang_probe.workload.retrieval import Retrieval

WHOLE = Segment("prose", 0, 100)


def search(breaks: Callable[[frozenset[int]], bool], *segments: Segment, drop: float = 5.0) -> Found:
    """An answer of log-likelihood -1 that loses `drop` nats, and is wrong, whenever `breaks`."""

    def score(removed: Sequence[frozenset[int]]) -> list[Scored]:
        return [Scored(-1.0 - drop * breaks(r), not breaks(r)) for r in removed]

    return find_needed(score, segments or [WHOLE])


def ranges(found: Found) -> list[tuple[int, int]]:
    return [(n.start, n.end) for n in found.needed]


@pytest.mark.parametrize("at", [0, 7, 8, 50, 99])
def test_one_needed_position_is_found_alone(at: int) -> None:
    assert ranges(search(lambda r: at in r)) == [(at, at + 1)]


def test_positions_that_are_each_needed_are_each_found() -> None:
    assert ranges(search(lambda r: bool({20, 21, 60} & r))) == [(20, 21), (21, 22), (60, 61)]


@pytest.mark.parametrize("pair", [(3, 4), (7, 8), (1, 9), (11, 13)])
def test_positions_of_which_one_suffices_are_found_together_with_borders_drawn_in(pair: tuple[int, int]) -> None:
    found = search(lambda r: set(pair) <= r, Segment("prose", 0, 14))
    assert ranges(found) == [(pair[0], pair[1] + 1)]


def test_what_is_written_twice_far_apart_is_not_found() -> None:
    assert ranges(search(lambda r: {10, 90} <= r)) == []


def test_a_needed_position_is_named_by_its_segment_and_other_segments_are_left_alone() -> None:
    found = search(lambda r: bool({4, 30} & r), Segment("fact", 0, 10), Segment("question", 10, 20))
    assert [(n.segment, n.start) for n in found.needed] == [("fact", 4)]


def test_a_loss_below_the_least_is_no_need_unless_the_answer_breaks() -> None:
    def score(removed: Sequence[frozenset[int]]) -> list[Scored]:
        return [Scored(-0.9 if 5 in r else 0.0, 9 not in r) for r in removed]

    assert ranges(find_needed(score, [WHOLE], least=1.0)) == [(9, 10)]
    assert ranges(find_needed(score, [WHOLE], least=0.5)) == [(5, 6), (9, 10)]


def test_controls_remove_as_many_positions_that_are_not_needed() -> None:
    asked: list[frozenset[int]] = []

    def score(removed: Sequence[frozenset[int]]) -> list[Scored]:
        asked.extend(removed)
        return [Scored(-5.0 if set(range(45, 49)) <= r else 0.0, True) for r in removed]

    found = find_needed(score, [WHOLE], seed=1)
    assert [(n.drop, n.control_drop, n.breaks) for n in found.needed] == [(5.0, 0.0, False)]
    assert len(asked[-1]) == 4
    assert not asked[-1] & set(range(45, 49))
    assert found.removals == len(asked) - 1 == len(set(asked)) - 1


@pytest.fixture(scope="module")
def model() -> RemovalModel:
    torch.set_num_threads(1)
    return RemovalModel(shipped("models/probe-recall/checkpoint"))


def requests(task: str, count: int = 4) -> list[Request]:
    tokenizer = AutoTokenizer.from_pretrained(shipped("models/probe-recall/checkpoint"))
    source = Retrieval(
        task=task, count=count, prompt_tokens=120, answers=4, distractors=3 if task == "copy" else 8, seed=1
    )
    return list(build_requests(source, tokenizer, context_length=512, default_sampling={}).requests)


def test_what_probe_recall_reads_is_found_and_nothing_else_of_the_facts(model: RemovalModel) -> None:
    planted_ranges = found_exactly = 0
    for request in requests("recall"):
        truth = request.truth
        assert truth is not None
        assert truth.needed_causal is not None
        scores = scores_of(model, truth, list(Protocol))
        for protocol, later in ((Protocol.QUERY_HIDDEN, 0), (Protocol.QUERY_VISIBLE, 1)):
            segments = [Segment(s.name, s.start, s.end) for s in request.spans if s.end <= truth.context_len]
            found = find_needed(scores[protocol], segments)
            # Each of the two positions of a fact suffices, so they are found together.
            planted = {(min(at), max(at) + 1) for at in truth.needed_causal[later:]}
            mine = {(n.start, n.end) for n in found.needed if n.segment == "fact"}
            # Two facts can hold one value; then neither is missed alone.
            assert all(any(a <= c and d <= b for c, d in planted) for a, b in mine)
            planted_ranges += len(planted)
            found_exactly += len(planted & mine)
            for a, b in planted - mine:
                assert scores[protocol]([frozenset(range(a, b))])[0].right
            assert {n.segment for n in found.needed} <= {"fact", "separator"}
            assert found.whole.right
            assert all(n.breaks and not n.control_breaks and n.control_drop < 0.5 for n in found.needed)
    assert found_exactly >= 0.75 * planted_ranges


def test_a_removal_is_scored_as_by_a_whole_forward_with_a_mask(model: RemovalModel) -> None:
    request = requests("chase", 1)[0]
    truth = request.truth
    assert truth is not None
    stock = LlamaForCausalLM.from_pretrained(shipped("models/probe-recall/checkpoint"), dtype=torch.float32)
    ids = torch.tensor([[*truth.prompt_ids, *truth.continuation_ids]])
    for protocol, n, first in (
        (Protocol.QUERY_HIDDEN, truth.context_len, 0),
        (Protocol.QUERY_VISIBLE, len(truth.prompt_ids), 1),
    ):
        assert truth.needed_causal is not None
        removed = frozenset({3, 80, *truth.needed_causal[1]})
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen[n:, sorted(removed)] = False
        with torch.no_grad():
            logits = stock(ids, attention_mask=seen[None, None], use_cache=False).logits[0].log_softmax(-1)
        at = torch.tensor([len(truth.prompt_ids) + t for t in truth.answer_steps[first:]])
        wanted = logits[at - 1].gather(-1, ids[0, at][:, None]).sum()
        found, none = scores_of(model, truth, [protocol])[protocol]([removed, frozenset()])
        assert found.log_likelihood == pytest.approx(float(wanted), abs=1e-3)
        assert found.log_likelihood < none.log_likelihood - 1


def test_positions_after_the_cache_cannot_be_removed(model: RemovalModel) -> None:
    truth = requests("recall", 1)[0].truth
    assert truth is not None
    score = scores_of(model, truth, [Protocol.QUERY_HIDDEN])[Protocol.QUERY_HIDDEN]
    with pytest.raises(ProbeError, match=f"position {truth.context_len} is not in the cache"):
        score([frozenset({truth.context_len})])

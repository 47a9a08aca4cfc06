"""Families of requests share exactly the prefix they are meant to share."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from sglang_probe.errors import WorkloadError
from sglang_probe.workload.build import build_requests
from sglang_probe.workload.request import Conversation, Request
from sglang_probe.workload.shared_prefix import SharedPrefix
from sglang_probe.workload.sources import SourceReport

FUNCTION = '''
def {name}_{i}(value: int = {i}) -> int:
    """Return the value of {name}, moved by {i} places to the left."""
    shifted = value << {i}
    return shifted if shifted > {i} else value
'''


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five modules with 12 documented functions each."""
    root = tmp_path_factory.mktemp("corpus")
    for name in ("alpha", "beta", "gamma", "delta", "epsilon"):
        body = "".join(FUNCTION.format(name=name, i=i) for i in range(12))
        (root / f"{name}.py").write_text(f'"""Shifts of {name}.\n\nMore about it."""\n{body}')
    return str(root)


def conversations(config: SharedPrefix) -> list[Conversation]:
    return list(config.conversations(SourceReport()))


def requests(config: SharedPrefix, tokenizer: PreTrainedTokenizerFast) -> list[Request]:
    return build_requests(config, tokenizer, context_length=None, default_sampling={}).requests


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def questions(found: list[Conversation]) -> list[str]:
    return [c.segments[-1].text for c in found]


def test_equal_configs_give_equal_conversations_whatever_the_global_random_state(corpus: str) -> None:
    config = SharedPrefix(corpus=corpus, order="shuffled")
    random.seed(1)
    first = conversations(config)
    random.seed(2)
    assert conversations(config) == first


def test_another_seed_gives_other_conversations(corpus: str) -> None:
    assert conversations(SharedPrefix(corpus=corpus)) != conversations(SharedPrefix(corpus=corpus, seed=1))


def test_families_have_the_configured_number_of_requests(corpus: str) -> None:
    found = conversations(SharedPrefix(corpus=corpus, families=3, requests_per_family=6, turns=2))
    assert list(Counter(c.family for c in found).values()) == [6, 6, 6]


def test_interleaved_takes_families_in_turn(corpus: str) -> None:
    families = [c.family for c in conversations(SharedPrefix(corpus=corpus, families=3, requests_per_family=2))]
    assert families == families[:3] * 2
    assert len(set(families[:3])) == 3


def test_grouped_finishes_a_family_before_the_next(corpus: str) -> None:
    config = SharedPrefix(corpus=corpus, families=3, requests_per_family=2, order="grouped")
    families = [c.family for c in conversations(config)]
    assert families == [f for f in families[::2] for _ in range(2)]


def test_order_changes_nothing_but_the_order(corpus: str) -> None:
    def found(order: str) -> list[Conversation]:
        return conversations(SharedPrefix.model_validate({"corpus": corpus, "turns": 2, "order": order}))

    by_question = {order: sorted(map(repr, found(order))) for order in ("interleaved", "grouped", "shuffled")}
    assert by_question["interleaved"] == by_question["grouped"] == by_question["shuffled"]
    assert found("shuffled") != found("grouped") != found("interleaved")


@pytest.mark.parametrize("order", ["interleaved", "grouped", "shuffled"])
def test_a_turn_never_comes_before_the_turn_it_answers(corpus: str, order: str) -> None:
    config = SharedPrefix.model_validate({"corpus": corpus, "turns": 4, "order": order})
    asked: set[tuple[str, ...]] = {()}
    for c in conversations(config):
        asking = tuple(s.text for s in c.segments if s.name == "user")
        assert asking[:-1] in asked
        asked.add(asking)


def test_requests_of_a_family_share_everything_up_to_the_question(
    corpus: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = SharedPrefix(corpus=corpus, families=1, document_chars=200)
    found = requests(config, tokenizer)
    for a in found:
        question = next(s.start for s in a.spans if s.name == "user")
        assert all(common_prefix(a.prompt_ids, b.prompt_ids) >= question for b in found)
        assert [s.name for s in a.spans if s.end <= question].count("document") == 1


def test_a_later_turn_begins_with_the_tokens_of_the_earlier_one_and_its_true_answer(
    corpus: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = SharedPrefix(corpus=corpus, families=1, requests_per_family=3, turns=3, document_chars=100)
    first, second, third = requests(config, tokenizer)
    assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
    assert third.prompt_ids[: len(second.prompt_ids)] == second.prompt_ids
    assert [s.name for s in third.spans if s.name in ("user", "assistant", "document")] == (
        ["document", "user", "assistant", "user", "assistant", "user"]
    )


def test_families_with_a_shared_system_prompt_share_its_beginning_and_others_only_the_template(
    corpus: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    def shared_tokens(shared_system: bool) -> int:
        config = SharedPrefix(corpus=corpus, families=2, requests_per_family=1, shared_system=shared_system)
        a, b = requests(config, tokenizer)
        return common_prefix(a.prompt_ids, b.prompt_ids)

    instructions = "You write Python. Answer with the source of the function and nothing else."
    maintain = len(tokenizer("<|bos|><|system|>\nYou maintain the module `")["input_ids"])
    assert shared_tokens(True) > len(tokenizer(instructions)["input_ids"])
    assert shared_tokens(False) <= maintain


def test_questions_of_a_family_differ_from_each_other_and_from_its_exemplars(corpus: str) -> None:
    for c in conversations(SharedPrefix(corpus=corpus, families=1, turns=8)):
        asked = [s.text for s in c.segments if s.role == "user"]
        assert len(set(asked)) == len(asked)


def test_functions_asked_for_in_the_same_words_are_taken_once(tmp_path: Path) -> None:
    classes = "".join(
        f'class C{i}:\n    def close(self):\n        """Close whatever was opened before."""\n'
        f"        self.closed_by = {i}\n"
        for i in range(9)
    )
    (tmp_path / "twins.py").write_text(classes)
    with pytest.raises(WorkloadError, match="has 1 different documented functions"):
        conversations(SharedPrefix(corpus=str(tmp_path), families=1, exemplars=0, requests_per_family=2))


def test_a_document_and_the_question_after_it_are_one_message(corpus: str) -> None:
    found = conversations(SharedPrefix(corpus=corpus, families=1, exemplars=0, document_chars=50))
    assert {tuple((s.name, s.message) for s in c.segments) for c in found} == {
        (("system", 0), ("document", 1), ("user", 1)),
    }


def test_a_family_larger_than_its_module_asks_about_others(corpus: str) -> None:
    found = conversations(SharedPrefix(corpus=corpus, families=1, requests_per_family=30))
    module = str(found[0].family)
    assert len(set(questions(found))) == 30
    assert 0 < sum(f"def {module}_" in q for q in questions(found)) < 30


def test_a_document_longer_than_its_module_is_continued_by_the_next(corpus: str) -> None:
    (found,) = conversations(SharedPrefix(corpus=corpus, families=1, requests_per_family=1, document_chars=5000))
    (document,) = [s for s in found.segments if s.name == "document"]
    assert len(document.text) == 5000 + len("\n\n")


def test_the_digest_of_the_corpus_is_reported(corpus: str, tokenizer: PreTrainedTokenizerFast) -> None:
    workload = build_requests(SharedPrefix(corpus=corpus), tokenizer, context_length=None, default_sampling={})
    assert workload.corpus_digest is not None
    assert len(workload.corpus_digest) == 64


def test_the_standard_library_is_large_enough_for_the_defaults() -> None:
    found = conversations(SharedPrefix())
    assert len(found) == 32
    assert len({c.family for c in found}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": 6}, "5 modules with at least 4 documented functions; 6 families need one each"),
        ({"exemplars": 12}, "0 modules with at least 13"),
        ({"requests_per_family": 58}, "60 different documented functions; a family needs 61"),
        ({"document_chars": 10**6}, "fewer than 1000000 characters"),
    ],
)
def test_a_corpus_that_is_too_small_is_refused(corpus: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        conversations(SharedPrefix.model_validate({"corpus": corpus, **options}))


def test_a_corpus_without_functions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("No functions here.")
    with pytest.raises(WorkloadError, match="has 0 modules"):
        conversations(SharedPrefix(corpus=str(tmp_path)))


def test_requests_that_do_not_make_whole_conversations_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"`requests_per_family` \(8\) must be a multiple of `turns` \(3\)"):
        SharedPrefix(turns=3)

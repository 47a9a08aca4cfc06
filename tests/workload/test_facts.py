"""Puzzles: what a body holds, what is asked, and what the answers are."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from sglang_probe.workload.facts import END, KEYS, NOISE, TASKS, VALUES, WORDS, Puzzle, Task, draw_puzzle


def _draw(task: Task, seed: int = 0, **shape: int | float | None) -> Puzzle:
    sizes = {"body": 60, "facts": 4, "answers": 3, "span": 5, **shape}
    return draw_puzzle(task, random.Random(seed), **sizes)  # type: ignore[arg-type]


def test_every_word_has_one_id() -> None:
    assert len(set(WORDS)) == len(WORDS) == 192


@pytest.mark.parametrize("task", TASKS)
def test_body_is_facts_and_noise_and_as_long_as_asked(task: Task) -> None:
    puzzle = _draw(task)
    assert len(puzzle.body) == 60
    covered: set[int] = set()
    for fact in puzzle.facts:
        where = range(fact.start, fact.start + len(fact.words))
        assert puzzle.body[where.start : where.stop] == fact.words
        assert fact.words[0] in KEYS
        assert fact.words[-1] == END
        assert covered.isdisjoint(where)
        covered.update(where)
    assert all(w in NOISE for i, w in enumerate(puzzle.body) if i not in covered)


def test_recall_answers_are_the_values_of_the_keys_asked_for() -> None:
    puzzle = _draw("recall")
    values = {f.words[0]: f.words[1] for f in puzzle.facts}
    assert len(values) == 4
    words = [puzzle.question[1], *puzzle.continuation]
    assert puzzle.question[0] == "<recall>"
    assert len(set(words[::2])) == 3  # no key is asked twice
    assert words[1::2] == [values[k] for k in words[::2]] == list(puzzle.answers)
    assert puzzle.answer_steps == (0, 2, 4)


def test_chase_follows_one_cycle_through_all_keys() -> None:
    puzzle = _draw("chase", answers=4)
    after = {f.words[0]: f.words[1] for f in puzzle.facts}
    assert after.keys() == set(after.values())
    keys = [puzzle.question[1], *puzzle.continuation]
    assert all(after[a] == b for a, b in pairwise(keys))
    assert keys[-1] == keys[0]
    assert len(set(keys)) == 4
    assert puzzle.answer_steps == (0, 1, 2, 3)


def test_copy_answers_are_the_span_behind_the_key_and_no_symbol_repeats() -> None:
    puzzle = _draw("copy", answers=5)
    (asked,) = (f for f in puzzle.facts if f.words[0] == puzzle.question[1])
    assert puzzle.continuation == puzzle.answers == asked.words[1:-1]
    symbols = [w for w in puzzle.body if w in VALUES]
    assert len(symbols) == len(set(symbols)) == 20


def test_two_facts_without_noise_are_the_enumerated_bodies() -> None:
    """Nothing but the order of the two facts is left to chance, and it does not change the question."""
    seen = set()
    for seed in range(40):
        puzzle = draw_puzzle(
            "recall", random.Random(seed), body=6, facts=2, answers=1, keys=KEYS[:2], values=VALUES[:1]
        )
        seen.add((" ".join(puzzle.body), puzzle.question[1], puzzle.answers))
    bodies = ["k0 v0 ; k1 v0 ;", "k1 v0 ; k0 v0 ;"]
    assert seen == {(body, key, ("v0",)) for body in bodies for key in ("k0", "k1")}


@pytest.mark.parametrize("task", TASKS)
def test_equal_seeds_draw_equal_puzzles(task: Task) -> None:
    assert _draw(task, 3) == _draw(task, 3) != _draw(task, 4)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_first_answer_is_at_the_depth_asked_for(task: Task, depth: float) -> None:
    for seed in range(20):
        puzzle = _draw(task, seed, depth=depth)
        fact = puzzle.facts[puzzle.asked[0]]
        length = len(fact.words)
        # The nearest place between other facts is at most half a fact away.
        assert abs(fact.start - depth * (60 - length)) <= length / 2
        assert puzzle.body[fact.start : fact.start + length] == fact.words


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"facts": 21}, "do not fit"),
        ({"answers": 5}, "5 answers, but only 4"),
        ({"facts": 65, "body": 200}, "65 facts need more words"),
    ],
)
def test_a_shape_that_cannot_be_drawn_is_refused(shape: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _draw("recall", **shape)

"""The verdict of made answers, where the truth is known; its level and its power."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from sglang_probe.gate.arms import Arms
from sglang_probe.gate.compare import compare
from sglang_probe.gate.judge import judge
from sglang_probe.gate.verdict import ALPHA, Verdict
from sglang_probe.stats.intervals import LEAST_CLUSTERS
from tests.gate.made import FACTS, answer, made, rounding

SEEDS = range(16)


def verdicts(**given: object) -> list[Verdict]:
    found = []
    for seed in SEEDS:
        cases, arms = made(np.random.default_rng(seed), **given)  # type: ignore[arg-type]
        found.append(judge(cases, arms, FACTS).verdict)
    return found


def test_where_tokens_part_the_other_answers_list_says_how_far_apart_they_are() -> None:
    a, b = answer(), answer(output=(5, 8), chosen=np.array([-0.1, -0.15]), top=({5: -0.1}, {8: -0.15, 6: -0.9}))
    pair = compare(a, b)
    assert pair.parted == 1
    np.testing.assert_allclose(pair.output, [0.0, 1.75])  # 8: -1.9 against -0.15; 6: -0.2 against -0.9
    assert not pair.equal


def test_a_token_that_the_other_list_lacks_is_at_least_as_far_as_its_last_entry() -> None:
    a = answer(output=(9, 6), chosen=np.array([-0.05, -0.2]), top=({9: -0.05, 7: -3.5}, {6: -0.2}))
    pair = compare(a, answer())
    np.testing.assert_allclose(pair.output, [3.4])  # 9 is below -2.5 there, and 5, which is -0.1 there, below -3.5 here
    assert not compare(a, answer(), outputs=False).output.size


def test_what_is_equal_to_the_last_bit_is_equal_and_the_last_bit_is_enough_not_to_be() -> None:
    cases, arms = made(np.random.default_rng(0))
    assert judge(cases, arms, FACTS).verdict is Verdict.EQUAL
    one = arms["staged-2"][3]
    arms["staged-2"][3] = dataclasses.replace(one, prompt=np.nextafter(one.prompt, 0))
    assert judge(cases, arms, FACTS).verdict is not Verdict.EQUAL


def test_reuse_that_rounds_as_everything_else_does_is_within_the_floor() -> None:
    found = verdicts(cold=rounding(1e-3, 0.5), warm=rounding(1e-3, 0.5))
    assert found.count(Verdict.WITHIN_FLOOR) >= len(found) - 3  # 5 % of 16 are 1
    assert Verdict.WRONG not in found


def test_reuse_that_rounds_five_times_as_much_each_time_changes_outputs_and_is_not_wrong() -> None:
    rounds = rounding(1e-3, 0.3)
    assert set(verdicts(cold=rounds, warm=rounds, shift=rounding(5e-3, 0.3))) == {Verdict.CHANGES}


def test_flips_alone_change_outputs() -> None:
    warm = ("branch", "repeat", "staged", "turns-1", "turns-2", "company-1", "company-2", "cancelled")
    cases, arms = made(np.random.default_rng(1), cases=12, flip=lambda _rng, arm: arm.startswith(warm))
    found = judge(cases, arms, FACTS)
    assert (found.verdict, set(found.paths["flips"])) == (Verdict.CHANGES, {1.0})


@pytest.mark.parametrize(("sigma", "ratio"), [(0.5, 1.0), (1.0, 1.0), (0.5, 4.0)])
def test_rounding_is_not_called_wrong(sigma: float, ratio: float) -> None:
    found = verdicts(cold=rounding(5e-3, sigma), warm=rounding(5e-3, sigma), shift=rounding(5e-3 * ratio, sigma))
    assert found.count(Verdict.WRONG) == 0


def test_one_wrong_answer_of_one_case_is_found_and_named() -> None:
    for seed in SEEDS:
        cases, arms = made(np.random.default_rng(seed), cold=rounding(1e-3, 0.5), warm=rounding(1e-3, 0.5))
        one = arms["company-2"][5]
        arms["company-2"][5] = dataclasses.replace(one, prompt=one.prompt - 0.3)
        found = judge(cases, arms, FACTS)
        assert found.verdict is Verdict.WRONG
        assert [(w.arm, w.case) for w in found.wrong] == [("company-2", 5)]


def test_a_cold_answer_that_is_wrong_by_itself_blames_no_reuse() -> None:
    cases, arms = made(np.random.default_rng(2), cold=rounding(1e-3, 0.5), warm=rounding(1e-3, 0.5))
    arms["cold-2"][5] = dataclasses.replace(arms["cold-2"][5], prompt=arms["cold-2"][5].prompt - 0.3)
    found = judge(cases, arms, FACTS)
    assert found.wrong == ()
    assert found.yardstick < 0.01
    cases, arms = made(np.random.default_rng(2), cold=rounding(1e-3, 0.5), warm=rounding(1e-3, 0.5))
    one = arms["turns-cold-2"][5]  # of other tokens than the yardstick's
    arms["turns-cold-2"][5] = dataclasses.replace(one, prompt=one.prompt - 0.3)
    assert judge(cases, arms, FACTS).wrong == ()


def test_cold_answers_that_disagree_are_no_yardstick() -> None:
    cases, arms = made(np.random.default_rng(0), cold=rounding(2.0, 0.2), warm=rounding(2.0, 0.2), control=1e3)
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "something other than reuse changes this server's answers" in found.sentence


def test_more_than_the_floor_that_few_cases_do_not_show_is_said_to_be_that() -> None:
    cases, arms = made(np.random.default_rng(5), shift=lambda _rng, i: 1e-3 if i < 3 else 0.0)
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.WITHIN_FLOOR
    assert "10 cases do not show that this is more" in found.sentence
    assert "no more than cold runs" not in found.sentence


def test_what_more_tokens_after_move_as_much_is_within_the_floor_of_a_server_that_repeats_exactly() -> None:
    cases, arms = made(np.random.default_rng(3), shift=rounding(1e-3, 0.2))
    assert judge(cases, arms, FACTS).verdict is Verdict.CHANGES
    for i, one in arms["extended"].items():
        arms["extended"][i] = dataclasses.replace(one, prompt=one.prompt + 2e-3)
    assert judge(cases, arms, FACTS).verdict is Verdict.WITHIN_FLOOR


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"warm_cached": 0}, "warm was not warm"),
        ({"cold_cached": 7}, "cold was not cold"),
        ({"cold_cached": None}, "reports no cached tokens"),
    ],
)
def test_what_was_not_as_asked_is_inconclusive_and_says_so(given: dict[str, int | None], why: str) -> None:
    cases, arms = made(np.random.default_rng(0), **given)  # type: ignore[arg-type]
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert all(why in r for r in found.reasons)
    assert found.reasons


def test_prompts_that_do_not_look_back_show_nothing() -> None:
    given = {"cold": rounding(1e-3, 0.3), "warm": rounding(1e-3, 0.3), "control": 1e-3}
    assert Verdict.WITHIN_FLOOR not in verdicts(**given)


def test_too_few_cases_are_no_test() -> None:
    cases, arms = made(np.random.default_rng(0), cases=5, cold=rounding(1e-3, 0.3), warm=rounding(3e-3, 0.3))
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "5 cases are too few" in found.sentence


def test_every_verdict_has_an_exit_code_of_its_own_that_no_error_has() -> None:
    codes = [v.exit_code for v in Verdict]
    assert len(set(codes)) == len(codes)
    assert not {1, 2} & set(codes)


def test_with_so_few_cases_as_are_asked_for_a_test_can_reject() -> None:
    assert 2.0**-LEAST_CLUSTERS <= ALPHA
    rounds = rounding(1e-3, 0.3)
    cases, arms = made(np.random.default_rng(0), cases=6, cold=rounds, warm=rounds, shift=rounding(5e-3, 0.3))
    assert judge(cases, arms, FACTS).verdict is Verdict.CHANGES


def without(arms: Arms, path: str, cases: Sequence[int] = range(10)) -> None:
    for i in cases:
        del arms[f"{path}-2"][i]


@pytest.mark.parametrize("cases", [[3], range(10)])
def test_warm_requests_without_an_answer_where_cold_ones_have_theirs_rule_equal_out(cases: Sequence[int]) -> None:
    made_cases, arms = made(np.random.default_rng(0))
    without(arms, "staged", cases)
    found = judge(made_cases, arms, FACTS, refused={"staged-2": dict.fromkeys(cases, "answers 500: KV pool")})
    assert found.verdict is Verdict.INCONCLUSIVE
    assert f"In {len(cases)} of 60 comparisons a warm request got no answer" in found.sentence
    assert found.reasons == (f"staged: {len(cases)} cases left out, because no answer: answers 500: KV pool",)
    without(arms, "branch")
    one = arms["branch-1"][5]
    arms["branch-1"][5] = dataclasses.replace(one, prompt=one.prompt - 0.3)
    found = judge(made_cases, arms, FACTS)  # what did come is judged
    assert [(w.arm, w.case) for w in found.wrong] == [("branch-1", 5)]


def test_a_warm_answer_without_numbers_is_wrong_and_a_cold_one_is_no_yardstick() -> None:
    cases, arms = made(np.random.default_rng(0), cold=rounding(1e-3, 0.5), warm=rounding(1e-3, 0.5))
    one = arms["branch-1"][5]
    arms["branch-1"][5] = dataclasses.replace(one, chosen=np.full_like(one.chosen, np.nan))
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.WRONG
    assert [(w.arm, w.case, w.moved) for w in found.wrong] == [("branch-1", 5, math.inf)]
    assert "`branch`, case 5, log-probabilities are no numbers after 180 reused tokens" in found.sentence
    arms["branch-1"][5] = one
    arms["cold-2"][5] = dataclasses.replace(arms["cold-2"][5], prompt=np.full(40, np.nan))
    found = judge(cases, arms, FACTS)
    assert (found.verdict, found.wrong) == (Verdict.WITHIN_FLOOR, ())
    assert found.reasons[0] == (
        "branch: 1 cases left out, because a cold answer has log-probabilities that are no numbers"
    )
    assert "3 further comparisons were left out" in found.sentence


def test_a_warm_answer_without_numbers_is_none_whatever_it_says_it_reused() -> None:
    cases, arms = made(np.random.default_rng(3))
    for i, k in [(i, k) for i in range(4) for k in (1, 2)]:
        one = arms[f"branch-{k}"][i]
        arms[f"branch-{k}"][i] = dataclasses.replace(one, cached=0, prompt=one.prompt * np.nan)
    found = judge(cases, arms, FACTS)
    assert (found.verdict, found.wrong) == (Verdict.INCONCLUSIVE, ())
    assert "In 4 of 60 comparisons a warm request got no answer, or one that is not whole" in found.sentence


@pytest.mark.parametrize("kept", [0, 1, 15])
@pytest.mark.parametrize("path", ["repeat", "turns"])
def test_warm_answers_that_are_short_are_equal_to_nothing(path: str, kept: int) -> None:
    cases, arms = made(np.random.default_rng(0))
    for k in (1, 2):
        for i, a in arms[f"{path}-{k}"].items():
            arms[f"{path}-{k}"][i] = dataclasses.replace(
                a, output=a.output[:kept], chosen=a.chosen[:kept], top=a.top[:kept]
            )
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert f"case 0, {kept} of 16 tokens came back" in found.sentence


def test_an_answer_that_ends_earlier_parts_there_and_one_without_a_position_is_not_equal() -> None:
    a = answer()
    short = answer(output=a.output[:1], chosen=a.chosen[:1], top=a.top[:1])
    for pair in (compare(a, short), compare(short, a)):
        assert (pair.parted, pair.equal, len(pair.output)) == (1, False, 1)
    empty = answer(prompt=np.zeros(0), output=(), chosen=np.zeros(0), top=())
    assert not compare(empty, empty).equal


def test_nothing_is_said_of_cases_without_a_position() -> None:
    cases, arms = made(np.random.default_rng(0))
    for arm in arms.values():  # and so the colds
        for i in range(4):
            arm[i] = dataclasses.replace(arm[i], prompt=np.zeros(0), output=(), chosen=np.zeros(0), top=())
    found = judge(cases, arms, FACTS, paths=["branch"])
    assert "branch: 4 cases left out, because no position came back that could be compared" in found.reasons
    assert "All 6 comparisons" in found.sentence


def test_paths_with_enough_cases_are_tested_and_one_with_too_few_is_named() -> None:
    rounds = rounding(1e-3, 0.3)
    cases, arms = made(np.random.default_rng(0), cases=8, cold=rounds, warm=rounds, shift=rounding(5e-3, 0.3))
    for i in range(3):
        arms["turns-1"][i] = dataclasses.replace(arms["turns-1"][i], cached=0)
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.CHANGES
    assert "Too few cases to test: `turns` (5)." in found.sentence
    p = found.paths.set_index("path")["p_moved"]
    assert np.isnan(p["turns"])
    assert p.drop("turns").notna().all()
    cases, arms = made(np.random.default_rng(0), cases=8, cold=rounds, warm=rounds)
    for i in range(3):
        arms["turns-1"][i] = dataclasses.replace(arms["turns-1"][i], cached=0)
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "5 cases are too few to compare that with the floor, on `turns` (5)" in found.sentence


def test_one_odd_cold_answer_raises_the_threshold_of_its_own_case_alone() -> None:
    cases, arms = made(np.random.default_rng(1), cold=rounding(1e-3, 0.3), warm=rounding(1e-3, 0.3))
    one = arms["company-cold-1"][0]
    arms["company-cold-1"][0] = dataclasses.replace(one, prompt=one.prompt + 0.4, chosen=one.chosen + 0.4)
    for i in (0, 6):
        warm = arms["branch-1"][i]
        arms["branch-1"][i] = dataclasses.replace(warm, prompt=warm.prompt + 1.0, chosen=warm.chosen + 1.0)
    found = judge(cases, arms, FACTS)
    assert [(w.arm, w.case) for w in found.wrong] == [("branch-1", 6)]
    assert found.yardstick < 0.01
    assert found.seen[16] == 0.9


def test_changes_that_wrong_entries_would_look_like_are_not_called_rounding() -> None:
    rounds, shift = rounding(1e-3, 0.3), rounding(5e-3, 0.3)
    cases, arms = made(np.random.default_rng(0), cold=rounds, warm=rounds, shift=shift, control=5e-3)
    found = judge(cases, arms, FACTS)
    assert (found.verdict, found.seen[16]) == (Verdict.INCONCLUSIVE, 0.0)
    assert (
        "cannot be told from wrong entries: 16 wrong tokens in the prefix would have been seen in 0%" in found.sentence
    )


def test_every_path_that_was_asked_must_say_something_of_most_cases() -> None:
    cases, arms = made(np.random.default_rng(0))
    for i in range(5):
        arms["turns-1"][i] = dataclasses.replace(arms["turns-1"][i], cached=220)  # the prompt, and nothing generated
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "anything of `turns`: turns: 5 cases" in found.sentence
    assert "220 of 235 tokens came from the cache, none of them generated" in found.sentence
    arms["turns-1"][0] = dataclasses.replace(arms["turns-1"][0], cached=221)
    found = judge(cases, arms, FACTS)
    assert found.verdict is Verdict.EQUAL
    assert (
        "on branch, repeat, staged, turns, company, cancelled. 4 further comparisons were left out." in found.sentence
    )
    found = judge(cases, arms, FACTS, paths=["branch"])
    assert "All 10 comparisons" in found.sentence
    assert found.sentence.endswith("on branch.")

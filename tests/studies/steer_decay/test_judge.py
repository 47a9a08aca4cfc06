"""A judge that can read is believed no further than it goes: its marks come back by arm, over the plain model's."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sglang_probe.paths import shipped
from sglang_probe.studies.steer_decay.config import SteerDecayConfig
from sglang_probe.studies.steer_decay.judge import judged, number_of
from sglang_probe.studies.steer_decay.names import PLAIN, rid_of

PROMPT, WINDOW, WANTED = 4, 3, 301


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("2", 2),
        (" 1.", 1),
        ("Rating: 0", 0),
        ("[[2]]", 2),
        ("2, because it is 2", 2),
        ("1 or 2", None),
        ("12", None),
        ("1.5", None),
        ("", None),
        ("two", None),
    ],
)
def test_an_answer_is_a_mark_or_none(answer: str, mark: int | None) -> None:
    assert number_of(answer) == mark or (mark is None and np.isnan(number_of(answer)))


def test_marks_are_of_the_window_of_each_arm_over_the_plain_models() -> None:
    config = SteerDecayConfig.model_validate(
        {"vector": "v", "random": ["r"], "steer": {"library": "."}, "onsets": [1, 5], "window": WINDOW}
        | {"after": 1, "concept": "ships", "prompt_tokens": PROMPT}
    )
    rows = []
    for text in range(7):
        for arm, onset in ((PLAIN, 0), ("v", 1), ("v", 5), ("r", 1), ("r", 5)):
            output = np.full(10, 300)
            if arm == "v":  # what it is steered to is in its window, and nowhere else
                output[onset : onset + WINDOW] = WANTED
            rows.append((rid_of(f"t{text}", "own", arm, onset), f"f{text}", np.full(PROMPT, 299), output))
    frame = pd.DataFrame(rows, columns=["rid", "family", "prompt_ids", "output_ids"])
    run: Any = SimpleNamespace(
        manifest={"model_path": str(shipped("models/probe-text/checkpoint"))}, requests=lambda: frame
    )
    from sglang_probe.axes.vocabulary import Vocabulary

    word = Vocabulary.load(shipped("models/probe-text/checkpoint")).pieces[WANTED].decode()

    def ask(questions: Sequence[list[dict[str, str]]]) -> list[str]:
        answers = []
        for (message,) in questions:
            said = message["content"]
            written = said.split("Continuation:\n")[1].split("\n\nHow ")[0]
            about = "about this: ships" in said
            answers.append(("2" if written == word * WINDOW else "0") if about else "1")
        return answers

    found = judged(run, config, ask).set_index(["arm", "onset"])
    assert found["concept"].to_dict() == {("vector", 1): 2, ("vector", 5): 2, ("random", 1): 0, ("random", 5): 0}
    assert found.loc[("vector", 5), "score"] == pytest.approx(2 * 2 * 1 / 3)
    assert (found["fluency"] == 0).all()
    assert (found["plain_concept"] == 0).all()
    assert (found["unread"] == 0).all()
    mute = judged(run, config, lambda questions: ["no idea"] * len(questions))
    assert (mute["asked"].tolist(), mute["unread"].tolist()) == ([28] * 4, [28] * 4)
    assert mute["score"].isna().all()
    assert mute["score_texts"].tolist() == [0] * 4

    def of_steered_alone(questions: Sequence[list[dict[str, str]]]) -> list[str]:
        said = [q[0]["content"].split("Continuation:\n")[1] for q in questions]
        return ["1" if s.startswith(word) else "no idea" for s in said]

    half = judged(run, config, of_steered_alone).set_index(["arm", "onset"])
    assert half["unread"].to_dict() == {("vector", 1): 14, ("vector", 5): 14, ("random", 1): 28, ("random", 5): 28}
    assert half["plain_concept"].isna().all()  # of no text both answers were read


def test_the_plain_models_mark_is_of_the_texts_that_the_difference_is_of() -> None:
    config = SteerDecayConfig.model_validate(
        {"vector": "v", "random": ["r"], "steer": {"library": "."}, "onsets": [1, 5], "window": WINDOW}
        | {"after": 1, "concept": "ships", "prompt_tokens": PROMPT}
    )
    rows = [
        (
            rid_of(f"t{text}", "own", arm, onset),
            f"f{text}",
            np.full(PROMPT, 299),
            np.full(10, 300 + 2 * text + (arm == "v")),
        )
        for text in range(8)
        for arm, onset in ((PLAIN, 0), ("v", 1))
    ]
    frame = pd.DataFrame(rows, columns=["rid", "family", "prompt_ids", "output_ids"])
    run: Any = SimpleNamespace(
        manifest={"model_path": str(shipped("models/probe-text/checkpoint"))}, requests=lambda: frame
    )
    answers: list[str] = []
    for text in range(8):  # of each text the steered one's concept and fluency, then the plain model's
        answers += ["2" if text < 4 else "?", "1", "0" if text < 4 else "2", "1"]
    (found,) = judged(run, config, lambda questions: answers[: len(questions)]).to_dict("records")
    assert (found["concept"], found["plain_concept"], found["concept_texts"]) == (2, 0, 4)
    assert (found["fluency"], found["fluency_texts"], found["asked"], found["unread"]) == (0, 8, 32, 4)

"""What a judge is asked of a latent, and how its answers are read.

The three questions of delphi (Paulo et al. 2410.13928), in our own words: what do these examples have in common; which
of these texts have it (*detection*); in which are the right tokens marked (*fuzzing*). Texts are written as JSON
strings on one line each, so that nothing in them can be taken for another text or for an instruction of ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

LEFT, RIGHT = "⟦", "⟧"
"""Around marked tokens. Code and prose have `<<` and `[[` of their own."""
BATCH = 5
"""Texts of a question."""
LABEL_TOKENS, VERDICT_TOKENS = 400, 200
MOST_LABEL = 300
LABEL_FORM = r"LABEL: [^ \t\n][^\n]{2,119}"
"""What an answer looks like that is held to a form: no more than the phrase, and not blanks alone."""
_TEXTS = f"Texts are JSON strings, cut out of longer texts. {LEFT} and {RIGHT} are ours: they stand around tokens"
EXPLAIN = (
    "You find out what one feature of a language model is about. You see excerpts of texts. "
    f"{_TEXTS} on which the feature is active, and the number after each text is how strongly it is at its strongest. "
    "Say in one short phrase what these tokens, or what comes before them, have in common. Be specific: a phrase that "
    "would fit most texts is no use. Do not mention the marks. The last line of your answer begins with LABEL: and "
    "goes on with the phrase."
)
"""Neither this nor what follows has an example of an answer. A small model gave `your phrase`, which stood here for
the label, as the label of every latent, and the example of verdicts as its verdicts; then the end of this."""
DETECT = (
    "You are given a phrase that says on what one feature of a language model is active, and numbered excerpts. "
    "Texts are JSON strings, cut out of longer texts. For each text decide whether the feature is active anywhere in "
    "it: 1 if so, 0 if not. It may be all, some or none of them. Answer with a JSON list of {n} numbers in square "
    "brackets, with commas between them, and nothing else."
)
FUZZ = (
    "You are given a phrase that says on what one feature of a language model is active, and numbered excerpts. "
    f"{_TEXTS} that may be, or may not be, those on which the feature is active. For each text decide whether the "
    "marks are in the right places: 1 if so, 0 if not. It may be all, some or none of them. Answer with a JSON list of "
    "{n} numbers in square brackets, with commas between them, and nothing else."
)
_FEW_WORDS = 2
"""So few may stand in the question by chance."""
PROMPTS = {"label": EXPLAIN, "detection": DETECT, "fuzzing": FUZZ}
Messages = list[dict[str, str]]


def sha256(name: str) -> str:
    """Of one of `PROMPTS`: which question it was."""
    return hashlib.sha256(PROMPTS[name].encode()).hexdigest()


def marked(tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """A text with runs of marked tokens between the marks."""
    out, inside = [], False
    for token, mark in zip(tokens, marks, strict=True):
        if mark != inside:
            out.append(LEFT if mark else RIGHT)
            inside = bool(mark)
        out.append(token.replace(LEFT, "[").replace(RIGHT, "]"))
    return "".join([*out, RIGHT if inside else ""])


def explain(examples: Sequence[tuple[str, float]]) -> Messages:
    """What do these have in common?

    Args:
        examples: marked texts, and how active the latent is at its strongest.
    """
    most = max((value for _, value in examples), default=1.0) or 1.0
    # From 1 to 10, as the numbers themselves say nothing without the others.
    lines = [f"{_quoted(text)}  {max(1, round(10 * value / most))}" for text, value in examples]
    return _messages(EXPLAIN, "\n".join(lines))


def detect(label: str, texts: Sequence[str]) -> Messages:
    """Which of these does the label fit?"""
    return _messages(DETECT.replace("{n}", str(len(texts))), _numbered(label, texts))


def fuzz(label: str, texts: Sequence[str]) -> Messages:
    """In which of these are the tokens of the label marked?"""
    return _messages(FUZZ.replace("{n}", str(len(texts))), _numbered(label, texts))


def label_of(answer: str) -> str | None:
    """The phrase after the last `LABEL:`; None: there is none, or it is copied out of the question."""
    found = re.findall(r"^[\s*#>`]*LABEL[\s*`]*:[\s*`\"]*(.+?)[\s*`\"]*$", _said(answer), re.MULTILINE | re.IGNORECASE)
    phrases = [" ".join(f.split())[:MOST_LABEL] for f in found]
    words = phrases[-1].casefold().strip(" .") if phrases else ""
    copied = len(words.split()) > _FEW_WORDS and words in EXPLAIN.casefold()
    return phrases[-1] if words and not copied else None


def verdicts_of(answer: str, n: int) -> list[int] | None:
    """The last list of n zeros and ones; None: there is none, and nothing is guessed."""
    for found in reversed(re.findall(r"\[[\s01,]*\]", _said(answer))):
        numbers = re.findall(r"[01]", found)
        if len(numbers) == n and re.fullmatch(r"\[\s*[01](\s*,\s*[01])*\s*\]", found):
            return [int(x) for x in numbers]
    return None


def verdicts_form(n: int) -> str:
    """The form of n verdicts, as a regular expression."""
    return rf"\[[01](, [01]){{{n - 1}}}\]"


def _said(answer: str) -> str:
    """Without what a reasoning model thought first; nothing where it never came to an end."""
    if "<think>" in answer and "</think>" not in answer:
        return ""
    return answer.rpartition("</think>")[2]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _numbered(label: str, texts: Sequence[str]) -> str:
    lines = [f"{i}. {_quoted(text)}" for i, text in enumerate(texts, start=1)]
    return "\n".join([f"Phrase: {_quoted(label)}", *lines])


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]

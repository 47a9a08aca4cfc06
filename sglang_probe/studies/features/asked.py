"""Labels of latents by a model that is asked, and what they score: judged by that model, or by the words they name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError
from sglang_probe.sae import labels
from sglang_probe.studies.endpoint import Endpoint
from sglang_probe.studies.features import prompts
from sglang_probe.studies.features.arms import OWN, Arm

Array = np.ndarray[Any, Any]
Tell = Callable[[int, int], None]
COLUMNS = ["arm", "latent", "label", "detection", "detection_shuffled", "fuzzing", "fuzzing_shuffled"]
COLUMNS += ["windows", "answered", "questions", "alike"]
_KINDS = ("detection", "fuzzing")
_TOPS_OF = 2
"""One of so many examples is among the strongest, the others are drawn from all."""
_NO_TOKEN = -2
"""The id of no token: -1 is that of tokens that were withheld, which are there."""


@dataclass(frozen=True)
class Asking:
    """Who is asked, and for what."""

    endpoint: Endpoint
    most: int = 50
    """Latents to label, drawn at random among those that can be judged."""
    nulls: int = 30
    """Of random directions, and of a random model."""
    latents: Sequence[int] = ()
    """These and no others."""
    examples: int = 20
    """In the question for a label."""
    windows: int = 10
    """In which a latent fires, and as many in which it does not, that a label is judged by."""
    judge: Literal["endpoint", "words"] = "endpoint"
    """`words`: a label fits where one of the words that it names stands, without asking."""
    grammar: bool = False
    """Have the server hold answers to their form (SGLang's `regex`): small models do not keep it by themselves."""


def ask(asking: Asking, arms: Sequence[Arm], vocabulary: Vocabulary, seed: int, tell: Tell) -> pd.DataFrame:
    """Label latents of every arm and judge the labels: a row for each, columns as `COLUMNS`.

    Labels are found on the texts of the first half, and judged on the others. NaN where too few windows are there, or
    where no answer could be read; `answered` of `questions` could, and `alike` of these are one and the same list, the
    commonest of the arm: of a judge that reads the texts, few.

    Raises:
        ConfigError: the endpoint refuses or is not there; a latent that was named cannot be judged.
    """
    found = [_ask(asking, arm, vocabulary, seed, tell) for arm in arms]
    return pd.concat(found, ignore_index=True)[COLUMNS]


def chosen(asking: Asking, arm: Arm, seed: int) -> list[int]:
    """Which latents of an arm are labelled.

    Raises:
        ConfigError: a latent that was named does not fire in enough texts of either half.
    """
    can = np.flatnonzero(~np.isnan(arm.scores.detection))
    if arm.name == OWN and asking.latents:
        if missing := sorted(set(asking.latents) - set(can.tolist())):
            raise ConfigError(
                f"latent {missing[0]} cannot be labelled and judged: it does not fire in {labels.LEAST_WINDOWS} rows "
                "of either half of the texts",
                fix="name others, or read more texts with --most",
            )
        return sorted(set(asking.latents))
    draw = np.random.default_rng([seed, 9]).permutation(can)
    return np.sort(draw[: asking.most if arm.name == OWN else asking.nulls]).tolist()


def words_of(ids: Array, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Tokens of texts by what they say, without spaces around it and without regard to case."""
    found: dict[str, list[int]] = {}
    for token in np.unique(ids[ids >= 0]).tolist():  # what was withheld says nothing
        found.setdefault(vocabulary.text(token).strip().casefold(), []).append(token)
    found.pop("", None)
    return found


def named_tokens(label: str, words: Mapping[str, list[int]]) -> Array:
    """Tokens that a label names: those that say one of its words or quoted parts."""
    quoted = re.findall(r"[\"'`“‘]([^\"'`”’]{1,40})[\"'`”’]", label)
    named = {w.strip().casefold() for w in (*re.findall(r"\w+", label), *quoted)}
    return np.array(sorted(t for w in named for t in words.get(w, ())), np.int64)


def _ask(asking: Asking, arm: Arm, vocabulary: Vocabulary, seed: int, tell: Tell) -> pd.DataFrame:
    latents = chosen(asking, arm, seed)
    questions = [prompts.explain(e) for e in _examples(arm, latents, asking.examples, vocabulary, seed)]
    forms = [prompts.LABEL_FORM] * len(questions) if asking.grammar else None
    answers = asking.endpoint.ask(questions, most_tokens=prompts.LABEL_TOKENS, forms=forms, tell=tell)
    said = {m: label for m, a in zip(latents, answers, strict=True) if (label := prompts.label_of(a)) is not None}
    scores = (_by_words if asking.judge == "words" else _by_endpoint)(asking, arm, said, vocabulary, seed, tell)
    frame = pd.DataFrame({"arm": arm.name, "latent": latents, "label": [said.get(m) for m in latents]})
    return frame.merge(scores, on="latent", how="left")


def _examples(
    arm: Arm, latents: Sequence[int], n: int, vocabulary: Vocabulary, seed: int
) -> list[list[tuple[str, float]]]:
    """Of each latent, marked windows of the first half of the texts and how active it is there, strongest first."""
    coded = arm.coded
    mine = np.flatnonzero(arm.first[coded.text_of_row])
    columns = arm.codes[mine].tocsc()
    flat = coded.rows["flat"].to_numpy()
    rng = np.random.default_rng([seed, 10])
    value_at = np.zeros(len(coded.ids), dtype=np.float32)
    found = []
    for m in latents:
        part = slice(columns.indptr[m], columns.indptr[m + 1])
        rows, values = mine[columns.indices[part]], columns.data[part]
        order = np.argsort(-values, kind="stable")
        tops = order[: -(-n // _TOPS_OF)]
        rest = rng.permutation(order[len(tops) :])[: n - len(tops)]
        at = np.concatenate([tops, rest])
        at = at[np.argsort(-values[at], kind="stable")]
        value_at[flat[rows]] = values
        shown = []
        for f in flat[rows[at]].tolist():
            a, b = coded.window(f, labels.BEFORE, labels.AFTER)
            text = prompts.marked(_texts(coded.ids[a:b], vocabulary), (value_at[a:b] > 0).tolist())
            shown.append((text, float(value_at[a:b].max())))
        value_at[flat[rows]] = 0
        found.append(shown)
    return found


def _by_endpoint(
    asking: Asking, arm: Arm, said: Mapping[int, str], vocabulary: Vocabulary, seed: int, tell: Tell
) -> pd.DataFrame:
    other = labels.others(sorted(said), seed=seed)
    rng = np.random.default_rng([seed, 11])
    fires = labels.fired(arm.codes)
    questions: list[prompts.Messages] = []
    asked: list[tuple[int, str, list[int]]] = []
    windows: dict[int, int] = {}
    for w in labels.drawn(arm.coded, fires, sorted(said), ~arm.first, most=asking.windows, seed=seed):
        windows[w.latent] = len(w.yes)
        texts = {
            "detection": [(_plain(arm, p, vocabulary), 1) for p in w.yes]
            + [(_plain(arm, p, vocabulary), 0) for p in w.no],
            "fuzzing": [
                (prompts.marked(_texts(arm.coded.ids[a:b], vocabulary), marks.tolist()), truth)
                for (a, b), both in zip(w.yes, w.marks, strict=True)
                for marks, truth in zip(both, (1, 0), strict=True)
            ],
        }
        for kind in _KINDS:
            order = rng.permutation(len(texts[kind]))
            for start in range(0, len(order), prompts.BATCH):
                batch = [texts[kind][i] for i in order[start : start + prompts.BATCH]]
                for suffix, label in (("", w.latent), ("_shuffled", other.get(w.latent))):
                    if label is not None:
                        make = prompts.detect if kind == "detection" else prompts.fuzz
                        questions.append(make(said[label], [text for text, _ in batch]))
                        asked.append((w.latent, kind + suffix, [truth for _, truth in batch]))
    forms = [prompts.verdicts_form(len(truths)) for *_, truths in asked] if asking.grammar else None
    answers = asking.endpoint.ask(questions, most_tokens=prompts.VERDICT_TOKENS, forms=forms, tell=tell)
    verdicts: dict[tuple[int, str], list[tuple[int, int]]] = {}
    answered = dict.fromkeys(windows, 0)
    total = dict.fromkeys(windows, 0)
    lists: list[tuple[int, tuple[int, ...]]] = []
    for (m, column, truths), answer in zip(asked, answers, strict=True):
        total[m] += 1
        if (told := prompts.verdicts_of(answer, len(truths))) is not None:
            answered[m] += 1
            lists.append((m, tuple(told)))
            verdicts.setdefault((m, column), []).extend(zip(truths, told, strict=True))
    names = [kind + suffix for kind in _KINDS for suffix in ("", "_shuffled")]
    commonest = Counter(told for _, told in lists).most_common(1)
    alike = Counter(m for m, told in lists if told == commonest[0][0])
    return pd.DataFrame(
        [
            {"latent": m, "windows": n, "answered": answered[m], "questions": total[m], "alike": alike[m]}
            | {name: balanced_accuracy(verdicts.get((m, name), [])) for name in names}
            for m, n in windows.items()
        ],
        columns=["latent", *names, "windows", "answered", "questions", "alike"],
    )


def balanced_accuracy(verdicts: Sequence[tuple[int, int]]) -> float:
    """Of pairs of truth and verdict, 0 or 1; NaN where one of the two truths is missing."""
    parts = [[said == truth for truth, said in verdicts if truth == wanted] for wanted in (0, 1)]
    return float(np.mean([np.mean(p) for p in parts])) if all(parts) else float("nan")


def _by_words(
    asking: Asking, arm: Arm, said: Mapping[int, str], vocabulary: Vocabulary, seed: int, tell: Tell
) -> pd.DataFrame:
    width, words = arm.codes.shape[1], words_of(arm.coded.ids, vocabulary)
    tokens = [np.empty(0, np.int64)] * width
    for m, label in said.items():
        # A label that names no token fits nowhere, which is chance.
        named = named_tokens(label, words)
        tokens[m] = named if len(named) else np.array([_NO_TOKEN])
    nothing = np.full(width, np.nan)
    rules = labels.Rules(tokens, nothing, nothing, nothing)
    scores = labels.score(arm.coded, labels.fired(arm.codes), rules, ~arm.first, seed=seed)
    at = np.array(sorted(said), dtype=np.int64)
    names = [kind + suffix for kind in _KINDS for suffix in ("", "_shuffled")]
    frame = pd.DataFrame({"latent": at, **{name: getattr(scores, name)[at] for name in names}})
    return frame.assign(windows=scores.windows[at], answered=0, questions=0, alike=0)


def _texts(ids: Array, vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.text(int(t)) for t in ids]


def _plain(arm: Arm, place: tuple[int, int], vocabulary: Vocabulary) -> str:
    return "".join(_texts(arm.coded.ids[place[0] : place[1]], vocabulary))

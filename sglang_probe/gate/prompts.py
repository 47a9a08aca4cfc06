"""What is asked: cases of a prefix that others share, and tails after it. Built in, or from a JSONL of the user's own.

The built-in prompts are lists of made-up deliveries; their tails repeat some of these in another order. A model that
can look back predicts a tail from the prefix, so that an entry of the prefix that is wrong moves the log-probabilities
of the tail.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.errors import ConfigError, WorkloadError
from sglang_probe.gate.client import Ids

LEAST_TAIL, LEAST_PREFIX = 12, 16
"""Tokens that a case must have after and before its border."""
_GOODS = ["pears", "nails", "ropes", "lamps", "clocks", "boots", "tiles", "books", "chairs", "seeds", "drums", "wheels"]
_CITIES = ["Oslo", "Lima", "Cairo", "Quito", "Turin", "Perth", "Osaka", "Lagos", "Basel", "Leeds", "Porto", "Dakar"]
_WAYS = ["rail", "road", "sea", "air", "canal", "bicycle"]


@dataclass(frozen=True)
class Case:
    """One prefix with three tails, as token ids.

    `tail` is what is compared. `seed` is the tail of the request that computed the prefix before, `further` the next
    turn after `tail` has been answered.
    """

    name: str
    prefix: Ids
    tail: Ids
    seed: Ids
    further: Ids

    @property
    def prompt(self) -> Ids:
        """What is asked cold and warm."""
        return self.prefix + self.tail


def built_in(cases: int, tokens: int, ids: Callable[[str], Ids], *, seed: int = 0) -> list[Case]:
    """Cases with prefixes of about `tokens` tokens.

    Args:
        ids: token ids of a text, as the server makes them.
    """
    sizes = max(2, tokens // 18)
    written = [_texts(f"{seed}/{i}", sizes) for i in range(cases)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(ids, [prefix + tail for prefix, tails in written for tail in tails]))
    return [_case(f"deliveries {i + 1}", made[3 * i : 3 * i + 3]) for i in range(cases)]


def _texts(seed: str, lines: int) -> tuple[str, list[str]]:
    rng = random.Random(seed)
    records = [
        f"Order {rng.randint(1000, 9999)}: {rng.randint(2, 90)} {rng.choice(_GOODS)} for {rng.choice(_CITIES)} "
        f"by {rng.choice(_WAYS)}.\n"
        for _ in range(lines)
    ]
    tails = []
    for word in ("again", "once more", "finally"):
        chosen = rng.sample(records, min(3, len(records)))
        tails.append(f"Some of them {word}:\n{''.join(chosen)}".rstrip() + "\n")
    return f"Deliveries of depot {rng.randint(10, 99)}.\n{''.join(records)}", tails


def _case(name: str, whole: Sequence[Ids]) -> Case:
    """From the ids of the prefix with three tails: what they share is the prefix, whatever the tokenizer joins."""
    border = min(_shared(whole[0], other) for other in whole[1:])
    first, second, third = whole
    return Case(name, first[:border], first[border:], second[border:], third[border:])


def _shared(a: Ids, b: Ids) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def from_file(path: Path, ids: Callable[[str], Ids], *, most: int) -> list[Case]:
    """One case a line: `{"prompt": TEXT}` or `{"prompt_ids": [...]}`. The border is after three quarters of a prompt,
    and the other tails are those of the next lines.

    Raises:
        WorkloadError: a line is neither, or too short; there are fewer than three.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read: {e}", fix="give a JSONL file, one prompt a line") from e
    wholes: list[tuple[int, Ids]] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and len(wholes) < most:
            wholes.append((number, _of_line(line, f"{path}, line {number}", ids)))
    if len(wholes) < 3:
        raise WorkloadError(f"{path} has {len(wholes)} prompts", fix="give three, or six for the floor")
    borders = [max(LEAST_PREFIX, len(whole) * 3 // 4) for _, whole in wholes]
    tails = [whole[border:] for (_, whole), border in zip(wholes, borders, strict=True)]
    return [
        Case(f"line {number}", whole[:border], tail, tails[(i + 1) % len(tails)], tails[(i + 2) % len(tails)])
        for i, ((number, whole), border, tail) in enumerate(zip(wholes, borders, tails, strict=True))
    ]


def _of_line(line: str, where: str, ids: Callable[[str], Ids]) -> Ids:
    fix = 'a line is {"prompt": "some text"} or {"prompt_ids": [1, 2, 3]}'
    try:
        told: Any = json.loads(line)
    except ValueError as e:
        raise WorkloadError(f"{where}: no JSON ({e})", fix=fix) from e
    if not isinstance(told, dict):
        raise WorkloadError(f"{where}: no mapping", fix=fix)
    if "messages" in told:
        raise WorkloadError(
            f"{where}: `messages` need the model's chat template, which is not here",
            fix=f"give the rendered text: {fix}",
        )
    given = told.get("prompt_ids", told.get("input_ids"))
    if given is not None:
        if not isinstance(given, list) or not all(type(i) is int and i >= 0 for i in given):
            raise WorkloadError(f"{where}: `prompt_ids` are no list of token ids", fix=fix)
        found = tuple(given)
    else:
        text = told.get("prompt", told.get("text"))
        if not isinstance(text, str) or not text:
            raise WorkloadError(f"{where}: neither `prompt` nor `prompt_ids`", fix=fix)
        found = ids(text)
    if len(found) < (least := LEAST_PREFIX + 4 * LEAST_TAIL):
        raise WorkloadError(f"{where}: {len(found)} tokens", fix=f"a prompt needs {least}, so that a prefix has a tail")
    return found

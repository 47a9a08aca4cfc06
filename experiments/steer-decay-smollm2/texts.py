"""Texts of `steer-decay-smollm2` and `steer-dose-smollm2`, cut from this interpreter's own standard library.

    python experiments/steer-decay-smollm2/texts.py FOLDER

Two axes, each as two files of prompts that differ in how they end: `prose` within a docstring, `code` within a
statement; `errors` where an exception is about to be raised or handled, `plain` where another block begins. `texts` is
what the studies measure on, and `neutral` English of the reference manual. No document is in two of the three uses.
"""

# ruff: noqa: T201

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from sglang_probe.workload.corpus import load_corpus

CHARS = 500
"""Length of a prompt that a vector is made of."""


def docstring_lines(text: str) -> set[int]:
    """Numbers of the lines, from 0, that lie inside strings of several lines."""
    found: set[int] = set()
    try:
        for t in tokenize.generate_tokens(io.StringIO(text).readline):
            if t.type == tokenize.STRING and t.end[0] > t.start[0] + 2:
                found |= set(range(t.start[0], t.end[0] - 1))
    except (tokenize.TokenError, SyntaxError, IndentationError):
        return set()
    return found


def cuts(text: str, inside: set[int]) -> dict[str, list[int]]:
    """Where a prompt of each kind may end."""
    found: dict[str, list[int]] = {"prose": [], "code": [], "errors": [], "plain": []}
    at = 0
    for number, line in enumerate(text.splitlines(keepends=True)):
        words = [m.end() for m in re.finditer(r"\w+", line)]
        end, bare = at + len(line), line.strip()
        if at > CHARS and words:
            if number in inside and len(words) > 6 and ">>>" not in line:
                found["prose"].append(at + words[len(words) // 2])
            elif number not in inside and len(words) > 3 and re.search(r"[=(]", line) and not bare.startswith("#"):
                found["code"].append(at + words[len(words) // 2])
            if number not in inside and re.match(r"(except\b.*:|raise)$", bare):
                found["errors"].append(end)
            elif number not in inside and re.match(r"(if|for|while|with|else)\b.*:$", bare):
                found["plain"].append(end)
        at = end
    return found


def use_of(path: str) -> str:
    """`make` (vectors) or `ask` (the studies), by the document."""
    return "make" if hashlib.sha256(path.encode()).digest()[0] < 96 else "ask"


def prompts(kind: str) -> Iterator[dict[str, str]]:
    """One prompt a document."""
    rng = random.Random(kind)
    for d in load_corpus("stdlib").documents:
        if use_of(d.path) != "make" or "pydoc_data" in d.path:
            continue
        where = cuts(d.text, docstring_lines(d.text))[kind]
        if where:
            end = rng.choice(where)
            yield {"prompt": d.text[end - CHARS : end], "family": d.path}


def excerpts(chars: int) -> Iterator[dict[str, str]]:
    """Excerpts that begin at a line, one a document."""
    rng = random.Random(5)
    for d in load_corpus("stdlib").documents:
        if use_of(d.path) == "ask" and "pydoc_data" not in d.path and len(d.text) > 2 * chars:
            lines = [i + 1 for i, c in enumerate(d.text[:-chars]) if c == "\n"]
            start = rng.choice(lines)
            yield {"prompt": d.text[start : start + chars], "family": d.path}


def neutral(chars: int) -> Iterator[dict[str, str]]:
    """Excerpts of the topics of the reference manual, one a topic."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        text = re.sub(r"[*=~-]{3,}", "", topics[name]).strip()
        if len(text) > chars + 200:
            yield {"prompt": text[200 : 200 + chars].strip(), "family": name}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(11)
    made = {kind: list(prompts(kind)) for kind in ("prose", "code", "errors", "plain")}
    made |= {"texts": list(excerpts(1800)), "neutral": list(neutral(800))}
    for name, records in made.items():
        some = rng.sample(records, min(len(records), 48))
        lines = [json.dumps(r) for r in some]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(records)} found, {len(some)} taken")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

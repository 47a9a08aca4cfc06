"""Write traffic.jsonl: a mix of chats, few-shot tasks and agents, as requests in the order in which a server sees them.

    python experiments/coverage-mix/make.py            # beside this file; the same bytes each time

Texts are from the standard library of the Python that runs it, and the file is not kept here. What is meant to be
lifelike is the shape: who shares which beginning with whom, how histories grow, and in which order requests come. Every
number of it stands below, so that it can be disputed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from sglang_probe.workload.corpus import load_corpus

SEED = 0
PRODUCTS, CHATS, MOST_TURNS = 6, 5, 6  # a product has a system prompt; a chat has 1 to 6 turns
TASKS, QUESTIONS, EXEMPLARS = 12, 8, 4  # a few-shot task has its exemplars, and 8 requests
APPS, RUNS, STEPS = 4, 3, 6  # an app has a system prompt with its tools; an agent takes 6 steps
SYSTEM, TOOLS, OBSERVATION = 400, 2400, 700  # characters

Message = dict[str, Any]


def main() -> None:
    """Write the file."""
    draw = random.Random(SEED)
    functions = list(load_corpus("stdlib").functions)
    draw.shuffle(functions)
    texts = iter(functions)
    sessions = [*_chats(draw, texts), *_tasks(texts), *_agents(draw, texts)]
    file = Path(__file__).with_name("traffic.jsonl")
    with file.open("w", encoding="utf-8") as out:
        for record in _interleaved(draw, sessions):
            out.write(json.dumps(record) + "\n")


def _chats(draw: random.Random, texts: Any) -> list[list[dict[str, Any]]]:
    sessions = []
    for product in range(PRODUCTS):
        system = _message("system", _long(texts, SYSTEM))
        for _ in range(CHATS):
            messages, requests = [system], []
            for _ in range(draw.randint(1, MOST_TURNS)):
                f = next(texts)
                asked = [*messages, _message("user", f"What does this do?\n{f.signature}\n{f.doc}")]
                requests.append(_record(asked, f"chat-{product}"))
                messages = [*asked[:-1], {**asked[-1], "segment": "history"}, _history(f.doc)]
            sessions.append(requests)
    return sessions


def _tasks(texts: Any) -> list[list[dict[str, Any]]]:
    sessions = []
    for task in range(TASKS):
        shots: list[Message] = [_message("system", "Write the function that is described. Answer with code alone.")]
        for _ in range(EXEMPLARS):
            f = next(texts)
            shots += [_message("user", f.doc, "exemplar"), _message("assistant", f.source, "exemplar")]
        sessions += [
            [_record([*shots, _message("user", next(texts).doc)], f"few-shot-{task}")] for _ in range(QUESTIONS)
        ]
    return sessions


def _agents(draw: random.Random, texts: Any) -> list[list[dict[str, Any]]]:
    sessions = []
    for app in range(APPS):
        system = _message("system", f"You may call these tools.\n{_long(texts, TOOLS)}")
        for _ in range(RUNS):
            messages, requests = [system, _message("user", next(texts).doc)], []
            for _ in range(STEPS):
                requests.append(_record(list(messages), f"agent-{app}"))
                call = _history(f"call {next(texts).signature}")
                seen = _message("user", _long(texts, draw.randint(OBSERVATION // 4, OBSERVATION)), "observation")
                messages = [*messages, call, seen]
            sessions.append(requests)
    return sessions


def _interleaved(draw: random.Random, sessions: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """At each moment the next request of a session drawn at random, so that sessions overlap and stay in order."""
    left = [list(s) for s in sessions]
    out = []
    while left:
        session = draw.choice(left)
        out.append(session.pop(0))
        left = [s for s in left if s]
    return out


def _record(messages: list[Message], family: str) -> dict[str, Any]:
    return {"messages": messages, "family": family}


def _message(role: str, content: str, segment: str | None = None) -> Message:
    return {"role": role, "content": content.strip(), "segment": segment or role}


def _history(content: str) -> Message:
    return _message("assistant", content, "history")


def _long(texts: Any, chars: int) -> str:
    parts: list[str] = []
    while sum(map(len, parts)) < chars:
        parts.append(next(texts).doc)
    return "\n".join(parts)[:chars]


if __name__ == "__main__":
    main()

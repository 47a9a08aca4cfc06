"""Random traffic: what one seed means, as requests with what their clients do. Nothing here imports SGLang."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from sglang_probe.engine.releases import release
from sglang_probe.workload.request import Request, SegmentSpan

CACHE_USES = ("read_only", "write_only", "off")


@dataclass(frozen=True)
class Traffic:
    """One request, and what its client does."""

    request: Request
    follows: int | None = None
    """Continues the conversation of this earlier request: its prompt, its output, then our own last tokens."""
    tail: int = 0
    """How many of our own last tokens a continuation takes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of SGLang's `GenerateReqInput`."""
    abort_after: float | None = None
    """Seconds after which the client aborts."""
    reads: int | None = None
    """Streamed pieces that the client reads before it goes away; None: it waits for the whole answer."""


@dataclass
class Habits:
    """What clients do. Everything but the time at which an abort arrives follows from the seed."""

    seed: int
    requests: int
    vocabulary: int = 3072
    longest: int = 900
    """Tokens of a continuation's prompt at most, so that most fit into a small KV pool."""
    concurrency: int = 8
    waves: tuple[int, int] = (8, 40)
    """Requests that are sent together, at least and at most."""
    bypass: bool = False
    """Some requests bypass the cache."""
    priorities: bool = False
    pauses: bool = False
    """Generation is paused and every running request retracted, now and then."""
    refusals: bool = False
    """Some requests ask what SGLang's scheduler refuses."""
    samples: bool = False
    """Some requests ask for several answers (`n`), after the warm-up that SGLang sends for them."""
    routing_keys: bool = False


def make_traffic(habits: Habits) -> list[Traffic]:
    """Prompts as paths through a random tree of token runs, and continuations of earlier requests."""
    rng = random.Random(habits.seed + 1)
    later = random.Random(habits.seed + 4)  # what was added later, so that older seeds keep the rest of their draws

    def run_of(low: int, high: int) -> list[int]:
        return [rng.randrange(10, habits.vocabulary) for _ in range(rng.randint(low, high))]

    tree: list[list[int]] = [run_of(5, 90)]
    for _ in range(12):
        tree.append(rng.choice(tree) + run_of(3, 60))
    traffic: list[Traffic] = []
    for i in range(habits.requests):
        kind = rng.random()
        follows, tail = None, rng.randint(0, 40)
        if kind < 0.15 and traffic:
            prompt = list(rng.choice(traffic[-4:]).request.prompt_ids)  # a duplicate, likely in the same batch
        elif kind < 0.25:
            prompt = list(rng.choice(tree))  # wholly inside the tree: cached to the last token but one
        else:
            prompt = rng.choice(tree) + run_of(1, 80)
            if kind < 0.5 and traffic:
                follows = rng.randrange(max(0, i - 24), i)
        prompt = prompt[: habits.longest]
        params: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 8, 24, 60]), "temperature": 1.0}
        if rng.random() < 0.5:
            params["stop_token_ids"] = rng.sample(range(habits.vocabulary), min(300, habits.vocabulary // 10))
        else:
            params["ignore_eos"] = True
        if habits.bypass and rng.random() < 0.3:
            params["custom_params"] = {"probe": {"cache": rng.choice(CACHE_USES)}}
        if habits.samples and later.random() < 0.2:
            params["n"] = later.choice([2, 3])
        spans = (SegmentSpan("prompt", 0, len(prompt)),)
        request = Request(i, f"r{i:06d}", tuple(prompt), spans, None, params)
        # A continuation that cannot reuse what it continues would be no continuation.
        same_place = {} if follows is None else _place(traffic[follows].options)
        options = _options(habits, rng, same_place, len(prompt))
        leaves = rng.random()
        traffic.append(
            Traffic(
                request,
                follows,
                tail,
                options,
                abort_after=rng.random() * 0.3 if leaves < 0.12 else None,
                reads=rng.randint(1, 12) if 0.12 <= leaves < 0.24 else None,
            )
        )
    return traffic


def _options(habits: Habits, rng: random.Random, place: dict[str, Any], prompt_len: int) -> dict[str, Any]:
    options = dict(place)
    kind = rng.random()
    if not place and kind < 0.12:
        options[release().namespace_fields[-1]] = rng.choice("xyz")
    elif not place and kind < 0.24:
        options["extra_key"] = rng.choice("xyz")  # the same words: a salt is not a key
    elif kind < 0.38:
        options |= {"return_logprob": True, "logprob_start_len": rng.randrange(prompt_len)}
    if habits.refusals and rng.random() < 0.1:
        options |= {"return_logprob": True, "logprob_start_len": 2 * habits.longest}
    if habits.priorities and rng.random() < 0.9:
        options["priority"] = rng.randint(-4, 4)
    if habits.routing_keys:
        options["routing_key"] = rng.choice("pq")
    if rng.random() < 0.15:
        options["stream"] = True
    return options


def _place(options: dict[str, Any]) -> dict[str, Any]:
    """What separates prefixes in the radix tree."""
    return {k: v for k, v in options.items() if k in release().namespace_fields}

"""Agents in conversations, as the reports describe them: a system prompt, tools, and turns that grow.

Prompts are token ids, and an agent's answer goes into its next turn as the ids that the server generated. So nothing is
lost by tokenizing an answer anew, which a client that sends text may see on top of what is shown here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

from serve import MODEL, Server
from transformers import AutoTokenizer

AGENTS, TURNS = 6, 5
RULES = (
    "You are the assistant of a parcel depot. Answer in short sentences. Ask before you change an order. Never give an "
    "address of a customer to anybody else. If a parcel is late, say when it will come and why it is late. Use a tool "
    "for every question about an order, and say which tool was used. Numbers of orders have four digits.\n"
)
TOOLS = [
    f"Tool {name}: {what}. Takes the number of an order and the name of a city, and gives a list of lines, one for "
    f"each {unit}, with the newest first. It fails where there is no such order.\n"
    for name, what, unit in (
        ("track", "finds out where a parcel is", "stop"),
        ("route", "plans the way of a parcel", "road"),
        ("weigh", "says how heavy a parcel is", "piece"),
        ("price", "says what sending a parcel costs", "part of the price"),
        ("claim", "writes down that a parcel was broken", "claim"),
        ("store", "keeps a parcel until somebody comes", "day"),
    )
]
CITIES = ["Oslo", "Lima", "Cairo", "Quito", "Turin", "Perth", "Osaka", "Lagos", "Basel", "Leeds", "Porto", "Dakar"]

_tokenizer = AutoTokenizer.from_pretrained(MODEL)


def ids(text: str) -> list[int]:
    """Token ids without special ones."""
    return list(_tokenizer.encode(text, add_special_tokens=False))


@dataclass
class Turn:
    """What a client sends: the parts from which a prompt is built, and when."""

    agent: int
    number: int
    time: str
    said: list[list[int]] = field(default_factory=list)
    """Earlier questions and answers, and the present question."""


def plain(turn: Turn) -> list[int]:
    """Rules, tools, and the conversation; nothing in it changes."""
    return [*ids(RULES), *ids("".join(TOOLS)), *chain.from_iterable(turn.said)]


def time_in_front(turn: Turn) -> list[int]:
    """The time of the request in the first line."""
    return [*ids(f"Current time: {turn.time}\n"), *plain(turn)]


def time_at_the_end(turn: Turn) -> list[int]:
    """The same time in the last line."""
    return [*plain(turn), *ids(f"Current time: {turn.time}\n")]


def tools_in_any_order(turn: Turn) -> list[int]:
    """The tools in the order in which a set gives them."""
    order = random.Random(f"{turn.agent}/{turn.number}").sample(TOOLS, len(TOOLS))
    return [*ids(RULES), *ids("".join(order)), *chain.from_iterable(turn.said)]


def marker_before_the_last_question(turn: Turn) -> list[int]:
    """A marker that says how far to cache, always before the newest question: the next turn has it elsewhere."""
    *before, last = turn.said
    return [*ids(RULES), *ids("".join(TOOLS)), *chain.from_iterable(before), *ids("<cache until here>\n"), *last]


def question(rng: random.Random) -> list[int]:
    """A question with the result of a tool in it."""
    lines = "".join(
        f"{rng.randint(1000, 9999)} left {rng.choice(CITIES)} at {rng.randint(1, 12)} with {rng.randint(2, 90)} "
        "pieces.\n"
        for _ in range(6)
    )
    return ids(f"Result of track:\n{lines}Question: which of these is the newest?\nAnswer:")


def talk(
    servers: Sequence[Server],
    prompt: Callable[[Turn], list[int]],
    *,
    agents: int = AGENTS,
    turns: int = TURNS,
    salt: Callable[[Turn], str | None] = lambda turn: None,
    one_after_the_other: bool = False,
    route: Callable[[int, list[int]], int] = lambda n, prompt: 0,
) -> None:
    """Hold all conversations, one request at a time.

    Args:
        one_after_the_other: an agent holds its whole conversation before the next begins; else they take turns.
        route: the server of the n-th request.
    """
    rngs = [random.Random(f"agent {a}") for a in range(agents)]
    said: list[list[list[int]]] = [[] for _ in range(agents)]
    for n, (a, t) in enumerate(_order(agents, turns, one_after_the_other)):
        said[a].append(question(rngs[a]))
        turn = Turn(a, t, f"2026-11-28 {10 + t}:{(7 * a + 11 * t) % 60:02d}:{(13 * n) % 60:02d}", said[a])
        built = prompt(turn)
        answer = servers[route(n, built)].generate(built, session=f"agent-{a}", salt=salt(turn))
        said[a].append([*answer, *ids("\n")])


def burst(server: Server, size: int, *, first_alone: bool) -> None:
    """First turns of so many agents at once; or one of them first, and the others when it is done."""
    prompts = [plain(Turn(a, 0, "", [question(random.Random(f"burst {a}"))])) for a in range(size)]
    named = [(p, f"agent-{a}") for a, p in enumerate(prompts)]
    if first_alone:
        server.generate(named[0][0], session=named[0][1])
        named = named[1:]
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda one: server.generate(one[0], session=one[1]), named))


def _order(agents: int, turns: int, one_after_the_other: bool) -> Iterator[tuple[int, int]]:
    if one_after_the_other:
        return ((a, t) for a in range(agents) for t in range(turns))
    return ((a, t) for t in range(turns) for a in range(agents))

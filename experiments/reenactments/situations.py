"""The situations: what a report tells, what of it we set up, and what the product says before and after its advice."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import looked
import traffic
import yaml
from serve import MODEL, Server


@dataclass(frozen=True)
class Situation:
    """One report."""

    name: str
    report: str
    """Public threads, and what they tell."""
    here: str
    """What of it we planted, and what of it cannot run here."""
    act: Callable[[Path], dict[str, Any]]
    """What was measured: `before` and `after` (autopsies), `predicted` (what-if), `gates`, `audits`."""


def _segment(server: Server, hold: Callable[[], None]) -> Path:
    server.empty()
    hold()
    return server.close_segment()


def _pair(
    server: Server, before: Callable[[traffic.Turn], list[int]], after: Callable[[traffic.Turn], list[int]]
) -> dict[str, Any]:
    """The same conversations with prompts built in two ways."""
    return {
        name: looked.autopsy(_segment(server, lambda build=build: traffic.talk([server], build)))
        for name, build in (("before", before), ("after", after))
    }


def prompts(folder: Path) -> dict[str, Any]:
    """Four situations of one large server: what differs is how the clients build their prompts, or when they send."""
    with Server(folder, "--max-total-tokens", "65536") as server:

        def salted(salt: Callable[[traffic.Turn], str]) -> dict[str, Any]:
            return looked.autopsy(_segment(server, lambda: traffic.talk([server], traffic.plain, salt=salt)))

        def burst(first_alone: bool) -> dict[str, Any]:
            return looked.autopsy(_segment(server, lambda: traffic.burst(server, 8, first_alone=first_alone)))

        return {
            "timestamp": _pair(server, traffic.time_in_front, traffic.time_at_the_end),
            "tools": _pair(server, traffic.tools_in_any_order, traffic.plain),
            "marker": _pair(server, traffic.marker_before_the_last_question, traffic.plain),
            "salt": {
                "before": salted(lambda turn: uuid.uuid4().hex),
                "after": salted(lambda turn: f"tenant-{turn.agent % 2}"),
            },
            "burst": {"before": burst(False), "after": burst(True)},
        }


SMALL, LARGE = 2560, 10240


def small_cache(folder: Path) -> dict[str, Any]:
    """Six conversations that take turns in a cache that holds two; then in one four times as large, or in turn."""
    with Server(folder / "small", "--max-total-tokens", str(SMALL)) as server:
        first = _segment(server, lambda: traffic.talk([server], traffic.plain))
        together = _segment(server, lambda: traffic.talk([server], traffic.plain, one_after_the_other=True))
    with Server(folder / "large", "--max-total-tokens", str(LARGE)) as server:
        larger = _segment(server, lambda: traffic.talk([server], traffic.plain))
    return {
        "before": looked.autopsy(first),
        "after": looked.autopsy(larger),
        "predicted": looked.predicted(first, kv_tokens="4x"),
        "other_remedy": {"what": "one conversation after the other, same cache", **looked.autopsy(together)},
    }


def page_size(folder: Path) -> dict[str, Any]:
    """Prompts that share 90 tokens, in pages of 64 and of 8."""
    shared = traffic.ids(traffic.RULES)[:90]

    def serve(server: Server) -> None:
        for n in range(24):
            server.generate(
                [*shared, *traffic.ids(f" {n} and {n * 37} parcels to {traffic.CITIES[n % 12]}.")], session=f"user-{n}"
            )

    with Server(folder / "64", "--max-total-tokens", "16384", "--page-size", "64") as server:
        coarse = _segment(server, lambda: serve(server))
    with Server(folder / "8", "--max-total-tokens", "16384", "--page-size", "8") as server:
        fine = _segment(server, lambda: serve(server))
    return {
        "before": looked.autopsy(coarse),
        "after": looked.autopsy(fine),
        "predicted": looked.predicted(coarse, page=8),
    }


def router(folder: Path) -> dict[str, Any]:
    """Two replicas: requests in turn, as a plain balancer sends them, and by conversation."""
    with (
        Server(folder / "one", "--max-total-tokens", "65536") as one,
        Server(folder / "two", "--max-total-tokens", "65536") as two,
    ):

        def routed(route: Callable[[int, list[int]], int]) -> list[Path]:
            for server in (one, two):
                server.empty()
            traffic.talk([one, two], _own_rules, agents=5, route=route)
            return [one.close_segment(), two.close_segment()]

        in_turn = routed(lambda n, prompt: n % 2)
        by_prefix = routed(lambda n, prompt: hash(tuple(prompt[:64])) % 2)
        alone = _segment(one, lambda: traffic.talk([one], _own_rules, agents=5))
    return {
        "before": _both(in_turn),
        "after": _both(by_prefix),
        "predicted_before": looked.predicted(alone, router="round:2"),
        "predicted": looked.predicted(alone, router="prefix:2"),
        "one_server": looked.autopsy(alone),
    }


def _own_rules(turn: traffic.Turn) -> list[int]:
    """Each agent has a first line of its own, by which a router can tell it. Five, so that a router that takes
    turns sends an agent now here, now there; six would stay where they are."""
    return [*traffic.ids(f"You are agent {turn.agent} of five.\n"), *traffic.plain(turn)]


def _both(segments: list[Path]) -> dict[str, Any]:
    told = [looked.autopsy(s) for s in segments]
    added = {k: sum(t[k] for t in told) for k in ("requests", "prompt", "computed", "reused")}
    causes: dict[str, int] = {}
    for t in told:
        for cause, n in t["causes"].items():
            causes[cause] = causes.get(cause, 0) + n
    return {
        **added,
        "share": added["reused"] / added["prompt"],
        "causes": causes,
        "sums_exactly": all(t["sums_exactly"] for t in told),
        "violations": [v for t in told for v in t["violations"]],
        "sentence": " | ".join(t["sentence"] for t in told),
    }


def flips(folder: Path) -> dict[str, Any]:
    """A stock server in bfloat16, 40 prompts: cold, cold, warm. Then one in float32 with one wrong slot in every
    request that reuses: cold runs stay equal to each other."""
    config = folder / "server.yaml"
    config.write_text(yaml.safe_dump({"model": str(MODEL), "dtype": "bfloat16", "server": {"max_total_tokens": 65536}}))
    paths = ["--path", "branch", "--path", "repeat", "--cases", "40"]
    stock = looked.gate(str(config), folder / "stock", *paths)
    planted = folder / "wrong-slots"
    planted.unlink(missing_ok=True)
    with Server(folder / "planted", "--max-total-tokens", "65536", planted=planted) as server:
        as_it_is = looked.gate(server.url, folder / "as-it-is", *paths)
        planted.write_text("1 1.0")
        wrong = looked.gate(server.url, folder / "wrong", *paths)
    return {"gates": {"bfloat16, as it is": stock, "float32, as it is": as_it_is, "float32, one wrong slot": wrong}}


def cancels(folder: Path) -> dict[str, Any]:
    """Requests after cancelled ones get wrong slots; those that meet no cancel do not."""
    planted = folder / "wrong-slots"
    planted.unlink(missing_ok=True)
    paths = ["--path", "branch", "--path", "company", "--path", "cancelled", "--cases", "9"]
    with Server(folder / "server", "--max-total-tokens", "65536", planted=planted) as server:
        as_it_is = looked.gate(server.url, folder / "as-it-is", *paths)
        planted.write_text("8 1.0 cancelled")
        wrong = looked.gate(server.url, folder / "wrong", *paths)
    return {"gates": {"as it is": as_it_is, "planted": wrong}}


def wrong_reuse(folder: Path) -> dict[str, Any]:
    """An audit of a server that serves agents, before and after eight slots are wrong in what is reused."""
    planted = folder / "wrong-slots"
    planted.unlink(missing_ok=True)
    with Server(folder / "server", "--max-total-tokens", "65536", planted=planted) as server:
        segment = _segment(server, lambda: traffic.talk([server], traffic.plain))
        recorded = folder / "recorded"  # of these requests alone
        recorded.mkdir(exist_ok=True)
        link = recorded / segment.name
        link.unlink(missing_ok=True)
        link.symlink_to(segment)
        right = looked.audit(server.url, recorded, folder)
        planted.write_text("8 1.0")
        wrong = looked.audit(server.url, recorded, folder)
    return {"before": looked.autopsy(segment), "audits": {"as it is": right, "planted": wrong}}


_PROXY = (
    "sglang#35129 (open): the agents' prompts missed; the operator wrote a proxy to learn why, mended his gateway, and "
)
_PROXY += "went from 66.8 to 94.4 % hits."
_PROMPT = "Planted: the prompts. Not run here: his gateway, DeepSeek V4, DSpark and HiCache."

SITUATIONS = {
    "timestamp": Situation("a time in the system prompt", _PROXY, _PROMPT, prompts),
    "tools": Situation("tools in another order each time", _PROXY, _PROMPT, prompts),
    "marker": Situation(
        "a rolling marker",
        "sglang#36877 (open): a coding agent moves its cache marker to the newest message at each turn; 60,000 tokens "
        "are prefilled again.",
        "Planted: a line that moves. Not run here: DeepSeek V4, whose states are kept at a few positions only, so that "
        "a small change costs a whole prompt; here it costs one question and one answer.",
        prompts,
    ),
    "salt": Situation(
        "a salt for each request",
        "sglang#35808 (open) asks to tell `not present` from other misses; a namespace used too finely is one.",
        "Planted: the salts. Not run here: HiCache, whose tiers the request is about.",
        prompts,
    ),
    "burst": Situation(
        "a burst of one family",
        "sglang#5625, #26608, #30755: hit rates that nobody can explain. One reason: a request that is still in flight "
        "gives nothing to those that come with it.",
        "Planted: eight requests at once.",
        prompts,
    ),
    "cache": Situation(
        "a cache too small for the agents",
        "gents-ai/gents#723, omlx#1784: agents lose their prefix between turns, and nobody sees why.",
        f"Planted: a pool of {SMALL:,} tokens for six agents. Their engines were not run.",
        small_cache,
    ),
    "page": Situation(
        "pages that are not shared whole",
        "sglang#22819: reuse where a prefix ends at a border of a page. Its wrong outputs were not seen here; what is "
        "shown is what rounding to pages costs.",
        "Planted: a shared prefix of 90 tokens in pages of 64.",
        page_size,
    ),
    "router": Situation(
        "a router that spreads the turns",
        "kvlint, llm-d and sglang#35129: turns of one conversation reach another replica, which computes them anew.",
        "Planted: a router of two lines that takes turns. Two servers here; not run: a real gateway, remote ones.",
        router,
    ),
    "flips": Situation(
        "greedy flips between cold and warm",
        "sglang#34683 (open): Gemma-4; cold against cold equal to the last bit, cold against warm 18 of 40 greedy "
        "flips, log-probabilities up to 0.10 apart.",
        "The stock server is as it is. Planted in the other: one wrong slot. Not run here: Gemma-4, sliding windows, "
        "a GPU; what is wrong there is not known to be what we planted.",
        flips,
    ),
    "cancels": Situation(
        "cancelled requests, and others after them",
        "sglang#23392: a shared prefix, clients that go away, and then unrelated requests with corrupted answers.",
        "Planted: after a cancel the next requests that reuse get eight wrong slots. Not run here: speculative "
        "decoding, in which it was reported; stock SGLang as it is here shows nothing wrong.",
        cancels,
    ),
    "audit": Situation(
        "wrong entries while it serves",
        "LMCache#4385, Mooncake#4153, sglang PR #32555: wrong entries were reused for weeks, found by reading salad.",
        "Planted: eight wrong slots in every request that reuses. Not run here: LMCache, Mooncake, other tiers.",
        wrong_reuse,
    ),
}

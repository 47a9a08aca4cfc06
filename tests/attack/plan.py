"""What one seed of the attack means: engine options, and requests with what their clients do.

Nothing here imports SGLang. What SGLang refuses is left out, with the reason beside it; of what the probe refuses a
little is drawn, to see it refused by name. `num_continuous_decode_steps` is not drawn: nothing in SGLang reads
it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from sglang_probe.engine.releases import release
from sglang_probe.run.hook_points import EMBED
from sglang_probe.workload.request import Request, SegmentSpan

VOCABULARY = 3072
LONGEST = 900
"""Tokens of a continuation's prompt at most, so that most fit into the smallest KV pool."""
CACHE_USES = ("read_only", "write_only", "off")

EVICTION = ("lru", "lfu", "slru", "priority", "tlru")
# Not `priority`: it is among SGLang's choices, and its scheduler answers `Unknown schedule_policy`.
SCHEDULE = ("fcfs", "lpm", "random", "dfs-weight", "lof", "routing-key", "hrrn", "shortest-prefill-first")
PRIORITY_SCHEDULE = ("fcfs", "lof")
"""What SGLang accepts beside `enable_priority_scheduling`."""
HOOK_POINTS = ([EMBED], [EMBED], [EMBED, "blocks.1.hook_resid_post"], [])
REFUSED = (
    {"pp_size": 2},
    {"enable_hierarchical_cache": True},
    {"enable_lora": True},
    {"speculative_algorithm": "NGRAM"},
    {"enable_session_radix_cache": True},
)
"""Server arguments that the probe must refuse by name, whatever else is set."""
TIGHT = {
    "page_size": 1,
    "chunked_prefill_size": 64,
    "max_total_tokens": 1024,
    "enable_mixed_chunk": True,
    "radix_eviction_policy": "lfu",
    "schedule_policy": "lpm",
    "schedule_conservativeness": 0.3,
}
"""Engine options with which little traffic reaches most paths; a random configuration may miss the one in question."""


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
class Plan:
    """Engine options and client habits."""

    seed: int
    requests: int
    server: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)
    concurrency: int = 8
    cache: str = "on"
    bypass: bool = False
    """Some requests bypass the cache."""
    priorities: bool = False
    pauses: bool = False
    """Generation is paused and every running request retracted, now and then."""
    refusals: bool = False
    """Some requests ask what SGLang's scheduler refuses."""
    samples: bool = False
    """Some requests ask for several answers (`n`), behind the warm-up that SGLang sends for them."""
    hook_points: list[str] = field(default_factory=lambda: [EMBED])
    """Rows captured. Without `hook_embed` ownership is not checked by content."""
    accelerator: str = "refused"
    """`unproved`: the rows take the path of a GPU."""
    refused: str | None = None
    """The server argument for which the probe must refuse the engine."""

    @property
    def options(self) -> dict[str, Any]:
        """What is not SGLang's default, for a table."""
        server = {k: v for k, v in self.server.items() if v not in (False, None)}
        ours = {
            k: getattr(self, k)
            for k in ("cache", "bypass", "pauses", "refusals", "samples")
            if getattr(self, k) not in ("on", False)
        }
        rows = {} if self.hook_points == [EMBED] else {"rows": " ".join(self.hook_points) or "none"}
        return {**server, **ours, **rows, **self.env}


def plan_of(seed: int, requests: int) -> Plan:
    """Draw engine options. Tight memory makes the engine evict and retract."""
    rng = random.Random(seed)
    page = rng.choice([1, 1, 2, 16, 32])
    priorities = rng.random() < 0.3
    cache = "off" if rng.random() < 0.08 else "on"
    server: dict[str, Any] = {
        "page_size": page,
        "chunked_prefill_size": rng.choice([32, 64, 128, 4096, -1]),
        "max_total_tokens": rng.choice([1024, 1536, 2560, 8192]),
        "disable_overlap_schedule": rng.random() < 0.3,
        "enable_mixed_chunk": rng.random() < 0.4,
        "radix_eviction_policy": rng.choice(EVICTION),
        "schedule_policy": rng.choice(PRIORITY_SCHEDULE if priorities else SCHEDULE),
        "schedule_conservativeness": rng.choice([0.1, 0.3, 1.0]),
        "max_running_requests": rng.choice([None, None, 2, 4, 12]),
        "max_queued_requests": rng.choice([None, None, None, 4]),
        "max_prefill_tokens": rng.choice([16384, 64, 256]),
        "prefill_max_requests": rng.choice([None, None, 1, 2]),
    }
    if server["radix_eviction_policy"] == "tlru":
        server["radix_eviction_policy_config"] = {"threshold": rng.choice([32, 128]), "next_prompt_estimate": 8}
    if cache == "off" and server["schedule_policy"] == "shortest-prefill-first":
        server["schedule_policy"] = "fcfs"  # SGLang refuses it without a prefix cache
    if priorities:
        server |= {
            "enable_priority_scheduling": True,
            "schedule_low_priority_values_first": rng.random() < 0.5,
            "priority_scheduling_preemption_threshold": rng.choice([0, 1, 3]),
            "disable_priority_preemption": rng.random() < 0.15,
            "retraction_policy": rng.choice(["length", "priority"]),
            "max_running_requests": rng.choice([2, 4]),  # preemption needs an engine that is full
        }
    parallel = rng.random()
    if parallel < 0.16:
        server["tp_size" if parallel < 0.08 else "dp_size"] = 2
    later = random.Random(seed + 3)  # what was added later, so that older seeds keep the rest of their draws
    if page == 32 and later.random() < 0.5:
        # SGLang refuses chunks that are not whole pages.
        chunk = server["chunked_prefill_size"]
        server |= {"page_size": 64, "chunked_prefill_size": 64 if chunk == 32 else chunk}
    server["prefill_decode_interval"] = later.choice([None, None, None, 2])
    refused = later.choice(REFUSED) if later.random() < 0.06 else {}
    server |= refused
    return Plan(
        seed,
        requests,
        server,
        env={"SGLANG_TEST_RETRACT": "1"} if rng.random() < 0.25 else {},
        concurrency=rng.choice([4, 8, 16]),
        cache=cache,
        bypass=rng.random() < 0.4,
        priorities=priorities or server["radix_eviction_policy"] == "priority",
        pauses=rng.random() < 0.2,
        refusals=rng.random() < 0.2,
        samples=later.random() < 0.3,
        hook_points=later.choice(HOOK_POINTS),
        refused=next(iter(refused), None),
    )


def make_traffic(plan: Plan) -> list[Traffic]:
    """Prompts as paths through a random tree of token runs, and continuations of earlier requests."""
    rng = random.Random(plan.seed + 1)
    later = random.Random(plan.seed + 4)  # as in `plan_of`

    def run_of(low: int, high: int) -> list[int]:
        return [rng.randrange(10, VOCABULARY) for _ in range(rng.randint(low, high))]

    tree: list[list[int]] = [run_of(5, 90)]
    for _ in range(12):
        tree.append(rng.choice(tree) + run_of(3, 60))
    traffic: list[Traffic] = []
    for i in range(plan.requests):
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
        params: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 8, 24, 60]), "temperature": 1.0}
        if rng.random() < 0.5:
            params["stop_token_ids"] = rng.sample(range(VOCABULARY), 300)
        else:
            params["ignore_eos"] = True
        if plan.bypass and rng.random() < 0.3:
            params["custom_params"] = {"probe": {"cache": rng.choice(CACHE_USES)}}
        if plan.samples and later.random() < 0.2:
            params["n"] = later.choice([2, 3])
        spans = (SegmentSpan("prompt", 0, len(prompt)),)
        request = Request(i, f"r{i:06d}", tuple(prompt), spans, None, params)
        # A continuation that cannot reuse what it continues would be no continuation.
        same_place = {} if follows is None else _place(traffic[follows].options)
        options = _options(plan, rng, same_place, len(prompt))
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


def _options(plan: Plan, rng: random.Random, place: dict[str, Any], prompt_len: int) -> dict[str, Any]:
    options = dict(place)
    kind = rng.random()
    if not place and kind < 0.12:
        options[release().namespace_fields[-1]] = rng.choice("xyz")
    elif not place and kind < 0.24:
        options["extra_key"] = rng.choice("xyz")  # the same words: a salt is not a key
    elif kind < 0.38:
        options |= {"return_logprob": True, "logprob_start_len": rng.randrange(prompt_len)}
    if plan.refusals and rng.random() < 0.1:
        options |= {"return_logprob": True, "logprob_start_len": 2 * LONGEST}
    if plan.priorities and rng.random() < 0.9:
        options["priority"] = rng.randint(-4, 4)
    if plan.server.get("schedule_policy") == "routing-key":
        options["routing_key"] = rng.choice("pq")
    if rng.random() < 0.15:
        options["stream"] = True
    return options


def _place(options: dict[str, Any]) -> dict[str, Any]:
    """What separates prefixes in the radix tree."""
    return {k: v for k, v in options.items() if k in release().namespace_fields}

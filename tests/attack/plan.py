"""What one seed of the attack means: engine options, beside what clients do (`sglang_probe/prove/traffic.py`).

Nothing here imports SGLang. What SGLang refuses is left out, with the reason beside it; of what the probe refuses a
little is drawn, to see it refused by name. `num_continuous_decode_steps` is not drawn: nothing in SGLang reads
it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from sglang_probe.prove.traffic import Habits
from sglang_probe.run.hook_points import EMBED

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


@dataclass
class Plan(Habits):
    """Engine options and client habits."""

    model: str | None = None
    """A folder; None: the built-in one."""
    server: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    cache: str = "on"
    hook_points: list[str] = field(default_factory=lambda: [EMBED])
    """Rows captured. Without `hook_embed` ownership is not checked by content."""
    simulated_graphs: bool = False
    """The rows take the path of a GPU."""
    renewed: bool = False
    """The traffic is that of `tests.attack.windowed.renewed_prefixes`."""
    refused: str | None = None
    """The server argument for which the probe must refuse the engine."""

    def __post_init__(self) -> None:
        self.routing_keys = self.server.get("schedule_policy") == "routing-key"

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
        server=server,
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

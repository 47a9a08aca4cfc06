"""The gate: read what a server says, send every arm, judge, and keep the result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from sglang_probe.config import Config
from sglang_probe.gate import arms, judge
from sglang_probe.gate.client import Client, Facts
from sglang_probe.gate.prompts import Case, built_in, from_file

PATHS = tuple(judge.PATHS)
NEW = 16


class GateConfig(Config):
    """What the gate asks of a server; every option of the command but the address."""

    prompts: Path | None = Field(default=None, description="JSONL of your own prompts; default: built-in ones.")
    cases: int = Field(default=10, ge=1, le=512, description="Prompts; six at least to compare with the floor.")
    tokens: int = Field(default=192, ge=48, le=200_000, description="Tokens of a built-in prefix, about.")
    new_tokens: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Tokens that are generated for each request; default: 16, or one more than a page of the server's "
        "cache has, so that `turns` reuses generated ones.",
    )
    paths: list[str] = Field(default=list(PATHS), description="Ways of reuse.")
    company: int = Field(default=4, ge=2, le=256, description="Requests at a time on the path `company`.")
    cold: str = Field(default="auto", description="`auto`, `cache_salt`, `extra_key` or `flush`.")
    seed: int = Field(default=0, description="Of the orders and of the built-in prompts.")


@dataclass(frozen=True)
class Result:
    """A finished gate."""

    url: str
    facts: Facts
    config: GateConfig
    cold: arms.Cold
    cases: Sequence[Case]
    sent: arms.Sent
    judgement: judge.Judgement
    requests: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For programs: the verdict with its exit code first."""
        j = self.judgement
        told = {
            "verdict": j.verdict.value,
            "exit_code": j.verdict.exit_code,
            "sentence": j.sentence,
            "reasons": list(j.reasons),
            "server": {"url": self.url, **asdict(self.facts)},
            "cold": {"by": self.cold, "means": arms.MEANS[self.cold]},
            "config": self.config.model_dump(mode="json"),
            "requests": self.requests,
            "seconds": round(self.seconds, 1),
            "yardstick_nats": j.yardstick,
            "threshold_nats": j.threshold,
            "wrong_tokens_seen": {str(n): share for n, share in j.seen.items()},
            "wrong": [{**asdict(w), "case": self.cases[w.case].name} for w in j.wrong],
            "paths": json.loads(j.paths.to_json(orient="records", double_precision=15)),
            "failed_requests": len(self.sent.failures),
            "failures": self.sent.failures[:20],
        }
        return _finite(told)


def gate(
    client: Client,
    config: GateConfig,
    *,
    tell: Callable[[str, int, int], None] = lambda what, done, of: None,
    first: Callable[[judge.Judgement], None] = lambda judgement: None,
) -> Result:
    """Ask, and judge.

    Args:
        tell: hears what is being asked, and how far it is.
        first: hears what the path `branch` alone says, as soon as that is known.

    Raises:
        ConfigError: nobody answers, or nothing can be asked cold.
        RefusedError: the server refuses what the gate needs, e.g. log-probabilities.
    """
    began = time.monotonic()
    facts = client.facts()
    new = config.new_tokens or max(NEW, (facts.page_size or 0) + 1)
    config = config.model_copy(update={"new_tokens": new})
    tell("prompts", 0, 1)
    if config.prompts is not None:
        cases = from_file(config.prompts, client.ids, most=config.cases)
    else:
        cases = built_in(config.cases, config.tokens, client.ids, seed=config.seed)
    if facts.radix is False:
        return _result(client, facts, config, cases, arms.Sent("cache_salt"), began)
    sent = arms.send(
        client,
        cases,
        arms.how_to_be_cold(client, cases[0].prompt, config.cold),
        new=new,
        paths=config.paths,
        company=config.company,
        seed=config.seed,
        origin=facts.probe,
        tell=tell,
        early=lambda sent: first(judge.judge(cases, sent.arms, facts, paths=["branch"], refused=sent.refused)),
    )
    return _result(client, facts, config, cases, sent, began)


def _result(
    client: Client, facts: Facts, config: GateConfig, cases: Sequence[Case], sent: arms.Sent, began: float
) -> Result:
    found = judge.judge(cases, sent.arms, facts, paths=sent.paths, refused=sent.refused, unsent=sent.unsent)
    return Result(client.url, facts, config, sent.cold, cases, sent, found, client.asked, time.monotonic() - began)


def _finite(told: Any) -> Any:
    """Without numbers that JSON does not have."""
    if isinstance(told, dict):
        return {k: _finite(v) for k, v in told.items()}
    if isinstance(told, list | tuple):
        return [_finite(v) for v in told]
    if isinstance(told, float) and (pd.isna(told) or told in (float("inf"), float("-inf"))):
        return None
    return told

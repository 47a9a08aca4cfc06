"""What an eviction study crosses: policies by budgets by protocols. Policies keep their kind, so that an oracle or a
negative control is never listed among methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field

from sglang_probe.config import Config
from sglang_probe.errors import ConfigError
from sglang_probe.eviction.base import Policy
from sglang_probe.eviction.lookahead import LookaheadScorer
from sglang_probe.eviction.methods.protected_random import ProtectedRandom
from sglang_probe.eviction.methods.quest import Quest
from sglang_probe.eviction.oracles.causal_refreshed import CausalRefreshed
from sglang_probe.eviction.oracles.per_step import PerStep
from sglang_probe.eviction.registry import parse_method, parse_oracle
from sglang_probe.eviction.wrapper import Wrapper

Kind = Literal["baseline", "method", "oracle", "control"]

BASELINE = "protected random"
"""Label of the row that differences, regret and the gap closed refer to."""


class Trivial(Config):
    """Positions that every sensible policy keeps: neither metrics of the candidates nor the baseline choose them."""

    sinks: int = Field(default=4, ge=0)
    window: int = Field(default=32, ge=0)

    @property
    def size(self) -> int:
        """Positions in all, of a prompt that is long enough."""
        return self.sinks + self.window


@dataclass(frozen=True)
class Entry:
    """One policy of a study."""

    label: str
    kind: Kind
    policy: Policy

    @property
    def evicts(self) -> bool:
        """False for selections by decode step, which keep everything in memory and cannot run as a kept set."""
        return not isinstance(_innermost(self.policy), Quest | PerStep | CausalRefreshed)

    @property
    def lookahead(self) -> str | None:
        """Name of the lookahead queries that it needs."""
        inner = _innermost(self.policy)
        return inner.queries if isinstance(inner, LookaheadScorer) else None


def entries_of(
    methods: Sequence[Mapping[str, Any] | str], oracles: Sequence[Mapping[str, Any] | str], trivial: Trivial, seed: int
) -> list[Entry]:
    """The policies of a study: the baseline first, then methods and oracles as listed.

    Raises:
        ConfigError: an unknown name or parameter, or two policies that are the same.
    """
    baseline = ProtectedRandom(seed=seed, sinks=trivial.sinks, recent=trivial.window)
    out = [Entry(BASELINE, "baseline", baseline)]
    for kind, parse, listed in (("method", parse_method, methods), ("oracle", parse_oracle, oracles)):
        names = Counter(_name(given, kind) for given in listed)
        for given in listed:
            label = _label(given, kind, short=names[_name(given, kind)] == 1)
            out.append(Entry(label, kind, parse(given)))  # type: ignore[arg-type, operator]
    twice = [label for label, n in Counter(e.label for e in out).items() if n > 1]
    if twice:
        raise ConfigError(f"two policies are called `{twice[0]}`", fix="give one of them other parameters")
    return out


def tokens_of(budget: int | Fraction, length: int) -> int:
    """Positions of a budget in a prompt of `length`: a fraction is rounded to the nearest, halves up."""
    return budget if isinstance(budget, int) else int(budget * length + Fraction(1, 2))


def parse_budget(value: Any) -> int | Fraction:
    """A number of positions (`64`) or a share of the prompt (`1/8`, `0.125`).

    Raises:
        ValueError: neither.
    """
    if isinstance(value, int | Fraction) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and value.strip().isdigit() and int(value) > 0:
        return int(value)
    try:
        share = Fraction(str(value)).limit_denominator(4096)
    except (ValueError, ZeroDivisionError):
        raise ValueError("a budget is a number of positions, or a share such as 1/8") from None
    if share > 1 and share.denominator == 1:
        return int(share)
    if not 0 < share <= 1:
        raise ValueError("a budget is a number of positions, or a share above 0 and up to 1")
    return share


def budget_name(budget: int | Fraction) -> str:
    """`1/8`, `64`, and `1/1` for a share that is everything: `1` is one position."""
    return f"{budget.numerator}/{budget.denominator}" if isinstance(budget, Fraction) else str(budget)


def caveats(entries: Sequence[Entry], layers: int) -> list[str]:
    """What policies are not made for in a model of so many layers, each said once."""
    said = (entry.policy.caveat(layers) for entry in entries)
    return [text for text in dict.fromkeys(said) if text is not None]


def listing(entries: Iterable[Entry]) -> list[dict[str, str]]:
    """Every policy with all its parameters and its source, for reports."""
    return [
        {"policy": e.label, "kind": e.kind, "parameters": e.policy.describe(), "source": e.policy.source}
        for e in entries
    ]


def _innermost(policy: Policy) -> Policy:
    while isinstance(policy, Wrapper):
        policy = policy.base
    return policy


def _name(given: Mapping[str, Any] | str, kind: str) -> str:
    if isinstance(given, str):
        return given
    base = given.get("base")
    inner = f"({_name(base, kind)})" if base is not None else ""
    return f"{given.get(kind)}{inner}"


def _label(given: Mapping[str, Any] | str, kind: str, *, short: bool) -> str:
    """The name; where it alone would not tell policies apart, also the parameters that were given."""
    name = _name(given, kind)
    if short or isinstance(given, str):
        return name
    told = [f"{k} {v}" for k, v in given.items() if k not in (kind, "base")]
    return f"{name} {', '.join(told)}".strip()

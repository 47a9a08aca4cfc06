"""What an eviction study crosses: policies by budgets by protocols. Policies keep their kind, so that an oracle or a
negative control is never listed among methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field

from sglang_probe.config import Config
from sglang_probe.errors import ConfigError
from sglang_probe.eviction.base import Policy
from sglang_probe.eviction.lookahead import LookaheadScorer
from sglang_probe.eviction.methods.protected_random import ProtectedRandom
from sglang_probe.eviction.methods.quest import Quest
from sglang_probe.eviction.methods.random import Random
from sglang_probe.eviction.oracles.causal_refreshed import CausalRefreshed
from sglang_probe.eviction.oracles.per_step import PerStep
from sglang_probe.eviction.registry import parse_method, parse_oracle
from sglang_probe.eviction.wrapper import Wrapper

Kind = Literal["baseline", "method", "published", "oracle", "control"]
"""`published`: a method with the always-kept set that it was given, beside the same `method` with the study's."""

PER_QUERY_HEAD = "per_query_head"
"""Key of a method: score and keep for every query head alone, as the authors of SnapKV and LAQ do."""

BASELINE = "protected random"
"""Label of the row that differences, regret and the gap closed refer to."""


class Trivial(Config):
    """Positions that every sensible policy keeps: neither metrics of the candidates nor the baseline choose them."""

    sinks: int = Field(default=4, ge=0)
    """First positions."""
    window: int = Field(default=32, ge=0)
    """Last positions."""

    @property
    def size(self) -> int:
        """Positions in all, of a prompt that is long enough."""
        return self.sinks + self.window


class Protection(Config):
    """Positions that every policy of a study always keeps, so that they differ in their scores alone."""

    sinks: int = Field(ge=0)
    """First positions."""
    recent: int = Field(ge=0)
    """Last positions of what is compressed."""


@dataclass(frozen=True)
class Entry:
    """One policy of a study."""

    label: str
    kind: Kind
    policy: Policy
    per_query_head: bool = False
    """Whether every query head has a kept set of its own. The engine has one for each kv head."""

    @property
    def evicts(self) -> bool:
        """False for what cannot run as a kept set of the engine: selections by decode step, which keep everything in
        memory, and sets by query head."""
        return not (self.per_query_head or isinstance(_innermost(self.policy), Quest | PerStep | CausalRefreshed))

    @property
    def lookahead(self) -> str | None:
        """Name of the lookahead queries that it needs."""
        inner = _innermost(self.policy)
        return inner.queries if isinstance(inner, LookaheadScorer) else None


def entries_of(
    methods: Sequence[Mapping[str, Any] | str],
    oracles: Sequence[Mapping[str, Any] | str],
    trivial: Trivial,
    seed: int,
    *,
    protect: Protection | None = None,
    as_published: bool = False,
) -> list[Entry]:
    """The policies of a study: the baseline first, then methods and oracles as listed.

    Args:
        protect: what the baseline, all methods and all oracles always keep; None: the baseline `trivial`, the others
            what they are given.
        as_published: list methods a second time, with the always-kept set that they are given.

    Raises:
        ConfigError: an unknown name or parameter, two policies that are the same, or one that is the baseline.
    """
    fixed = protect or Protection(sinks=trivial.sinks, recent=trivial.window)
    out = [Entry(BASELINE, "baseline", ProtectedRandom(seed=seed, sinks=fixed.sinks, recent=fixed.recent))]
    for kind, parse, listed in (("method", parse_method, methods), ("oracle", parse_oracle, oracles)):
        names = Counter(_name(given, kind) for given in listed)
        for given in listed:
            wide = kind == "method" and isinstance(given, Mapping) and _flag(given)
            label = _label(given, kind, short=names[_name(given, kind)] == 1)
            known = {k: v for k, v in given.items() if k != PER_QUERY_HEAD} if isinstance(given, Mapping) else given
            entry = Entry(label, kind, parse(known), wide)  # type: ignore[arg-type, operator]
            out += [entry] if protect is None else _on_equal_terms(entry, protect, as_published)
    twice = [key for key, n in Counter((e.label, e.kind == "published") for e in out).items() if n > 1]
    if twice:
        raise ConfigError(f"two policies are called `{twice[0][0]}`", fix="give one of them other parameters")
    return out


def _on_equal_terms(entry: Entry, protect: Protection, as_published: bool) -> list[Entry]:
    """A policy with the study's always-kept set, and a method also with its own, where that is another one."""
    equal = replace(entry, policy=entry.policy.protecting(protect.sinks, protect.recent))
    if entry.kind != "method":
        return [equal]
    own = replace(entry, kind="published")
    if type(entry.policy) is Random:
        if not as_published:
            raise ConfigError(
                f"`{entry.label}` with what all policies of the study protect is its baseline, {BASELINE}",
                fix="leave it out, or set `as_published: true`",
            )
        return [own]
    return [equal, own] if as_published and equal.policy != entry.policy else [equal]


def _flag(given: Mapping[str, Any]) -> bool:
    value = given.get(PER_QUERY_HEAD, False)
    if not isinstance(value, bool):
        raise ConfigError(f"`{PER_QUERY_HEAD}` is true or false, and not {value!r}")
    return value


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
    """What policies are not made for in a model of so many layers, and what cannot be run; each said once."""
    said = [entry.policy.caveat(layers) for entry in entries]
    wide = list(dict.fromkeys(f"`{entry.label}`" for entry in entries if entry.per_query_head))
    if wide:
        said.append(
            f"{', '.join(wide)}: a kept set for every query head, as the authors have it, is judged by attention "
            "alone. The cache of the engine has one set for each kv head, so nothing is generated from it."
        )
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
    if isinstance(given, str):
        return name
    told = [] if short else [f"{k} {v}" for k, v in given.items() if k not in (kind, "base", PER_QUERY_HEAD)]
    if given.get(PER_QUERY_HEAD):
        told.append("per query head")
    return f"{name} {', '.join(told)}".strip()

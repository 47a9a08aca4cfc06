"""What a request asks of a library of vectors, made into what is done to it: names, kinds, units, gates and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from sglang_probe.errors import ConfigError
from sglang_probe.steer_ask import Gate, Steer
from sglang_probe.steering.spec import Probe, Spec, Step, layer_of

MOST_AMOUNT = 30_000.0
"""Largest sum of the amounts of one request, in absolute units: far past any residual stream that means something, and
below what overflows in half precision where the residual itself does not come near that. Rows that are not finite would
be read by sampling, and by whoever trains."""

MOST_EXCLUDED = 256
"""Excluded positions of one request: each cuts an interval that every forward of it looks at."""

MOST_SPLICES = 4
"""Of one request: each encodes and decodes every row of it with all latents of an SAE."""


class Card(Protocol):
    """What is read of a vector's card (`steering/library.py`)."""

    @property
    def kind(self) -> str: ...
    @property
    def hook_point(self) -> str: ...
    @property
    def norm(self) -> float | None: ...
    @property
    def layer_mean_norm(self) -> float | None: ...
    @property
    def percentile99(self) -> float | None: ...


class Source(Protocol):
    """A vector of a library."""

    @property
    def card(self) -> Card: ...
    @property
    def hash(self) -> str: ...
    @property
    def threshold(self) -> float | None: ...


def spec_of(asked: Sequence[Steer], library: Mapping[str, Source], *, where: str) -> Spec | None:
    """What a request's interventions are; None where they change nothing.

    Args:
        where: the key that holds them, for messages.

    Raises:
        ConfigError: names the entry: a vector that the library does not have, or one that cannot do what is asked.
    """
    steps = []
    for i, entry in enumerate(asked):
        at = f"{where}[{i}]"
        if entry.vector not in library:
            raise ConfigError(f"{at}.vector: `{entry.vector:.100}` is not in the library, which has {_named(library)}")
        step = _step(entry, library, at)
        if step.amount or step.op in ("clamp", "cap"):
            steps.append(step)
    if len(probes := {s.probe.name for s in steps if s.probe is not None}) > 1:
        raise ConfigError(f"{where}: gates by {_quoted(sorted(probes))}; a request has one probe")
    if (excluded := sum(len(s.exclude) for s in steps)) > MOST_EXCLUDED:
        raise ConfigError(f"{where}: {excluded} excluded positions in all; a request may name {MOST_EXCLUDED}")
    # An activation is worth as much of the residual stream as its feature's decoder row is long.
    total = sum(abs(s.amount) * (library[s.vector].card.norm or 1 if s.op in ("clamp", "cap") else 1) for s in steps)
    if total > MOST_AMOUNT:
        raise ConfigError(
            f"{where}: changes of {total:.3g} in all, in absolute units; a request may ask for {MOST_AMOUNT:,.0f}"
        )
    if (spliced := sum(s.op == "splice" for s in steps)) > MOST_SPLICES:
        raise ConfigError(f"{where}: {spliced} entries `splice`; a request may have {MOST_SPLICES}")
    return Spec(tuple(sorted(steps, key=lambda s: s.layer))) if steps else None


_KINDS = {
    "add": ("direction", "feature"),
    "project_out": ("direction", "feature"),
    "ablate_feature": ("feature",),
    "clamp": ("direction", "feature"),
    "cap": ("direction", "feature"),
    "splice": ("sae",),
}
"""Kinds of vector that an operation is defined for."""


def _step(entry: Steer, library: Mapping[str, Source], at: str) -> Step:
    vector = library[entry.vector]
    card = vector.card
    if card.kind not in _KINDS[entry.op]:
        raise ConfigError(
            f"{at}.op: `{entry.op}` needs {' or '.join(map(_a, _KINDS[entry.op]))}; `{entry.vector}` is {_a(card.kind)}"
        )
    if entry.gate is not None and entry.gate.by_feature and card.kind != "feature":
        raise ConfigError(f"{at}.gate: `{entry.vector}` is a {card.kind}, and only a feature has a threshold")
    amount = entry.fraction if entry.strength is None else float(entry.strength)
    only_active = entry.gate is not None and entry.gate.by_feature
    if entry.op in ("clamp", "cap") and card.kind == "feature" and amount < 0 and not only_active:
        also = ""
        if entry.op == "clamp":
            also = "; to go past taking the feature out, clamp it where it is active alone, `gate: {by: feature}`"
        raise ConfigError(f"{at}.strength: an activation is never below 0 (got {amount:g}){also}")
    amount *= _unit(entry, card, at)
    return Step(
        vector=entry.vector,
        hash=vector.hash,
        hook_point=f"blocks.{layer_of(card.hook_point)}.hook_resid_post",
        op=entry.op,
        amount=amount + 0.0,  # -0.0 and 0.0 are one
        gated=only_active,
        prompt=(entry.prompt_window or (0, None)) if "prefill" in entry.phases else None,
        generation=(entry.generation_window or (1, None)) if "decode" in entry.phases else None,
        exclude=tuple(sorted(set(entry.exclude))),
        random_error=entry.random_error,
        probe=None if entry.gate is None else _probe(entry.gate, library, at),
    )


def _a(kind: str) -> str:
    return "an SAE" if kind == "sae" else f"a {kind}"


def _probe(gate: Gate, library: Mapping[str, Source], at: str) -> Probe | None:
    """Of a gate by a probe, the probe.

    Raises:
        ConfigError: the library does not have it, it is none, or it has no threshold.
    """
    return None if gate.probe is None else probe_of(gate.probe, library, f"{at}.gate.probe")


def probe_of(name: str, library: Mapping[str, Source], at: str) -> Probe:
    """A probe of a library, as a gate.

    Args:
        at: the key that names it, for messages.

    Raises:
        ConfigError: the library does not have it, it is none, or it has no threshold.
    """
    if name not in library:
        raise ConfigError(f"{at}: `{name:.100}` is not in the library, which has {_named(library)}")
    found = library[name]
    if found.card.kind != "probe":
        raise ConfigError(f"{at}: `{name}` is a {found.card.kind}, and gates are opened by probes")
    if found.threshold is None:
        raise ConfigError(f"{at}: `{name}` has no threshold; `sglang-probe vector make probe` chooses one")
    point = f"blocks.{layer_of(found.card.hook_point)}.hook_resid_post"
    return Probe(name, found.hash, point, found.threshold)


def _unit(entry: Steer, card: Card, at: str) -> float:
    """What a strength of 1 is worth."""
    if entry.unit == "absolute":
        return 1.0
    told = {"mean_norm": card.layer_mean_norm, "p99": card.percentile99}[entry.unit]
    activation = entry.op in ("clamp", "cap") and card.kind == "feature"
    if entry.unit == "mean_norm" and activation:
        raise ConfigError(f"{at}.unit: an activation is not measured in `mean_norm`; use `p99` or `absolute`")
    if entry.unit == "p99" and card.kind != "feature":
        raise ConfigError(f"{at}.unit: `p99` is of a feature, and `{entry.vector}` is a {card.kind}")
    if told is None:
        raise ConfigError(f"{at}.unit: the card of `{entry.vector}` does not say its `{entry.unit}`")
    return float(told)


def _named(library: Mapping[str, Source]) -> str:
    return _quoted(sorted(library)) or "none"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{n}`" for n in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

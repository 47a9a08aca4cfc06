"""The effective interventions of one request (`resolve.py` makes them of what it asks).

`Spec` holds no tensor. It says, for a prompt of a given length, which positions are changed by which vector and by how
much, and it has two hashes. `id` names the specification, whatever the length of the prompt: the ledger has it.
`history(prompt_len)` names what was done to the positions of one sequence: entries of the KV cache may be shared by
requests of one history only. What changes nothing (strength 0) is in neither; order counts within a layer, where each
operation sees what the one before left.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_probe.errors import ConfigError

END = (1 << 31) - 1
"""Past every position: where an interval without an end stops."""

_RESID_POST = re.compile(r"blocks\.(\d+)\.hook_resid_post")


@dataclass(frozen=True, slots=True)
class Probe:
    """What decides, once for a request, whether the steps that name it act: the score `x @ vector` of the prompt's last
    row, fp32, after the interventions of its layer."""

    name: str
    """In the library; the hash counts."""
    hash: str
    hook_point: str
    threshold: float
    """The steps act if the score is above it."""

    def opens(self, score: float) -> bool:
        """The decision; not a number opens nothing."""
        return score > self.threshold


@dataclass(frozen=True, slots=True)
class Step:
    """One intervention, in absolute units."""

    vector: str
    """Name in the library; the hash counts, the name is for people."""
    hash: str
    hook_point: str
    op: str
    amount: float
    """`add`: length in the residual stream; `clamp`, `cap`: activation, or projection on a direction; else a fraction.
    """
    gated: bool
    """Whether it acts only where the feature is active."""
    prompt: tuple[int, int | None] | None
    """Window of prompt positions, negative ones from its end; None: none of them."""
    generation: tuple[int, int | None] | None
    """Window of steps, from 1; None: none of them."""
    exclude: tuple[int, ...]
    random_error: int | None = None
    """Of `splice`: seed of the direction into which the error is turned; None: it is left as it is."""
    probe: Probe | None = None
    """What decides whether it acts at all; None: it does."""

    @property
    def layer(self) -> int:
        """Number of the decoder layer after which it acts."""
        return layer_of(self.hook_point)

    def intervals(self, prompt_len: int) -> list[tuple[int, int]]:
        """Positions of the sequence that it acts on: ascending half-open intervals that do not touch."""
        found: list[tuple[int, int]] = []
        if self.prompt is not None:
            first, end = (None if p is None else p + prompt_len if p < 0 else p for p in self.prompt)
            found.append((max(first or 0, 0), prompt_len if end is None else min(max(end, 0), prompt_len)))
        if self.generation is not None:
            first, end = self.generation
            found.append((prompt_len + first - 1, END if end is None else min(prompt_len + end - 1, END)))
        for p in self.exclude:
            found = [piece for a, b in found for piece in (((a, p), (p + 1, b)) if a <= p < b else ((a, b),))]
        joined: list[tuple[int, int]] = []
        for a, b in found:
            if a >= b:
                continue
            if joined and joined[-1][1] == a:
                joined[-1] = (joined[-1][0], b)
            else:
                joined.append((a, b))
        return joined


@dataclass(frozen=True)
class Isolation:
    """How the entries of an intervened request are kept apart in the prefix cache."""

    namespace: str | None
    """Of its own, shared by requests of the same history; None: the ordinary one, and nothing is published."""
    read_limit: int | None
    """Positions that it may reuse at most; None: as SGLang decides."""


_SCHEDULES = 512
"""Prompt lengths whose schedule a specification remembers."""


@dataclass(frozen=True)
class Spec:
    """The interventions of one request, layer by layer, in the order in which they act."""

    steps: tuple[Step, ...]

    @functools.cached_property
    def id(self) -> str:
        """Name of the specification: 16 hex digits, whatever the vectors are called."""
        return _hash([_canonical(s) for s in self.steps])[:16]

    def to_json(self) -> list[dict[str, Any]]:
        """What `from_json` reads."""
        told = [{"vector": s.vector, **_canonical(s)} for s in self.steps]
        for s, entry in zip(self.steps, told, strict=True):
            if s.probe is not None:
                entry["probe"]["name"] = s.probe.name
        return told

    @classmethod
    def from_json(cls, steps: Sequence[Mapping[str, Any]]) -> Spec:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            tuple(
                Step(
                    vector=str(s["vector"]),
                    hash=str(s["hash"]),
                    hook_point=str(s["hook_point"]),
                    op=str(s["op"]),
                    amount=float.fromhex(s["amount"]),
                    gated=bool(s["gated"]),
                    prompt=_window(s["prompt"]),
                    generation=_window(s["generation"]),
                    exclude=tuple(int(p) for p in s["exclude"]),
                    random_error=None if s.get("random_error") is None else int(s["random_error"]),
                    probe=_read_probe(s.get("probe")),
                )
                for s in steps
            )
        )

    @property
    def probe(self) -> Probe | None:
        """The probe of its gated steps; None: it has none."""
        return next((s.probe for s in self.steps if s.probe is not None), None)

    def decided(self, opened: bool) -> Spec | None:
        """What is done once the gate is decided: all of it, or the steps without a gate; None: nothing."""
        if opened or self.probe is None:
            return self
        left = tuple(s for s in self.steps if s.probe is None)
        return Spec(left) if left else None

    def schedule(self, prompt_len: int) -> tuple[tuple[Step, tuple[tuple[int, int], ...]], ...]:
        """Each step with the positions that it acts on; a step that acts on none is left out."""
        # Asked for every row of every decode step: a cache by equality would hash all steps each time.
        found = self._schedules.get(prompt_len)
        if found is None:
            if len(self._schedules) >= _SCHEDULES:
                self._schedules.clear()
            found = tuple((s, tuple(where)) for s in self.steps if (where := s.intervals(prompt_len)))
            self._schedules[prompt_len] = found
        return found

    @functools.cached_property
    def _schedules(self) -> dict[int, tuple[tuple[Step, tuple[tuple[int, int], ...]], ...]]:
        return {}

    def onset(self, prompt_len: int) -> int | None:
        """First position that is changed; None: none. From here on the entries are those of another model."""
        return min((where[0][0] for _, where in self.schedule(prompt_len)), default=None)

    def history(self, prompt_len: int, end: int = END) -> str:
        """Hash of what is done to the positions `[0, end)`: equal for sequences that are changed alike."""
        told = []
        for step, where in self.schedule(prompt_len):
            if cut := [[a, min(b, end)] for a, b in where if a < end]:
                told.append([step.hash, step.hook_point, step.op, step.amount.hex(), step.gated, cut, *_seed(step)])
        return _hash(told)

    def isolation(self, prompt_len: int) -> Isolation:
        """How such a request uses the prefix cache.

        What lies before the onset is anybody's. A late onset, above all that of an intervention on generated tokens
        alone, reads so much from the ordinary cache and publishes nothing. An early one (in the first half of the
        prompt) has a namespace, which requests of equal history share from position 0. What a gate by a probe will
        decide is not known yet, so that such a request never shares.
        """
        onset = self.onset(prompt_len)
        if onset is None:
            return Isolation(None, None)
        if 2 * onset < prompt_len and self.probe is None:
            return Isolation(self.history(prompt_len), None)
        return Isolation(None, onset)


def joined(first: Spec | None, then: Spec | None) -> Spec | None:
    """Both, the first one's steps before the other's within a layer.

    Raises:
        ConfigError: a gate by a probe under what is done to all: everybody would share what one request's gate decides.
    """
    if first is not None and then is not None and then.probe is not None:
        raise ConfigError(
            f"steer: a gate by the probe `{then.probe.name}` cannot be had of a server that steers every request "
            "(`deployment`)"
        )
    if first is None or then is None:
        return then if first is None else first
    return Spec(tuple(sorted((*first.steps, *then.steps), key=lambda s: s.layer)))


def merged(clamps: Spec, own: Spec | None) -> Spec:
    """What a request asks of its own, then within a layer what a server's clamps do: nothing that it adds there undoes
    them.

    Raises:
        ConfigError: the request has a gate by another probe.
    """
    if own is None:
        return clamps
    assert clamps.probe is not None
    if own.probe is not None and own.probe != clamps.probe:
        raise ConfigError(
            f"steer: a gate by the probe `{own.probe.name}` cannot be had of a server whose clamps have the gate "
            f"`{clamps.probe.name}`: a request has one probe"
        )
    return Spec(tuple(sorted((*own.steps, *clamps.steps), key=lambda s: s.layer)))


@functools.lru_cache(maxsize=1024)
def layer_of(hook_point: str) -> int:
    """Number of the layer in `blocks.N.hook_resid_post`.

    Raises:
        ConfigError: it is another hook point.
    """
    found = _RESID_POST.fullmatch(hook_point)
    if found is None:
        raise ConfigError(f"`{hook_point}` cannot be intervened on; only `blocks.N.hook_resid_post` can")
    return int(found[1])


def _canonical(step: Step) -> dict[str, Any]:
    told: dict[str, Any] = {
        "hash": step.hash,
        "hook_point": step.hook_point,
        "op": step.op,
        "amount": step.amount.hex(),
        "gated": step.gated,
        "prompt": None if step.prompt is None else list(step.prompt),
        "generation": None if step.generation is None else list(step.generation),
        "exclude": list(step.exclude),
    }
    # What has none keeps the hash that it had before there were such.
    if step.random_error is not None:
        told["random_error"] = step.random_error
    if (p := step.probe) is not None:
        told["probe"] = {"hash": p.hash, "hook_point": p.hook_point, "threshold": p.threshold.hex()}
    return told


def _read_probe(told: Mapping[str, Any] | None) -> Probe | None:
    if told is None:
        return None
    return Probe(str(told["name"]), str(told["hash"]), str(told["hook_point"]), float.fromhex(told["threshold"]))


def _seed(step: Step) -> list[int]:
    return [] if step.random_error is None else [step.random_error]


def _window(told: Sequence[int | None] | None) -> tuple[int, int | None] | None:
    if told is None:
        return None
    first, end = told
    return int(first or 0), None if end is None else int(end)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
